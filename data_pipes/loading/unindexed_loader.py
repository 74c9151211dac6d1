"""The training data of one rank from shards that cannot be indexed (tar.gz): equal batches, endless.

Enters: names of shards, the plan of the batches, a position. Leaves: `Batch`es, with the surface of `Loader`. Why it
exists: such data can be tried, and trained on, before it is packed; for anything long, pack it: reading from front to
back costs the exact resume and most of the shuffling.

Promised: each rank gets equal batches for ever, whatever the shards hold. Each pass over the shards reads each of them
once, over all ranks. The same position, ranks, seed and shards give the same batches, whatever the number of workers. A
run that resumes at position P goes on with an order of its own, derived from (seed, P).
Not promised: that a resumed run sees the samples that the uninterrupted one would have seen, or each sample equally
often; nor the same samples on another number of ranks.
A damaged shard stops the run with its name. A bad sample is left out, counted and written down; the next one of the
stream takes its place.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from data_pipes.batch import Batch
from data_pipes.errors import BadDataError, SampleError
from data_pipes.loading.dataset import Extras
from data_pipes.loading.quarantine import BadSample, Quarantine
from data_pipes.loading.unindexed_stream import SampleStream
from data_pipes.loading.workers import single_threaded_pool
from data_pipes.order.hashing import hash64, hash_uniform
from data_pipes.shards.members import caption_of, label_of, metadata_of
from data_pipes.shards.reader import RawSample
from data_pipes.store.counters import Counters, source_counter

if TYPE_CHECKING:
    from data_pipes.batch import BatchPlan


_FORMAT = "tessera-unindexed-1"
"""Of the state in a checkpoint."""
_UNIFORM_TAG = 0x756E64786564
"""Tells the seed of the augmentation from those of the shuffling."""
_MIN_JUDGED_SAMPLES = 1000
"""Bad samples for one batch that stop a run under any limit, and samples that the limit is a fraction of, at least."""


class PreparedSample(NamedTuple):
    """One sample, ready for a batch."""

    tensor: Tensor
    label: int
    key: str
    caption: str | None
    metadata: dict[str, Any] | None


@dataclass(frozen=True)
class SampleMaker:
    """From a stored sample to the row of a batch."""

    make: Callable[[RawSample, Sequence[float]], Tensor]
    """The recipe; for a bad sample it raises SampleError."""
    num_uniforms: int
    """Uniform numbers that the recipe takes."""
    extras: Extras

    def __call__(self, raw: RawSample, uniforms: Sequence[float]) -> PreparedSample | SampleError:
        """The sample, or what is wrong with it."""
        try:
            label = label_of(raw, 0, self.extras.label_key or "")
            caption = caption_of(raw) if self.extras.captions else None
            metadata = metadata_of(raw) if self.extras.metadata else None
            return PreparedSample(self.make(raw, uniforms), label, raw.key, caption, metadata)
        except SampleError as error:
            return error
        except Exception as error:
            error.add_note(f"while loading {raw.key}")
            raise


class UnindexedLoader:
    """One rank's batches."""

    source_names: tuple[str, ...] = ("unindexed",)
    """Names of the data sets, in order."""
    samples_per_epoch = 0
    """Nobody knows."""

    def __init__(
        self,
        stream: SampleStream,
        maker: SampleMaker,
        plan: BatchPlan,
        *,
        workers: int = 0,
        prefetch: int = 2,
        max_bad_fraction: float = 0.01,
        quarantine_dir: Path | None = None,
        pin_memory: bool | None = None,
    ) -> None:
        """
        Args:
            stream: the samples of this rank.
            maker: what a sample becomes.
            plan: this rank's share of each step.
            workers: threads that prepare samples; 0: the calling thread does. One thread at a time reads the shards.
            prefetch: micro-batches prepared ahead, per worker.
            max_bad_fraction: of the samples consumed; more bad ones stop the run.
            quarantine_dir: gets rank00000.jsonl and so on; None: bad samples are only counted.
            pin_memory: whether batches are in page-locked memory; None: where CUDA is there.
        """
        self.stream, self.maker, self.plan = stream, maker, plan
        self.workers, self._ahead = workers, workers * prefetch * plan.micro_batch
        self._pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        path = None if quarantine_dir is None else quarantine_dir / f"rank{plan.rank:05d}.jsonl"
        self.bad = Quarantine(path, max_bad_fraction, _MIN_JUDGED_SAMPLES)
        self.counters = Counters()
        self._active: Generator[Batch] | None = None

    def wanted_shares(self, position: int) -> list[float]:
        """The share of each source that is asked for; empty, as there is one source."""
        return []

    def state(self, position: int) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        return {"format": _FORMAT, "position": position, "seed": self.stream.seed, "shards": _fingerprint(self.stream)}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuses the state of a checkpoint that belongs to other data.

        Raises:
            ValueError: the shards or the seed are not this run's.
        """
        expected = self.state(0)
        for name in ("format", "shards", "seed"):
            if state.get(name) != expected[name]:
                raise ValueError(
                    f"the checkpoint's data has {name} {state.get(name)!r}, this run's {expected[name]!r}: "
                    "data.unindexed.urls or data.order.seed changed; restore them, or start a new run from the weights"
                )

    def batches(self, position: int) -> Iterator[Batch]:
        """This rank's micro-batches, endless, as `Loader.batches`. Stops what an earlier call began.

        Args:
            position: samples consumed by all ranks so far.
        Raises:
            BadDataError: there are too many bad samples.
            ShardError: a shard is damaged.
            StorageError: a shard cannot be read.
            ValueError: the position is negative.
        """
        if position < 0:
            raise ValueError(f"the data position is {position}; expected 0 or more")
        self.close()
        self._active = self._batches(position)
        return self._active

    def close(self) -> None:
        """Stops the workers and closes the shards; `batches` starts again."""
        active, self._active = self._active, None
        if active is not None:
            active.close()

    def _batches(self, position: int) -> Generator[Batch]:
        prepared = self._prepared(position)
        try:
            for positions in self.plan.micro_batches(position):
                rows: list[PreparedSample] = []
                bad: list[BadSample] = []
                while len(rows) < len(positions):
                    shard, key, row = next(prepared)
                    if isinstance(row, PreparedSample):
                        rows.append(row)
                    else:
                        bad.append(BadSample(shard, key, row.cause, str(row), int(positions[len(rows)])))
                    if len(bad) > _MIN_JUDGED_SAMPLES:
                        self._give_up(len(rows), bad)
                self.bad.record(len(rows) + len(bad), bad)
                self._count(len(rows))
                batch = _stacked(rows, torch.from_numpy(positions), self.maker.extras)
                yield batch.pin_memory() if self._pin_memory else batch
        finally:
            prepared.close()

    def _give_up(self, num_rows: int, bad: list[BadSample]) -> None:
        self.bad.record(num_rows + len(bad), bad)
        first = bad[0]
        raise BadDataError(
            f"{len(bad):,} bad samples and {num_rows} good ones: a batch does not fill. The first: {first.key} in "
            f"{first.shard}: {first.error}. Check the shards, data.max_pixels and the model's channels"
        )

    def _prepared(self, position: int) -> Generator[tuple[str, str, PreparedSample | SampleError]]:
        """(shard, key, sample or what is wrong with it) in the order of the stream, whoever was quicker."""
        raws = self._with_uniforms(position)
        if self.workers == 0:
            for shard, raw, uniforms in raws:
                yield shard, raw.key, self.maker(raw, uniforms)
            return
        pool = single_threaded_pool(self.workers)
        try:
            submit = lambda item: (item[0], item[1].key, pool.submit(self.maker, item[1], item[2]))
            waiting: deque[tuple[str, str, Future[PreparedSample | SampleError]]] = deque(
                map(submit, islice(raws, self._ahead))
            )
            while waiting:
                shard, key, future = waiting.popleft()
                waiting.extend(map(submit, islice(raws, 1)))
                yield shard, key, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _with_uniforms(self, position: int) -> Iterator[tuple[str, RawSample, list[float]]]:
        """The stream, each sample with its uniform numbers: by its number in the stream, so that a bad one before it
        changes nothing.
        """
        seed = hash64(_UNIFORM_TAG, self.stream.seed, position, self.plan.rank)
        for number, (shard, raw) in enumerate(self.stream.samples(position)):
            yield shard, raw, hash_uniform(seed, [number], 0, self.maker.num_uniforms)[0].tolist()

    def _count(self, num_rows: int) -> None:
        self.counters.merge(self.stream.counters.take())
        self.counters.merge(self.stream.storage.counters.take())
        self.counters.merge({"batches": 1, "samples_loaded": num_rows, source_counter(0): num_rows})


def _stacked(rows: Sequence[PreparedSample], positions: Tensor, extras: Extras) -> Batch:
    first = rows[0].tensor
    images = torch.empty((len(rows), *first.shape), dtype=first.dtype)
    for image, row in zip(images, rows, strict=True):
        image.copy_(row.tensor)
    return Batch(
        images,
        torch.tensor([row.label for row in rows], dtype=torch.int64),
        positions,
        [row.key for row in rows],
        captions=[row.caption for row in rows] if extras.captions else None,
        metadata=[row.metadata for row in rows] if extras.metadata else None,
    )


def _fingerprint(stream: SampleStream) -> str:
    return hashlib.sha256("\n".join(stream.urls).encode()).hexdigest()
