"""The training data's loader by itself: shards in, batches out, in the order and with the resume that runs have."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from data_pipes.batch import Batch, BatchPlan
from data_pipes.config import DataConfig
from data_pipes.loader import Loader
from data_pipes.loader import open_loader as open_rank
from data_pipes.loading.unindexed_loader import UnindexedLoader
from pretrain.config import ConfigError, RunConfig, load_typed
from pretrain.parallel.launch import Launch
from pretrain.preflight import plan_batches


class Batches:
    """An iterable of this rank's batches. Use it as a context manager, or close it, where workers were asked for."""

    def __init__(self, loader: Loader | UnindexedLoader, plan: BatchPlan, epochs: int | None, position: int) -> None:
        """
        Args:
            loader: of this rank.
            plan: its share of each step.
            epochs: passes of each iteration; None: it does not end.
            position: samples consumed by all ranks before the first batch.
        """
        self.loader, self.plan, self.epochs = loader, plan, epochs
        self.position = position
        """Samples consumed by all ranks so far, in whole steps; `open_loader(..., position=...)` goes on from here."""

    def __len__(self) -> int:
        """Batches of a whole iteration.

        Raises:
            TypeError: it does not end, or nobody knows.
        """
        if self.epochs is None or isinstance(self.loader, UnindexedLoader):
            raise TypeError("these batches do not end, or nobody knows where: there is no length")
        return self.epochs * self.loader.samples_per_epoch // self.plan.global_batch * self.plan.accumulate

    def __iter__(self) -> Iterator[Batch]:
        """Batches from `position` on. Only whole ones: an epoch's last samples come with the next epoch's first."""
        limit = None if self.epochs is None else len(self)
        try:
            for number, batch in enumerate(islice(self.loader.batches(self.position), limit), start=1):
                if number % self.plan.accumulate == 0:
                    self.position += self.plan.global_batch
                yield batch
        finally:
            self.loader.close()

    def close(self) -> None:
        """Stops the workers."""
        self.loader.close()

    def __enter__(self) -> Batches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_loader(
    source: RunConfig | str | Path,
    *,
    batch_size: int | None = None,
    image_size: tuple[int, int] | None = None,
    channels: int = 3,
    epochs: int | None = 1,
    position: int = 0,
    **data: Any,
) -> Batches:
    """Opens training data: shuffled, augmented, the same for every number of workers and ranks.

    Args:
        source: a run's configuration, whose data, batch and picture size are taken; or the folder or URL of a data set.
        batch_size: with a data set: samples per batch and rank.
        image_size: with a data set: height and width of the pictures, in pixels.
        channels: with a data set: of the pictures.
        epochs: passes of an iteration; None: it does not end.
        position: samples consumed by all ranks before.
        data: with a data set: the other keys of a configuration's `data`, such as `workers=4`, `flip=0.0`,
            `crop_scale=(1.0, 1.0)` or `order={"seed": 1}`.

    Raises:
        ValueError: a mistake in the arguments or the data.
    """
    launch = Launch.from_environment()
    if isinstance(source, RunConfig):
        if batch_size is not None or image_size is not None or data:
            raise ConfigError("a run's configuration has its own batch, size and data: give it alone, or override it")
        with torch.device("meta"):
            objective = source.build_objective()
        config, plan = source.data, plan_batches(source.train, launch)
        image_size, channels = objective.image_size, objective.in_channels
    else:
        if batch_size is None or image_size is None:
            raise ConfigError("a data set needs batch_size=NUMBER and image_size=(HEIGHT, WIDTH)")
        config = load_typed(DataConfig, {"train": str(source), **data})
        plan = BatchPlan(batch_size * launch.size, batch_size, launch.rank, launch.size, launch.ranks_per_node)
    loader = open_rank(config, plan, image_size=image_size, channels=channels, state=None)
    return Batches(loader, plan, epochs, position)
