"""Validation loss and the pictures of a run: the first samples of the validation set, centre-cropped, always the same.

Every rank runs the same number of forward passes (sharded models gather weights in them), and each sample counts once:
full global batches are split over ranks, the rest is run by all and counted by rank 0.
Legend: B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from data_pipes.batch import Batch, BatchPlan
from data_pipes.config import DataConfig
from data_pipes.sequential.clips import SequentialClips
from data_pipes.sequential.pictures import SequentialImages
from data_pipes.shards.manifest import Manifest
from data_pipes.transforms.image import EvalTransform
from pretrain.config import RunConfig
from pretrain.objectives.base import Objective
from pretrain.parallel.strategy import Strategy
from pretrain.parallel.world import World
from pretrain.preflight import TrainingData
from pretrain.report.picture_strips import save_films, save_pictures
from pretrain.signals import StopRequest
from pretrain.watchdog.watchdog import Watchdog


def open_samples(config: DataConfig, manifest: Manifest, objective: Objective) -> SequentialImages | SequentialClips:
    """A data set as the objective looks at it: the centre of each picture, or of the clip in a video's middle."""
    if config.video is not None:
        return SequentialClips(
            manifest,
            config.video,
            objective.image_size,
            channels=objective.in_channels,
            max_pixels=config.max_pixels,
            label_key=config.label_key,
            image_member=config.image_member,
            storage=config.storage,
        )
    return SequentialImages(
        manifest,
        EvalTransform(objective.image_size),
        channels=objective.in_channels,
        bit_depth=config.bit_depth,
        max_pixels=config.max_pixels,
        label_key=config.label_key,
        image_member=config.image_member,
        storage=config.storage,
    )


def open_validator(
    config: RunConfig, data: TrainingData, plan: BatchPlan, objective: Objective, world: World
) -> Validator | None:
    """What looks at the run's validation data, or draws training data where there is none; None where neither has a
    fixed order.
    """
    if data.preview is None:
        return None
    samples, train = open_samples(config.data, data.preview, objective), config.train
    num_measured = 0 if data.val is None else min(train.val_samples or len(samples), len(samples))
    return Validator(samples, num_measured, plan.micro_batch, train.num_pictures, world, config.run_dir)


@dataclass(frozen=True)
class Preview:
    """What a look at the validation data found."""

    metrics: dict[str, float]
    """By name, `val/<name>`."""
    files: list[Path]
    """Pictures and films that rank 0 wrote; the folder of each is that of its artifact, too."""


class Validator:
    """Runs an objective's `validate` and `pictures` on fixed samples."""

    def __init__(
        self,
        samples: SequentialImages | SequentialClips,
        num_samples: int,
        micro_batch: int,
        num_pictures: int,
        world: World,
        run_dir: Path | None = None,
    ) -> None:
        """Loads nothing yet.

        Args:
            samples: in a fixed order.
            num_samples: how many of them are measured, from the first on; 0: none.
            micro_batch: samples per rank and pass.
            num_pictures: how many of them are drawn, from the first on; 0: none.
            world: the processes.
            run_dir: gets the pictures; only `look` needs it.
        """
        self.samples = samples
        self.num_samples = min(num_samples, len(samples))
        self.micro_batch = micro_batch
        self.num_pictures = min(num_pictures, len(samples))
        self.world, self.run_dir = world, run_dir
        self._pictures: Batch | None = None

    def look(
        self, objective: Objective, strategy: Strategy, step: int, stop: StopRequest, watchdog: Watchdog
    ) -> Preview | None:
        """Measures and draws. A collective.

        Args:
            objective: prepared by `strategy`.
            strategy: gives the precision of forward passes.
            step: optimizer steps done.
            stop: a signal ends it between two batches.
            watchdog: is told of each batch.

        Returns:
            What was found; None: a rank got a signal.
        """
        should_stop = partial(_asked_to_stop, self.world, step, stop, watchdog)
        metrics = self.run(objective, strategy, step, should_stop) if self.num_samples else {}
        if should_stop():
            return None
        assert self.run_dir is not None
        return Preview(metrics, self.draw(objective, strategy, self.run_dir, step))

    def run(
        self, objective: Objective, strategy: Strategy, step: int, should_stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float]:
        """Means over the validation samples. A collective.

        Args:
            objective: prepared by `strategy`.
            strategy: gives the precision of forward passes.
            step: optimizer steps done.
            should_stop: asked before each batch, with the same answer on every rank.

        Returns:
            Metrics by name, `val/<name>`; empty where it was asked to stop.
        """
        sums: dict[str, Tensor] = {}
        with evaluating(objective), torch.no_grad():
            for batch, counts in self._batches():
                if should_stop():
                    return {}
                with strategy.autocast():
                    metrics = objective.validate(batch, step)
                if counts:
                    for name, value in metrics.items():
                        weighted = value.double() * len(batch.positions)
                        sums[name] = sums[name] + weighted if name in sums else weighted
        names = sorted(self.world.broadcast(sorted(sums)))
        local = torch.tensor([float(sums[name]) if name in sums else 0.0 for name in names], dtype=torch.float64)
        totals = self.world.sum(local).tolist()
        return {f"val/{name}": total / self.num_samples for name, total in zip(names, totals, strict=True)}

    def draw(self, objective: Objective, strategy: Strategy, run_dir: Path, step: int) -> list[Path]:
        """Saves the objective's views of the first samples: pictures/step-*.png, and of clips films/step-*.gif.

        A collective; rank 0 writes. Returns the files; the folder of each is that of its artifact, too.
        """
        if not self.num_pictures:
            return []
        if self._pictures is None:
            self._pictures = self._load(list(range(self.num_pictures)))
        with evaluating(objective), torch.no_grad(), strategy.autocast():
            pictures, films = objective.pictures(self._pictures), objective.films(self._pictures)
        if not self.world.is_main:
            return []
        saved = [save_pictures(pictures, run_dir / "pictures" / f"step-{step:08d}.png")]
        return [*saved, save_films(films, run_dir / "films" / f"step-{step:08d}.gif")] if films else saved

    def _batches(self) -> Iterator[tuple[Batch, bool]]:
        """This rank's batches, and whether this rank counts them."""
        share = self.micro_batch * self.world.size
        full = self.num_samples // share * share
        for begin in range(self.world.rank * self.micro_batch, full, share):
            yield self._load(list(range(begin, begin + self.micro_batch))), True
        for begin in range(full, self.num_samples, self.micro_batch):
            yield self._load(list(range(begin, min(begin + self.micro_batch, self.num_samples)))), self.world.is_main

    def _load(self, indices: list[int]) -> Batch:
        items = [self.samples[index] for index in indices]
        batch = Batch(
            images=torch.stack([image for image, _ in items]),  # of videos: [B, 1, C, T, H, W]
            labels=torch.tensor([label for _, label in items], dtype=torch.int64),
            positions=torch.tensor(indices, dtype=torch.int64),
            keys=[str(index) for index in indices],
        )
        return batch.to(self.world.device)


def _asked_to_stop(world: World, step: int, stop: StopRequest, watchdog: Watchdog) -> bool:
    watchdog.beat("validate", step)
    return stop.on_any_rank(world)


@contextmanager
def evaluating(objective: Objective) -> Iterator[None]:
    """Puts the players in evaluation mode for a while."""
    for module in objective.players.values():
        module.eval()
    try:
        yield
    finally:
        for module in objective.players.values():
            module.train()
