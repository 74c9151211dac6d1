"""The eyes of the guard: brings the numbers of each step to all hosts, and writes down what a bad step held.

Enters: a step's losses and gradient norms, as tensors. Leaves: observations that are the same on every rank, a stop
signal that any rank received, files about bad steps. Why it exists: a decision to go back must be taken by all ranks at
the same step, for one small collective per step and without making the host wait for the device: on CUDA a step's
numbers are read while the next one runs.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from data_pipes.dataset import SampleDataset
from data_pipes.hashing import Int64s
from data_pipes.loader import BatchPlan
from pretrain.guard import Observation, worst_micro_batches
from pretrain.parallel.dist import World
from pretrain.parallel.fragments import Fragments
from pretrain.readback import Readback

_MAX_NAMED = 64
# samples that an event of the journal names; the files name all
_MAX_DUMPS = 16
# bad steps per start whose images are written
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


class Evidence:
    """Files about bad steps, in a folder of the run: which samples, their losses, and the images of the worst."""

    def __init__(self, folder: Path, world: World, plan: BatchPlan, dataset: SampleDataset | None, dump: bool) -> None:
        """dataset: None: samples that have no positions cannot be found again."""
        self.folder, self.world, self.plan, self.dataset, self.dump = folder, world, plan, dataset, dump
        self._num_dumps = 0

    def collect(self, seen: Observation, losses: list[float]) -> dict[str, Any]:
        """Writes this rank's part of a bad step; returns what the journal shall say, on rank 0. A collective.

        losses: of this rank's micro-batches.
        """
        dumped = self.dump and self._num_dumps < _MAX_DUMPS
        self._num_dumps += 1
        folder = self.folder / f"step-{seen.step:08d}"
        problem, suspects = "", list[dict[str, Any]]()
        try:
            suspects = self._write(folder, seen, losses) if dumped and self.dataset is not None else []
        except (OSError, ValueError) as error:  # evidence must not end a run
            problem = f"{type(error).__name__}: {error}"
        everyone: list[Any] = [(suspects, problem)]
        if self.world.control is not None:
            everyone = [None] * self.world.size
            dist.gather_object((suspects, problem), everyone if self.world.is_main else None, 0, self.world.control)
        if not self.world.is_main:
            return {}
        found = [suspect for suspects, _ in everyone for suspect in suspects]
        if any(not math.isfinite(suspect["loss"]) for suspect in found):
            found = [suspect for suspect in found if not math.isfinite(suspect["loss"])]
        event = {
            "at_step": seen.step,
            "position": seen.position,
            "global_batch": self.plan.global_batch,
            "loss": seen.loss,
            "samples": [f"{suspect['shard']}:{suspect['key']}" for suspect in found[:_MAX_NAMED]],
            "num_samples": len(found),
        }
        problems = [problem for _, problem in everyone if problem]
        return event | ({"folder": str(folder)} if dumped else {}) | ({"problems": problems} if problems else {})

    def _write(self, folder: Path, seen: Observation, losses: list[float]) -> list[dict[str, Any]]:
        """One line per sample of this rank, one file of images per suspected micro-batch; returns their samples."""
        assert self.dataset is not None
        folder.mkdir(parents=True, exist_ok=True)
        batches = self.plan.micro_batches(seen.position)
        suspected, suspects = worst_micro_batches(losses), list[dict[str, Any]]()
        name = f"rank{self.world.rank:05d}"
        with open(folder / f"{name}.jsonl", "w") as file:
            for number, loss in enumerate(losses):
                rows = self._rows(positions := next(batches), loss)
                file.writelines(json.dumps(row | {"loss": _json_number(loss)}) + "\n" for row in rows)
                if number in suspected:
                    suspects += rows
                    self._save_images(folder / f"{name}-micro{number:03d}.safetensors", positions)
        return suspects

    def _rows(self, positions: Int64s, loss: float) -> list[dict[str, Any]]:
        assert self.dataset is not None
        collection, places = self.dataset.collection, self.dataset.request(positions).places
        return [
            {
                "position": position,
                "shard": collection.entry(place.shard).url,
                "key": self.dataset.reader.key(place.shard, place.sample),
                "loss": loss,
            }
            for position, place in zip(positions.tolist(), places, strict=True)
        ]

    def _save_images(self, path: Path, positions: Int64s) -> None:
        """The augmented images as they were trained on; made again, since they are a function of their positions."""
        assert self.dataset is not None
        batch = self.dataset.load(self.dataset.request(positions)).batch
        if batch is not None:
            tensors = {"images": batch.images, "labels": batch.labels, "positions": batch.positions}
            keys = {"keys": json.dumps(batch.keys)}
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, keys)


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
