"""The training data of one rank: equal micro-batches, endless, from any position.

Enters: a data set, the plan of the batches, a position. Leaves: `Batch`es in uint8; the trainer moves them to the
device and normalises there. Why it exists: the trainer's data state is one integer, the samples consumed by all ranks.

    dataset = open_dataset(config, image_size=(224, 224), channels=3, global_batch=plan.global_batch, state=None)
    loader = Loader(dataset, plan, config, quarantine_dir=run_dir / "quarantine")
    for batch in loader.batches(position): ...      # plan.accumulate batches make one optimizer step
    checkpoint["data"] = dataset.order.state(position)      # position grows by global_batch per step
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from data_pipes.dataset import Batch, ImageDataset, Request, Timings
from data_pipes.decode import DEFAULT_MAX_PIXELS
from data_pipes.image import TrainTransform
from data_pipes.manifest import Manifest
from data_pipes.order import Order, OrderConfig
from data_pipes.quarantine import BadDataError, BadSample, Quarantine
from data_pipes.workers import make_workers

__all__ = ["BadDataError", "BadSample", "Batch", "BatchPlan", "DataConfig", "ImageDataset", "Loader", "open_dataset"]


@dataclass(frozen=True)
class DataConfig:
    """Where the pictures come from and how they are loaded. Size and channels belong to the model."""

    train: str = "???"
    # folder of the training data set: the one with manifest.json
    val: str | None = None
    # folder of the validation data set; None: no validation
    workers: int = 0
    # per rank; 0: the training thread loads, when it needs a batch
    worker_kind: Literal["thread", "process"] = "thread"
    # threads cost less CPU; processes help where many workers would queue for Python's lock
    prefetch: int = 2
    # micro-batches loaded ahead, per worker
    max_bad_fraction: float = 0.01
    # of the samples consumed by a rank in this run; more bad samples stop the run
    order: OrderConfig = field(default_factory=OrderConfig)
    # see OrderConfig
    crop_scale: tuple[float, float] = (0.2, 1.0)
    # area of the random crop, as a fraction of the picture
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    # width / height of the random crop
    flip: float = 0.5
    # probability of a left-right flip; 0: never
    max_pixels: int = DEFAULT_MAX_PIXELS
    # height * width of a picture, read from its header; larger ones count as bad
    bit_depth: int = 8
    # bits per channel of the batches, 8 or 16


@dataclass(frozen=True)
class BatchPlan:
    """How the samples of an optimizer step are divided."""

    global_batch: int
    # samples per optimizer step, over all ranks and micro-batches
    micro_batch: int
    # samples per rank and forward pass
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} of {self.world_size} ranks; expected 0 <= rank < world size")
        if self.global_batch < 1 or self.micro_batch < 1:
            raise ValueError(
                f"global_batch is {self.global_batch} and micro_batch {self.micro_batch}; expected 1 or more of each"
            )
        per_pass = self.world_size * self.micro_batch
        if self.global_batch % per_pass:
            below = self.global_batch // per_pass * per_pass
            raise ValueError(
                f"global_batch {self.global_batch} is not a multiple of ranks x micro_batch = {self.world_size} x "
                f"{self.micro_batch} = {per_pass}; the nearest that are: {f'{below} and ' if below else ''}"
                f"{below + per_pass}"
            )

    @property
    def accumulate(self) -> int:
        """Micro-batches per rank and optimizer step."""
        return self.global_batch // (self.world_size * self.micro_batch)

    def micro_batch_starts(self, position: int) -> Iterator[int]:
        """First position of each micro-batch of this rank, endless, from the step that begins at `position`."""
        while True:
            first = position + self.rank * (self.global_batch // self.world_size)
            for number in range(self.accumulate):
                yield first + number * self.micro_batch
            position += self.global_batch


def open_dataset(
    config: DataConfig,
    *,
    image_size: tuple[int, int],
    channels: int,
    global_batch: int,
    state: Mapping[str, Any] | None = None,
) -> ImageDataset:
    """The training data set. state: of the checkpoint that is resumed, as Order.state wrote it; None: a new run, in
    which `global_batch` decides the number of streams. Raises ValueError, also when the state does not fit the data.
    """
    if config.max_pixels > 2 * DEFAULT_MAX_PIXELS:
        raise ValueError(f"data.max_pixels is {config.max_pixels:,}; PIL reads at most {2 * DEFAULT_MAX_PIXELS:,}")
    if config.train in ("", "???"):
        raise ValueError("data.train is missing: name the folder of a data set, made with `tessera pack SRC OUT`")
    transform = TrainTransform(image_size, config.crop_scale, config.crop_ratio, config.flip)
    manifest = Manifest.load(config.train)
    samples = [shard.num_samples for shard in manifest.shards]
    size_bytes = [shard.size_bytes for shard in manifest.shards]
    if state is None:
        decided = config.order.with_streams(manifest.num_samples, global_batch)
        order = Order(samples, size_bytes, decided, manifest.fingerprint)
    else:
        order = Order.from_state(state, samples, size_bytes, config.order, manifest.fingerprint)
    return ImageDataset(
        manifest, order, transform, channels=channels, bit_depth=config.bit_depth, max_pixels=config.max_pixels
    )


class Loader:
    """One rank's batches."""

    def __init__(
        self,
        dataset: ImageDataset,
        plan: BatchPlan,
        config: DataConfig,
        *,
        quarantine_dir: Path | None = None,
        pin_memory: bool | None = None,
    ) -> None:
        """quarantine_dir: gets rank00000.jsonl and so on. pin_memory: None: where CUDA is there."""
        self.dataset, self.plan = dataset, plan
        pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self._workers = make_workers(dataset, config.workers, config.worker_kind, config.prefetch, pin_memory)
        path = None if quarantine_dir is None else quarantine_dir / f"rank{plan.rank:05d}.jsonl"
        self.bad = Quarantine(path, config.max_bad_fraction, dataset.manifest.num_samples)
        self.timings = Timings()
        self._active: Generator[Batch] | None = None

    def batches(self, position: int) -> Iterator[Batch]:
        """This rank's micro-batches, endless: `plan.accumulate` of them for the step over [position, position + G),
        then those of the next step. Stops what an earlier call began.

        Raises BadDataError (too many bad samples), ShardError (a shard changed or unreadable), RuntimeError (a worker
        process died), in the place of the batch concerned.
        """
        if position < 0:
            raise ValueError(f"the data position is {position}; expected 0 or more")
        self.close()
        self._active = self._consumed(position)
        return self._active

    def close(self) -> None:
        """Stops the workers; `batches` starts them again."""
        active, self._active = self._active, None
        if active is not None:
            active.close()

    def _consumed(self, position: int) -> Generator[Batch]:
        answers = self._workers.run(self._requests(position))
        try:
            for loaded in answers:
                self.timings.add(loaded.timings)
                self.bad.record(0 if loaded.batch is None else len(loaded.batch.keys), loaded.bad)
                if loaded.error is not None:
                    raise loaded.error
                assert loaded.batch is not None
                yield loaded.batch
        finally:
            answers.close()

    def _requests(self, position: int) -> Iterator[Request]:
        for first in self.plan.micro_batch_starts(position):
            yield self.dataset.request(np.arange(first, first + self.plan.micro_batch, dtype=np.int64))
