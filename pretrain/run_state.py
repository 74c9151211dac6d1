"""Where a run is: what the loop keeps between its steps, and a checkpoint keeps of it.

Enters: steps that were done, samples that are to be left out, what a checkpoint kept. Leaves: the position of the next
step, the number of steps that are left, and what falls due after a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.config import RunConfig


@dataclass(frozen=True)
class SkippedSamples:
    """The positions that a run leaves out, as half-open ranges in the order of training."""

    ranges: tuple[tuple[int, int], ...] = ()
    """[begin, end) of global sample positions; sorted, without overlap."""

    def with_range(self, begin: int, end: int) -> SkippedSamples:
        """One more range; those that touch become one."""
        merged: list[tuple[int, int]] = []
        for low, high in sorted([*self.ranges, (begin, end)]):
            if merged and low <= merged[-1][1]:
                merged[-1] = merged[-1][0], max(high, merged[-1][1])
            else:
                merged.append((low, high))
        return SkippedSamples(tuple(merged))

    def next_position(self, position: int) -> int:
        """Where training goes on that has come to `position`."""
        for begin, end in self.ranges:
            if begin <= position < end:
                return end
        return position

    def count_from(self, position: int) -> int:
        """Samples at or after `position` that will be left out."""
        return sum(max(0, end - max(begin, position)) for begin, end in self.ranges)


@dataclass
class RunState:
    """How far a run has come. The loop changes it in place; the same on every rank."""

    step: int = 0
    """Optimizer steps done."""
    position: int = 0
    """Global sample position at which the next step begins: samples consumed or left out so far, over all ranks."""
    skipped: SkippedSamples = field(default_factory=SkippedSamples)
    """What the guard has decided to leave out."""
    rollbacks: int = 0
    """How often the run has gone back, over all its starts."""

    def advance(self, global_batch: int) -> None:
        """One more optimizer step of `global_batch` samples is done."""
        self.step += 1
        self.position += global_batch

    def steps_left(self, total: int, global_batch: int) -> int:
        """Optimizer steps of `global_batch` samples that are left of a run of `total` samples."""
        return max(0, total - self.position - self.skipped.count_from(self.position)) // global_batch

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        return {
            "step": self.step,
            "position": self.position,
            "skipped": self.skipped.ranges,
            "rollbacks": self.rollbacks,
        }

    @staticmethod
    def from_dict(kept: Mapping[str, Any]) -> RunState:
        """The inverse of `to_dict`; what a checkpoint of an earlier version lacks is as at the start of a run."""
        ranges = tuple((int(begin), int(end)) for begin, end in kept.get("skipped", ()))
        return RunState(int(kept["step"]), int(kept["position"]), SkippedSamples(ranges), int(kept.get("rollbacks", 0)))


@dataclass(frozen=True)
class Due:
    """What follows an optimizer step."""

    log: bool
    save: bool
    validate: bool
    end: bool
    """The run has reached its length."""

    @staticmethod
    def after(step: int, config: RunConfig, *, end: bool) -> Due:
        """What is due after `step` optimizer steps; at the run's end it is everything."""
        save_every, val_every = config.checkpoint.every_steps, config.train.val_every or config.checkpoint.every_steps
        every = lambda steps: end or (steps is not None and step % steps == 0)
        return Due(every(config.train.log_every), every(save_every), every(val_every), end)
