"""The training data of one rank: equal micro-batches, endless, from any position.

Enters: a data set, the plan of the batches, a position. Leaves: `Batch`es in uint8; the trainer moves them to the
device and normalises there. Why it exists: the trainer's data state is one integer, the samples consumed by all ranks.

    dataset = open_dataset(config, image_size=(224, 224), channels=3, global_batch=plan.global_batch, state=None)
    loader = Loader(dataset, plan, config, quarantine_dir=run_dir / "quarantine")
    for batch in loader.batches(position): ...      # plan.accumulate batches make one optimizer step
    checkpoint["data"] = loader.state(position)     # position grows by global_batch per step
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from data_pipes.batch import Batch, BatchPlan
from data_pipes.config import DataConfig
from data_pipes.loading.dataset import Request, SampleDataset
from data_pipes.loading.prefetch import Prefetcher
from data_pipes.loading.quarantine import Quarantine
from data_pipes.loading.unindexed_loader import UnindexedLoader
from data_pipes.loading.workers import make_workers
from data_pipes.open import open_dataset, open_unindexed
from data_pipes.order.mixture import MixtureOrder
from data_pipes.shards.collection import Collection
from data_pipes.store.counters import Counters, source_counter

_LOCATED_TOGETHER = 256
"""Positions: alone, one takes 25 us, among so many 2."""


class Loader:
    """One rank's batches."""

    def __init__(
        self,
        dataset: SampleDataset,
        plan: BatchPlan,
        config: DataConfig,
        *,
        quarantine_dir: Path | None = None,
        pin_memory: bool | None = None,
    ) -> None:
        """
        Args:
            dataset: what is loaded.
            plan: this rank's share of each step.
            config: number and kind of the workers, and the limit of bad samples.
            quarantine_dir: gets rank00000.jsonl and so on; None: bad samples are only counted.
            pin_memory: whether batches are in page-locked memory; None: where CUDA is there.
        """
        self.dataset, self.plan = dataset, plan
        pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self._workers = make_workers(dataset, config.workers, config.worker_kind, config.prefetch, pin_memory)
        path = None if quarantine_dir is None else quarantine_dir / f"rank{plan.rank:05d}.jsonl"
        self.bad = Quarantine(path, config.max_bad_fraction, dataset.collection.num_samples)
        self.counters = Counters()
        self._active: Generator[Batch] | None = None

    @property
    def samples_per_epoch(self) -> int:
        """Samples of the data set; of a mixture, of all sources together."""
        return self.dataset.order.num_samples

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names of the data sets, in order."""
        return self.dataset.collection.names

    def wanted_shares(self, position: int) -> list[float]:
        """The share of each source that a mixture asks for at a position; empty for a single data set."""
        order = self.dataset.order
        return order.wanted_shares(position) if isinstance(order, MixtureOrder) else []

    def state(self, position: int) -> dict[str, Any]:
        """All that is needed to go on from `position` (samples consumed by the trainer), as JSON."""
        return dict(self.dataset.order.state(position))

    def batches(self, position: int) -> Iterator[Batch]:
        """This rank's micro-batches, endless: `plan.accumulate` of them for the step over [position, position + G),
        then those of the next step. Stops what an earlier call began.

        Errors of a batch come in its place.

        Args:
            position: samples consumed by all ranks so far.
        Raises:
            BadDataError: there are too many bad samples.
            ShardError: a shard was changed or cannot be read.
            RuntimeError: a worker process died.
            ValueError: the position is negative.
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
        prefetcher = None
        if self.dataset.reader.cache is not None:
            on_this_node = partial(self.plan.on_this_node, start=position)
            prefetcher = Prefetcher(self.dataset, self.plan.micro_batches(position), on_this_node, position)
        try:
            for number, loaded in enumerate(answers):
                self.counters.merge(loaded.sums)
                self.counters.add("ready_batches", self._workers.num_ready())
                self.counters.add("batches")
                if prefetcher is not None:
                    prefetcher.advance(position + number // self.plan.accumulate * self.plan.global_batch)
                    self.counters.merge(prefetcher.reader.take_sums())
                self._count(loaded.batch)
                self.bad.record(0 if loaded.batch is None else len(loaded.batch.keys), loaded.bad)
                if loaded.error is not None:
                    raise loaded.error
                assert loaded.batch is not None
                yield loaded.batch
        finally:
            answers.close()
            if prefetcher is not None:
                prefetcher.close()

    def _count(self, batch: Batch | None) -> None:
        if batch is not None and batch.sources is not None:
            for source, count in enumerate(torch.bincount(batch.sources).tolist()):
                self.counters.add(source_counter(source), count)

    def _requests(self, position: int) -> Iterator[Request]:
        together = -(-_LOCATED_TOGETHER // self.plan.micro_batch)
        ahead = self.plan.micro_batches(position)
        while True:
            yield from self.dataset.requests(list(islice(ahead, together)))


def open_loader(
    config: DataConfig,
    plan: BatchPlan,
    *,
    image_size: tuple[int, int],
    channels: int,
    state: Mapping[str, Any] | None,
    collection: Collection | None = None,
    quarantine_dir: Path | None = None,
) -> Loader | UnindexedLoader:
    """The loader that a configuration asks for; arguments as `open_dataset`, `open_unindexed` and `Loader`."""
    if config.unindexed is not None:
        return open_unindexed(config, plan, image_size, channels, state, quarantine_dir)
    dataset = open_dataset(
        config,
        image_size=image_size,
        channels=channels,
        global_batch=plan.global_batch,
        state=state,
        collection=collection,
    )
    return Loader(dataset, plan, config, quarantine_dir=quarantine_dir)
