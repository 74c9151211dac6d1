"""The data order: which sample is at which position, as a pure function.

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

Both permutations are keyed 4-round Feistel networks (data_pipes.order.hashing), computed only for the positions asked
for.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from data_pipes.bounds import bounded
from data_pipes.order.epoch_plan import ChunkTable, Counts, EpochPlan
from data_pipes.order.hashing import Int64s, feistel, feistel_inverse, hash64, hash_uniform, hash_words

__all__ = ["NEVER", "ChunkUse", "Located", "Order", "OrderConfig", "hash64", "hash_uniform"]

STATE_VERSION = 1
_STREAMS_PER_RUN = 4
"""Streams for each run of a batch. At 1e9 samples and a batch of 16,384 over 128 nodes, 4 of them keep 27 GB of chunks
in use per node; 24 would keep 163 GB."""
NEVER = int(np.iinfo(np.int64).max)
"""The position of what does not come again."""
_PLANS = 3
"""Plans that are kept: of the trainer's epoch, of the next one when a batch spans both, and one more for a look ahead
from there."""
_CHUNKS, _WINDOW, _SUBSTITUTE = 1, 2, 3
"""What a hash is for: so the same (seed, epoch) gives unrelated keys."""


@dataclass(frozen=True)
class OrderConfig:
    """The parameters of the order. Changing any of them in the middle of a run makes another order."""

    seed: int = bounded(0, least=0, most=2**53)
    """Seed of the order and of the augmentation."""
    streams: int | None = bounded(None, least=1)
    """Number of streams (S); null chooses it from the global batch at the run's start (see `with_streams`), and keeps
    it in the state."""
    run: int = bounded(8, least=1)
    """Neighbouring positions from one stream (g); a batch of G samples draws from G / g streams."""
    window: int = bounded(4096, least=1)
    """Samples shuffled together in a stream."""
    chunk_bytes: int = bounded(8 << 20, least=1)
    """Bytes read together: a window holds window * (bytes of a sample) / chunk_bytes chunks."""

    def __post_init__(self) -> None:
        for name in ("streams", "run", "window", "chunk_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"data.order.{name} is {value}; expected 1 or more")

    def with_streams(self, num_samples: int, global_batch: int) -> OrderConfig:
        """The same parameters with S decided: 4 * G / g, a multiple of the runs of a batch, so that each stream is read
        by one rank; but never so many that a stream is shorter than one window: small data is shuffled whole.

        More streams shuffle over more samples at once (S * window), and need a larger cache for chunks in use.

        Args:
            num_samples: of the data set.
            global_batch: G, samples per optimizer step over all ranks.
        """
        if self.streams is not None:
            return self
        rows = max(1, global_batch // self.run)
        streams = max(1, min(_STREAMS_PER_RUN * rows, num_samples // self.window))
        return replace(self, streams=streams - streams % rows if streams > rows else streams)


class Located(NamedTuple):
    """The places of B positions."""

    shard: Int64s
    """Number of the shard, counted over all sources, [B]."""
    sample: Int64s
    """Number of the sample in its shard, [B]."""
    chunk: Int64s
    """Number of the chunk, counted over all shards, [B]."""
    source: Int64s
    """Number of the source, [B]; 0 where there is only one."""


class ChunkUse(NamedTuple):
    """One pass over a chunk; both fields are NEVER when there is none any more."""

    first: int
    """Global position of the first of its samples."""
    last: int
    """Global position of the last of its samples."""


class Order:
    """The order over one data set. Cheap to pickle (plans stay behind); may be used by several threads."""

    def __init__(
        self, samples_per_shard: ArrayLike, bytes_per_shard: ArrayLike, config: OrderConfig, fingerprint: str
    ) -> None:
        """Divides the shards into chunks; plans of epochs are made when they are first needed.

        Args:
            samples_per_shard: [shards], int64.
            bytes_per_shard: [shards], int64.
            config: the parameters; `streams` must be decided.
            fingerprint: of the data set; it enters the state only.

        Raises:
            ValueError: `config.streams` is undecided, or there is no sample.
        """
        if config.streams is None:
            raise ValueError("the order needs a number of streams; decide it with OrderConfig.with_streams")
        self.config, self.fingerprint = config, fingerprint
        self._samples = np.asarray(samples_per_shard, np.int64)
        size_bytes = np.asarray(bytes_per_shard, np.int64)
        self.num_samples = int(self._samples.sum())
        if self.num_samples == 0:
            raise ValueError("the data set has no sample; pack or index it again")
        chunks_per_shard = np.minimum(np.maximum(1, -(-size_bytes // config.chunk_bytes)), self._samples)
        self._table = ChunkTable(self._samples, chunks_per_shard)
        self.num_chunks = self._table.num_chunks
        self._start_planning()

    def _start_planning(self) -> None:
        self._chunk_sizes: Counts | None = None
        self._plans: OrderedDict[int, EpochPlan] = OrderedDict()
        self._plans_lock, self._planning_lock = threading.Lock(), threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        left = ("_chunk_sizes", "_plans", "_plans_lock", "_planning_lock")
        return {name: value for name, value in self.__dict__.items() if name not in left}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_planning()

    @property
    def num_shards(self) -> int:
        """How many shards the data set has."""
        return len(self._samples)

    def locate(self, positions: ArrayLike) -> Located:
        """The places of positions [B] (int64, >= 0, in any order and epoch).

        Raises:
            ValueError: a position is negative.
        """
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
        """A sample that replaces a bad one.

        It is chosen by hash from the same window, which is being read anyway; from the whole epoch where the window has
        no other sample. It is never the bad sample itself, unless the data set has no other.

        Args:
            position: of the bad sample, global.
            attempt: 1, 2, ... give different ones.

        Returns:
            The shard, and the sample in it.
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

    def chunk_samples(self, chunk: int) -> tuple[int, int, int]:
        """The samples of a chunk.

        Returns:
            The shard, the first sample in it and the number of samples.

        Raises:
            ValueError: there is no such chunk.
        """
        return self._table.bounds(chunk)

    def positions_of(self, chunk: int, epoch: int) -> Int64s:
        """The inverse of `locate`: the global positions of a chunk's samples in an epoch, sorted."""
        size = self._table.bounds(chunk)[2]  # first: of a number that is no chunk, the permutation never ends
        first = self._plan(epoch).first_slot(chunk)
        return np.sort(epoch * self.num_samples + self._places(epoch, np.arange(first, first + size)))

    def pass_of(self, chunk: int, position: int) -> Int64s:
        """The positions of a chunk's samples, sorted, in the earliest pass over it that is not over at `position`."""
        epoch = max(0, position) // self.num_samples
        found = self.positions_of(chunk, epoch)
        return self.positions_of(chunk, epoch + 1) if found[-1] < position else found

    def uses(self, chunk: int, position: int) -> ChunkUse:
        """The first and the last position of `pass_of`; `uses(chunk, last + 1)` is the pass after."""
        found = self.pass_of(chunk, position)
        return ChunkUse(int(found[0]), int(found[-1]))

    def state(self, position: int) -> dict[str, int | str]:
        """All that is needed to go on from `position` (samples consumed by the trainer), as JSON."""
        return {"version": STATE_VERSION, "position": position, **self._identity()}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuses a state that was written under another order or data set.

        Raises:
            ValueError: something differs, or the position is invalid; every field is named.
        """
        expected = {"version": STATE_VERSION, **self._identity()}
        wrong = [
            f"{name} is {state.get(name)!r} in the checkpoint and {value!r} now"
            for name, value in expected.items()
            if state.get(name) != value
        ]
        if "kind" in state:
            wrong = [f"it is of a {state['kind']} of several sources, and data.mixture names none now"]
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
        """The order that wrote `state`.

        Args:
            state: what `state` gave, from a checkpoint.
            samples_per_shard: [shards], int64.
            bytes_per_shard: [shards], int64.
            config: the parameters; undecided streams are taken from `state`.
            fingerprint: of the data set.

        Raises:
            ValueError: `state` is damaged, or see `check_state`.
        """
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
        """Step 5: from positions in the epoch [B] to their streams and the offsets in these, each [B]."""
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
        """The first slot and the number of slots of the windows that hold these offsets, each [B]."""
        length, longer = divmod(self.num_samples, self._num_streams)
        begin = stream * length + np.minimum(stream, longer)
        start = offset // self.config.window * self.config.window
        return begin + start, np.minimum(self.config.window, length + (stream < longer) - start)

    def _slots(self, epoch: int, places: Int64s) -> Int64s:
        """Steps 3 to 5: from positions in the epoch to slots, each [B]."""
        stream, offset = self._stream_offsets(places)
        first, size = self._window_bounds(stream, offset)
        window = offset // self.config.window
        return first + feistel(
            offset - window * self.config.window, size, hash_words(self.config.seed, epoch, _WINDOW, stream, window)
        )

    def _places(self, epoch: int, slots: Int64s) -> Int64s:
        """The inverse of `_slots`: from slots to positions in the epoch, each [B]."""
        streams, run, window_size = self._num_streams, self.config.run, self.config.window
        length, longer = divmod(self.num_samples, streams)
        in_longer = longer * (length + 1)  # slots of the streams that are one sample longer
        stream = np.where(slots < in_longer, slots // (length + 1), longer + (slots - in_longer) // max(length, 1))
        offset = slots - (stream * length + np.minimum(stream, longer))
        first, size = self._window_bounds(stream, offset)
        window = offset // window_size
        offset = window * window_size + feistel_inverse(
            slots - first, size, hash_words(self.config.seed, epoch, _WINDOW, stream, window)
        )
        full = length // run * run
        rest = length - full
        place = (offset // run * streams + stream) * run + offset % run
        place = np.where(offset >= full, full * streams + stream * rest + offset - full, place)
        return np.where(offset == length, length * streams + stream, place)

    def _locate_slots(self, epoch: int, slots: Int64s) -> Located:
        """Steps 1 and 2: from slots [B] to their places."""
        chunk, within = self._plan(epoch).find(slots)
        shard, first = self._table.first_samples(chunk)
        return Located(shard, first + within, chunk, np.zeros_like(shard))

    def _plan(self, epoch: int) -> EpochPlan:
        """The plan of an epoch, made when it is first asked for; others stay in use while one is made."""
        plan = self._kept_plan(epoch)
        if plan is None:
            with self._planning_lock:
                plan = self._kept_plan(epoch)
                if plan is None:
                    plan = self._make_plan(epoch)
        return plan

    def _kept_plan(self, epoch: int) -> EpochPlan | None:
        with self._plans_lock:
            plan = self._plans.get(epoch)
            if plan is not None:
                self._plans.move_to_end(epoch)
            return plan

    def _make_plan(self, epoch: int) -> EpochPlan:
        if self._chunk_sizes is None:
            self._chunk_sizes = self._table.sizes()
        plan = EpochPlan(self._chunk_sizes, hash_words(self.config.seed, epoch, _CHUNKS))
        with self._plans_lock:
            self._plans[epoch] = plan
            while len(self._plans) > _PLANS:
                self._plans.popitem(last=False)
        return plan
