"""Brings the numbers of each step to all hosts, without holding up a device.

Enters: a step's losses and gradient norms, as tensors on the device. Leaves: observations that are the same on every
rank, and a stop signal that any rank received. Why it exists: a decision to go back must be taken by all ranks at the
same step, for one small collective per step and without making the host wait for the device: reading a number of the
current step makes the host wait for the whole step, and the device then waits for the host. On CUDA a step's numbers
are therefore read while the next one runs.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.guard.guard import Observation
from pretrain.parallel.world import World

_NUM_REMEMBERED_STEPS = 256
"""Steps whose losses per micro-batch are kept."""


class AsyncScalars:
    """Floats that are copied from the device in the background. On the CPU they are there at once."""

    def __init__(self, values: Sequence[Tensor]) -> None:
        """Starts the copy.

        Args:
            values: 0-d tensors of one device.
        """
        stacked = torch.stack([value.detach().float() for value in values])
        self._event: torch.cuda.Event | None = None
        if stacked.device.type == "cuda":
            self._values = torch.empty(len(stacked), pin_memory=True)
            self._values.copy_(stacked, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._values = stacked

    def floats(self) -> list[float]:
        """The numbers; waits only if the device has not come to them yet."""
        if self._event is not None:
            self._event.synchronize()
        return [float(value) for value in self._values.tolist()]


@dataclass(frozen=True)
class _Pending:
    step: int
    position: int
    numbers: AsyncScalars
    """The loss of each micro-batch, then the norms."""
    num_losses: int


class StepObserver:
    """Makes the steps of all ranks known to all of them. Every rank calls it in the same order."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.local_losses: dict[int, list[float]] = {}
        """Of this rank's micro-batches, by step."""
        self._pending: deque[_Pending] = deque()
        self._delay = 1 if world.device.type == "cuda" else 0

    def add(self, step: int, position: int, losses: Sequence[Tensor], norms: Sequence[Tensor]) -> None:
        """Takes in a step that the device may still be at work on.

        Args:
            step: optimizer steps done after it.
            position: global position of its first sample.
            losses: 0-d, of this rank's micro-batches.
            norms: 0-d, the players' gradient norms over all ranks.
        """
        device = losses[0].device
        numbers = AsyncScalars([*losses, *(norm.to(device) for norm in norms)])
        self._pending.append(_Pending(step, position, numbers, len(losses)))

    def settle(self, stop: bool, *, everything: bool) -> tuple[bool, list[Observation]]:
        """Asks all ranks what they know. A collective.

        Args:
            stop: whether this rank was asked to stop.
            everything: wait for the newest step too, although the device may still be at work on it.

        Returns:
            Whether any rank was asked to stop, and the steps that are known by now and were not before.
        """
        count = len(self._pending) - (0 if everything else self._delay)
        settled = [self._pending.popleft() for _ in range(max(0, count))]
        row = [float(stop)]
        for one in settled:
            numbers = one.numbers.floats()
            losses, norms = numbers[: one.num_losses], numbers[one.num_losses :]
            self.local_losses[one.step] = losses
            finite = all(math.isfinite(number) for number in (*losses, *norms))
            mean = sum(losses) / len(losses)
            row += [mean if math.isfinite(mean) else 0.0, float(not finite)]
        while len(self.local_losses) > _NUM_REMEMBERED_STEPS:
            del self.local_losses[next(iter(self.local_losses))]
        stopping, *rest = self.world.sum(torch.tensor(row, dtype=torch.float64)).tolist()
        observations = [
            Observation(one.step, one.position, loss / self.world.size if not broken else math.nan, not broken)
            for one, loss, broken in zip(settled, rest[::2], rest[1::2], strict=True)
        ]
        return stopping > 0, observations

    def restart(self) -> None:
        """Forgets what is under way: the run has gone back."""
        self._pending.clear()
        self.local_losses.clear()
