"""The data order: which sample stands at which position, as a pure function.

Enters: the number of samples and bytes of each shard, a seed, four parameters. Leaves: for any positions, the places
(shard, sample) of their samples. Why it exists: the whole state of a run's data is one integer, which no number of
ranks, workers or samples per batch touches; and no memory is spent per sample, only per shard and per chunk.

Legend: P global position = epoch * N + p, of N samples; p position in the epoch; M chunks; S streams; g run.

1. A chunk is a row of neighbouring samples of one shard, about `chunk_bytes` long: the unit of I/O.
2. Each epoch lays the chunks end to end, in the order of a keyed permutation of their numbers. A place in that line is
   a slot, 0 <= slot < N.
3. The line is cut into S streams of equal length (the first N mod S are one sample longer).
4. Each stream is cut into windows of `window` slots; the slots of a window are permuted by a key of its own.
5. Positions go over the streams in turn, g at a time: row = p // g, stream = row mod S, offset in the stream
   = (row // S) * g + p mod g. The last round, where less than g samples are left in each stream, takes what is left;
   the longer streams' last samples end the epoch.

Both permutations are keyed 4-round Feistel networks (data_pipes.hashing), computed only for the positions asked for.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data_pipes.hashing import Int64s, feistel, hash64, hash_uniform, hash_words

__all__ = ["Located", "Order", "OrderConfig", "hash64", "hash_uniform"]

STATE_VERSION = 1
_PLAN_BLOCK = 1 << 20
# chunks permuted at a time while an epoch is planned: keeps the temporary arrays below 100 MB
_CHUNKS, _WINDOW, _SUBSTITUTE = 1, 2, 3
# what a hash is for: the same (seed, epoch) gives unrelated keys


@dataclass(frozen=True)
class OrderConfig:
    """The parameters of the order. Changing any of them in the middle of a run makes another order."""

    seed: int = 0
    # of the order and of the augmentation
    streams: int | None = None
    # S; None: chosen from the global batch at the run's start (see `with_streams`), then kept in the state
    run: int = 8
    # g, neighbouring positions from one stream; a batch of G samples draws from G / g streams
    window: int = 4096
    # samples shuffled together in a stream
    chunk_bytes: int = 8 << 20
    # bytes read together: a window holds window * (bytes of a sample) / chunk_bytes chunks

    def __post_init__(self) -> None:
        for name in ("streams", "run", "window", "chunk_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"data.order.{name} is {value}; expected 1 or more")

    def with_streams(self, num_samples: int, global_batch: int) -> OrderConfig:
        """The same parameters with S decided: 24 * G / g, so that the streams divide evenly over every usual number of
        ranks and workers, but never so many that a stream is shorter than one window: small data is shuffled whole.
        """
        if self.streams is not None:
            return self
        rows = max(1, global_batch // self.run)
        streams = max(1, min(24 * rows, num_samples // self.window))
        return replace(self, streams=streams - streams % rows if streams > rows else streams)


class Located(NamedTuple):
    """The places of B positions."""

    shard: Int64s  # [B]
    sample: Int64s  # [B], within the shard
    chunk: Int64s  # [B], number of the chunk, over all shards


class Order:
    """The order over one data set. Cheap to pickle (plans stay behind); may be used by several threads."""

    def __init__(
        self, samples_per_shard: ArrayLike, bytes_per_shard: ArrayLike, config: OrderConfig, fingerprint: str
    ) -> None:
        """samples_per_shard, bytes_per_shard: [shards], int64. fingerprint: of the data set; it enters the state only.

        Raises ValueError when `config.streams` is undecided or there is no sample.
        """
        if config.streams is None:
            raise ValueError("the order needs a number of streams; decide it with OrderConfig.with_streams")
        self.config, self.fingerprint = config, fingerprint
        self._samples = np.asarray(samples_per_shard, np.int64)
        size_bytes = np.asarray(bytes_per_shard, np.int64)
        self.num_samples = int(self._samples.sum())
        if self.num_samples == 0:
            raise ValueError("the data set has no sample; pack or index it again")
        self._chunks = np.minimum(np.maximum(1, -(-size_bytes // config.chunk_bytes)), self._samples)
        self._first_chunk = np.cumsum(self._chunks) - self._chunks
        self.num_chunks = int(self._chunks.sum())
        self._chunk_sizes: NDArray[np.int32] | None = None
        self._plans: OrderedDict[int, Int64s] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_chunk_sizes": None, "_plans": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def locate(self, positions: ArrayLike) -> Located:
        """The places of positions [B] (int64, >= 0, in any order and epoch)."""
        wanted = np.atleast_1d(np.asarray(positions, np.int64))
        if wanted.size and wanted.min() < 0:
            raise ValueError(f"data positions are 0 or more, found {int(wanted.min())}")
        epochs = wanted // self.num_samples
        found = Located(*(np.empty(len(wanted), np.int64) for _ in Located._fields))
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            located = self._locate_slots(epoch, self._slots(epoch, wanted[here] - epoch * self.num_samples))
            for target, values in zip(found, located, strict=True):
                target[here] = values
        return found

    def substitute(self, position: int, attempt: int) -> tuple[int, int]:
        """(shard, sample) that stands in for a bad sample; `attempt` = 1, 2, ... gives others.

        Chosen by hash from the same window, which is being read anyway; from the whole epoch where the window has no
        other sample. Never the bad sample itself, unless the data set has no other.
        """
        epoch, place = divmod(position, self.num_samples)
        stream, offset = self._stream_offsets(np.array([place], np.int64))
        first, size = self._window_bounds(stream, offset)
        start, count = int(first[0]), int(size[0])
        if count == 1:
            start, count = 0, self.num_samples
        own = int(self._slots(epoch, np.array([place], np.int64))[0])
        step = 1 + hash64(self.config.seed, epoch, _SUBSTITUTE, place, attempt) % max(1, count - 1)
        located = self._locate_slots(epoch, np.array([start + (own - start + step) % count], np.int64))
        return int(located.shard[0]), int(located.sample[0])

    def state(self, position: int) -> dict[str, int | str]:
        """All that is needed to go on from `position` (samples consumed by the trainer), as JSON."""
        return {"version": STATE_VERSION, "position": position, **self._identity()}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError, naming every field, when `state` was written under another order or data set."""
        expected = {"version": STATE_VERSION, **self._identity()}
        wrong = [
            f"{name} is {state.get(name)!r} in the checkpoint and {value!r} now"
            for name, value in expected.items()
            if state.get(name) != value
        ]
        position = state.get("position")
        if type(position) is not int or position < 0:
            wrong.append(f"position is {position!r}, expected an integer >= 0")
        if wrong:
            raise ValueError(
                f"the data order cannot continue from this checkpoint: {'; '.join(wrong)}. Restore the data set and "
                "data.order as they were, or start a new run from the checkpoint's weights"
            )

    @classmethod
    def from_state(
        cls,
        state: Mapping[str, Any],
        samples_per_shard: ArrayLike,
        bytes_per_shard: ArrayLike,
        config: OrderConfig,
        fingerprint: str,
    ) -> Order:
        """The order that wrote `state`; undecided streams are taken from it. Raises ValueError as `check_state`."""
        streams = state.get("streams")
        if config.streams is None and type(streams) is int and streams > 0:
            config = replace(config, streams=streams)
        elif config.streams is None:
            raise ValueError(f"the data state has no valid number of streams (found {streams!r}); it is damaged")
        order = cls(samples_per_shard, bytes_per_shard, config, fingerprint)
        order.check_state(state)
        return order

    def _identity(self) -> dict[str, int | str]:
        config = self.config
        return {
            "fingerprint": self.fingerprint,
            "seed": config.seed,
            "streams": self._num_streams,
            "run": config.run,
            "window": config.window,
            "chunk_bytes": config.chunk_bytes,
        }

    @property
    def _num_streams(self) -> int:
        assert self.config.streams is not None
        return self.config.streams

    def _stream_offsets(self, places: Int64s) -> tuple[Int64s, Int64s]:
        """Step 5: positions in the epoch -> (stream, offset in the stream), each [B]."""
        streams, run = self._num_streams, self.config.run
        length = self.num_samples // streams
        full = length // run * run  # of each stream, dealt in whole runs
        rest = length - full
        row = places // run
        stream, offset = row % streams, row // streams * run + places % run
        tail = places - full * streams
        in_rest = (tail >= 0) & (tail < rest * streams)
        in_last = tail >= rest * streams
        stream = np.where(in_rest, tail // max(rest, 1), np.where(in_last, tail - rest * streams, stream))
        offset = np.where(in_rest, full + tail % max(rest, 1), np.where(in_last, length, offset))
        return stream, offset

    def _window_bounds(self, stream: Int64s, offset: Int64s) -> tuple[Int64s, Int64s]:
        """(first slot, number of slots) of the windows that hold these offsets, each [B]."""
        length, longer = divmod(self.num_samples, self._num_streams)
        begin = stream * length + np.minimum(stream, longer)
        start = offset // self.config.window * self.config.window
        return begin + start, np.minimum(self.config.window, length + (stream < longer) - start)

    def _slots(self, epoch: int, places: Int64s) -> Int64s:
        """Steps 3 to 5: positions in the epoch -> slots."""
        stream, offset = self._stream_offsets(places)
        first, size = self._window_bounds(stream, offset)
        window = offset // self.config.window
        return first + feistel(
            offset - window * self.config.window, size, hash_words(self.config.seed, epoch, _WINDOW, stream, window)
        )

    def _locate_slots(self, epoch: int, slots: Int64s) -> Located:
        """Steps 1 and 2: slots -> places."""
        starts = self._plan(epoch)
        rank = np.searchsorted(starts, slots, side="right") - 1
        chunk = feistel(rank, self.num_chunks, hash_words(self.config.seed, epoch, _CHUNKS))
        shard = np.searchsorted(self._first_chunk, chunk, side="right") - 1
        within = chunk - self._first_chunk[shard]
        first = self._samples[shard] * within // self._chunks[shard]
        return Located(shard, first + slots - starts[rank], chunk)

    def _plan(self, epoch: int) -> Int64s:
        """[M]: the first slot of each chunk, in the order of the epoch. Two epochs are kept, as a batch may span them.

        12.8 million chunks (2e9 samples of 50 KB) take about 2 s and 100 MB.
        """
        with self._lock:
            if epoch in self._plans:
                self._plans.move_to_end(epoch)
                return self._plans[epoch]
            if self._chunk_sizes is None:
                self._chunk_sizes = self._sizes_of_chunks()
            while len(self._plans) > 1:
                self._plans.popitem(last=False)
            starts = np.zeros(self.num_chunks + 1, np.int64)
            key = hash_words(self.config.seed, epoch, _CHUNKS)
            for begin in range(0, self.num_chunks, _PLAN_BLOCK):
                ranks = np.arange(begin, min(begin + _PLAN_BLOCK, self.num_chunks))
                starts[ranks + 1] = self._chunk_sizes[feistel(ranks, self.num_chunks, key)]
            self._plans[epoch] = np.cumsum(starts, out=starts)[:-1]
            return self._plans[epoch]

    def _sizes_of_chunks(self) -> NDArray[np.int32]:
        """[M]: samples of each chunk. Chunk c of the k chunks of a shard of n samples begins at sample n * c // k."""
        per_shard, chunks = np.repeat(self._samples, self._chunks), np.repeat(self._chunks, self._chunks)
        within = np.arange(self.num_chunks) - np.repeat(self._first_chunk, self._chunks)
        sizes = per_shard * (within + 1) // chunks - per_shard * within // chunks
        return np.asarray(sizes, np.int32)
