"""The numerical guard: watches losses and gradient norms, and decides when a run goes back and what it leaves out.

Enters: of each optimizer step its loss and whether its gradients were finite, the same numbers on every rank. Leaves:
None, or a `Rollback`. Why it exists: one bad batch or one rate too high can ruin weeks of work, and a person is asleep.

- A step whose gradient is not finite changes no weight: the strategy skips it on every rank. Once is an accident;
  `nonfinite_steps` in a row mean that the weights or the data are spoiled.
- A loss far above its median is noticed; `spike_steps` of them in a row are a divergence.
- Then the run goes back to its newest checkpoint from before the first of these steps and leaves out the samples from
  the step before it (whose update made the weights what they are) to the last. Meanwhile nothing is saved.

The decisions are a pure function of what was observed, so all ranks decide alike without asking each other.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass

from data_pipes.bounds import bounded


@dataclass(frozen=True)
class GuardConfig:
    """What counts as spoiled, and how often a run may go back."""

    nonfinite_steps: int = bounded(10, least=1)
    """Optimizer steps in a row without a finite gradient after which the run goes back."""
    spike_factor: float | None = bounded(4.0, above=1)
    """A loss above this many times the median of the last `window` steps is a spike; null = losses are not judged."""
    spike_steps: int = bounded(5, least=1)
    """Spikes in a row after which the run goes back."""
    window: int = bounded(100, least=1)
    """Steps under the median; nothing is a spike before half of them are known."""
    max_rollbacks: int = bounded(3, least=0)
    """Rollbacks of a run, over all its starts, before it stops with an error instead; 0 = the first one stops it."""
    dump: bool = True
    """Write the samples and the images of the first bad step to `<run>/guard/`."""

    def __post_init__(self) -> None:
        for name, least in (("nonfinite_steps", 1), ("spike_steps", 1), ("window", 4), ("max_rollbacks", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"guard.{name} is {getattr(self, name)}; it must be at least {least}")
        if self.spike_factor is not None and not self.spike_factor > 1.0:
            raise ValueError(f"guard.spike_factor is {self.spike_factor}; expected more than 1, or null")


@dataclass(frozen=True)
class Observation:
    """One optimizer step, as every rank sees it."""

    step: int
    """Optimizer steps done after it."""
    position: int
    """Its first global sample position."""
    loss: float
    """Mean over all ranks and micro-batches."""
    is_finite: bool
    """Whether loss and gradient norms were; if not, the weights are those of the step before."""


@dataclass(frozen=True)
class Rollback:
    """Where a run went wrong."""

    reason: str
    suspect: Observation
    """The first step whose samples are suspected: of a spike the one before it, whose update made the weights."""
    last_bad: Observation

    @property
    def newest_good_step(self) -> int:
        """A checkpoint of this step or of an earlier one is from before the fault."""
        return self.suspect.step - 1

    def skipped(self, global_batch: int) -> tuple[int, int]:
        """The positions [begin, end) that are left out."""
        return self.suspect.position, self.last_bad.position + global_batch


class Guard:
    """Judges steps in their order."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self._losses: deque[float] = deque(maxlen=config.window)
        self._bad: list[Observation] = []
        self._calm: Observation | None = None

    @property
    def is_suspicious(self) -> bool:
        """Whether the newest losses were spikes: what the weights are worth is not known yet, so nothing is saved."""
        return any(seen.is_finite for seen in self._bad)

    def observe(self, seen: Observation) -> Rollback | None:
        """Takes the next step into account. Not None: go back."""
        if not seen.is_finite:
            kind, limit = "not finite", self.config.nonfinite_steps
        elif self._is_spike(seen.loss):
            kind, limit = "a spike", self.config.spike_steps
        else:
            self._losses.append(seen.loss)
            self._bad, self._calm = [], seen
            return None
        self._bad.append(seen)
        if len(self._bad) < limit:
            return None
        return self._rollback(kind)

    def give_up(self) -> Rollback | None:
        """As `observe`, when there will be no further step to wait for: the suspicion decides."""
        return self._rollback("a spike") if self.is_suspicious else None

    def restart(self) -> None:
        """Forgets what was seen: the run has gone back."""
        self._losses.clear()
        self._bad, self._calm = [], None

    def _is_spike(self, loss: float) -> bool:
        if self.config.spike_factor is None or len(self._losses) < self.config.window // 2:
            return False
        return loss > self.config.spike_factor * abs(statistics.median(self._losses))

    def _rollback(self, kind: str) -> Rollback:
        first, last = self._bad[0], self._bad[-1]
        usual = f", usually {statistics.median(self._losses):.4g}" if self._losses else ""
        reason = f"the loss or gradient of steps {first.step} to {last.step} was {kind} (loss {last.loss:.4g}{usual})"
        # A step that was skipped left the weights alone; the weights of a spike come from the step before it.
        suspect = self._calm if first.is_finite and self._calm is not None else first
        return Rollback(reason, suspect, last)


def worst_micro_batches(losses: list[float]) -> list[int]:
    """Which micro-batches of a rank to look at first: those without a finite loss, else the highest one."""
    broken = [number for number, loss in enumerate(losses) if not math.isfinite(loss)]
    return broken or ([max(range(len(losses)), key=losses.__getitem__)] if losses else [])
