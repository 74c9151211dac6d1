"""Files about bad steps: which samples they held, their losses, and the images of the worst.

Enters: a bad step, as all ranks see it. Leaves: `RUN/guard/step-00001200/`, and an event for the journal. Why it
exists: whoever looks into a spoiled run wants to see the pictures that spoiled it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file

from data_pipes.batch import BatchPlan
from data_pipes.loading.dataset import SampleDataset
from data_pipes.order.hashing import Int64s
from pretrain.guard.guard import Observation, worst_micro_batches
from pretrain.parallel.world import World

_MAX_NAMED = 64
"""Samples that an event of the journal names; the files name all."""
_MAX_DUMPS = 16
"""Bad steps per start whose images are written."""


class Evidence:
    """Files about bad steps, in a folder of the run: which samples, their losses, and the images of the worst."""

    def __init__(self, folder: Path, world: World, plan: BatchPlan, dataset: SampleDataset | None, dump: bool) -> None:
        """Writes nothing yet.

        Args:
            folder: gets a folder for each bad step.
            world: the processes.
            plan: how a step's samples are divided.
            dataset: loads the samples again; None: they have no positions, so they cannot be found again.
            dump: whether files are written at all.
        """
        self.folder, self.world, self.plan, self.dataset, self.dump = folder, world, plan, dataset, dump
        self._num_dumps = 0

    def collect(self, seen: Observation, losses: list[float]) -> dict[str, Any]:
        """Writes this rank's part of a bad step. A collective.

        Args:
            seen: the step.
            losses: of this rank's micro-batches.

        Returns:
            What the journal shall say, on rank 0; empty on the others.
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
