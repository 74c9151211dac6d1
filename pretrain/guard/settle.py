"""The eyes of the guard: brings the numbers of each step to all hosts, and writes down what a bad step held.

Enters: a step's losses and gradient norms, as tensors. Leaves: observations that are the same on every rank, a stop
signal that any rank received, files about bad steps. Why it exists: a decision to go back must be taken by all ranks at
the same step, for one small collective per step and without making the host wait for the device: on CUDA a step's
numbers are read while the next one runs.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from pretrain.guard.guard import Observation
from pretrain.parallel.fragments import Fragments
from pretrain.parallel.world import World

_REMEMBERED = 256
# steps whose losses per micro-batch are kept


@dataclass(frozen=True)
class _Pending:
    step: int
    position: int
    numbers: Readback
    """The loss of each micro-batch, then the norms."""
    num_losses: int


class Sentinel:
    """Settles the steps of all ranks. Every rank calls it in the same order."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.local_losses: dict[int, list[float]] = {}
        """Of this rank's micro-batches, by step."""
        self._pending: deque[_Pending] = deque()
        self._delay = 1 if world.device.type == "cuda" else 0

    def add(self, step: int, position: int, losses: Sequence[Tensor], norms: Sequence[Tensor]) -> None:
        """step: done after it. position: its first. losses: of this rank's micro-batches. norms: the global ones."""
        device = losses[0].device
        numbers = Readback([*losses, *(norm.to(device) for norm in norms)])
        self._pending.append(_Pending(step, position, numbers, len(losses)))

    def settle(self, stop: bool, *, everything: bool) -> tuple[bool, list[Observation]]:
        """(whether any rank was asked to stop, the steps that are known by now). A collective.

        everything: the newest step too, although the device may still be at work on it.
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
        while len(self.local_losses) > _REMEMBERED:
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


def are_finite(state: Mapping[str, Mapping[str, Tensor]], world: World) -> bool:
    """Whether all weights of a strategy's state are, on all ranks: what is not must not be saved. A collective."""
    weights = [tensor for group, tensors in state.items() if group.startswith("model.") for tensor in tensors.values()]
    local = [_local(tensor) for tensor in weights if tensor.is_floating_point()]
    norms = torch._foreach_norm([tensor for tensor in local if tensor.numel()], float("inf"))
    broken = bool(norms) and not bool(torch.isfinite(torch.stack([norm.float() for norm in norms])).all())
    return not world.any(broken)


def _local(tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    return tensor.piece if isinstance(tensor, Fragments) else tensor


class Readback:
    """Floats that are copied in the background. On the CPU they are there at once."""

    def __init__(self, values: Sequence[Tensor]) -> None:
        """values: 0-d tensors of one device."""
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
        """The numbers; waits only if the device is not yet past them."""
        if self._event is not None:
            self._event.synchronize()
        return [float(value) for value in self._values.tolist()]
