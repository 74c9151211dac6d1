"""Brings the chunks that a rank is going to need into the node's cache, in the order of their first use.

Enters: the order, the rank's own positions, how far the trainer has come. Leaves: chunks in the cache, each with the
time of its next use. Why it exists: the order is known, so nothing has to be guessed: what is fetched is needed, what
is in use stays, and what is needed last goes first. A chunk that finds no room, or of which this node needs less than
half, is not fetched: its samples are read singly. So the bytes read stay about the bytes used, whatever the cache's
size and the number of ranks.

The life of a chunk in one pass (epoch): met on the walk ahead of the trainer, fetched with the time of its first use;
pinned from its first use to its last; then free, with the time of its first use in the next pass.
"""

from __future__ import annotations

import heapq
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipes.cache.cache import PINNED
from data_pipes.errors import ShardError
from data_pipes.loading.dataset import SampleDataset
from data_pipes.order.hashing import Int64s
from data_pipes.order.order import NEVER
from data_pipes.shards.collection import Place
from data_pipes.shards.reader import ShardReader
from data_pipes.store.errors import StorageError
from data_pipes.store.storage import Storage
from data_pipes.store.transport import ByteRange

_log = logging.getLogger(__name__)

_WALK_POSITIONS = 4096
"""Positions that are looked at together on the walk ahead."""
_MAX_FETCHES = 4
"""Chunks under way at once; each is split into requests of data.storage.request_bytes."""
_MAX_KNOWN_CHUNKS = 200_000
"""Chunks ahead of the trainer: bounds the memory (about 100 MB) where the cache is very large."""
_IDLE_S = 0.2
"""Seconds between two looks at a cache without room, and between two reports of next uses."""
_MANY_CLAIMS = 100
"""Next uses that are told to the cache at once, before that time is over: a transaction takes 0.4 ms."""
_ASSUMED_SAMPLES_PER_S = 1000.0
"""Over all ranks, before it is known."""


@dataclass(order=True, frozen=True, slots=True)
class _Pass:
    """The use of a chunk in one epoch."""

    first: int
    """Global position of its first use."""
    last: int
    """Global position of its last use."""
    chunk: int
    """Number of the chunk in the order."""
    key: str
    """Name of the chunk in the cache; empty before it was looked up."""


class Prefetcher:
    """Works in threads of its own until it is closed."""

    def __init__(
        self,
        dataset: SampleDataset,
        positions: Iterator[Int64s],
        on_this_node: Callable[[Int64s], NDArray[np.bool_]],
        start: int,
    ) -> None:
        """
        Args:
            dataset: whose reader has a cache.
            positions: the rank's own, micro-batch after micro-batch, endless.
            on_this_node: which of any positions the node's ranks will take.
            start: the trainer's position.
        """
        cache = dataset.reader.cache
        assert cache is not None
        self._order, self._cache, self._positions = dataset.order, cache, positions
        self._on_this_node = on_this_node
        self.reader = ShardReader(dataset.collection, None, Storage(dataset.reader.storage.config), cache)
        self.error: ShardError | None = None
        self.position = start
        self._begin, self._begin_s = start, time.monotonic()
        self._passes: dict[int, list[_Pass]] = {}
        self._starts: list[tuple[int, _Pass]] = []
        self._ends: list[tuple[int, _Pass]] = []
        self._claims: dict[str, float] = {}
        self._claimed_s = 0.0
        self._fetching: dict[Future[bool], _Pass] = {}
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(_MAX_FETCHES, thread_name_prefix="prefetch")
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def advance(self, position: int) -> None:
        """Says that the trainer has consumed all samples before `position`.

        Raises:
            ShardError: a shard was changed.
        """
        self.position = position
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        """Stops the threads; what is under way is dropped."""
        self._stop.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._thread.join()
        self._pool.shutdown(wait=True)
        self.reader.close()

    def _run(self) -> None:
        try:
            walk = self._walk()
            waiting = next(walk)
            while not self._stop.is_set():
                self._pin_and_free()
                if len(self._fetching) >= _MAX_FETCHES or len(self._passes) >= _MAX_KNOWN_CHUNKS:
                    self._collect(_IDLE_S)
                elif waiting is None or self._admit(waiting):
                    waiting = next(walk)
                    self._collect(0 if waiting is not None else _IDLE_S)
                else:
                    self._collect(_IDLE_S)
        except ShardError as error:
            self.error = error
        except Exception as error:  # the trainer goes on without: its workers read what they need themselves
            if not self._stop.is_set():
                _log.warning("prefetching stopped (%s: %s); samples are read singly", type(error).__name__, error)

    def _walk(self) -> Iterator[_Pass | None]:
        """The passes that lie ahead.

        Yields:
            Passes in the order of the first sample that this rank takes of each; None: those of a whole epoch are
            known, there is nothing to do.
        """
        known: dict[int, int] = {}  # chunk -> end of its last pass that was met
        reached = self.position
        while True:
            if reached > self.position + self._order.num_samples:
                yield None
                continue
            block: list[Int64s] = []
            while sum(map(len, block)) < _WALK_POSITIONS:
                block.append(next(self._positions))
            positions = np.concatenate(block)
            reached = int(positions[-1])
            chunks = self._order.locate(positions).chunk
            _, first_at = np.unique(chunks, return_index=True)
            for at in sorted(first_at.tolist()):
                chunk, position = int(chunks[at]), int(positions[at])
                if known.get(chunk, -1) >= position:
                    continue
                whole = self._order.pass_of(chunk, position)
                known[chunk] = int(whole[-1])
                own = whole[self._on_this_node(whole)]
                if 2 * len(own) >= self._order.chunk_samples(chunk)[2]:
                    yield _Pass(int(own[0]), int(own[-1]), chunk, "")
                else:
                    self.reader.counters.add("chunks_mostly_foreign")
            if len(known) > 2 * _MAX_KNOWN_CHUNKS:
                known = {chunk: last for chunk, last in known.items() if last >= self.position}

    def _admit(self, met: _Pass) -> bool:
        """Fetches a chunk, or passes it over.

        Returns:
            False when there is no room yet, so that the same pass is to be offered again.
        """
        if met.last < self.position:
            return True
        shard, first, count = self._order.chunk_samples(met.chunk)
        try:
            key, wanted = self.reader.chunk_range(Place(shard, first, first, count))
        except StorageError:
            return True
        this = _Pass(met.first, met.last, met.chunk, key)
        if met.chunk in self._passes:  # the pass before is not over; its end tells the cache of this one
            self._remember(this)
            return True
        next_use_s = self._time_of(this)
        if self._cache.contains(key):
            self._claims[key] = next_use_s
            self._remember(this)
            return True
        if not self._cache.has_room(wanted.length, next_use_s):
            self.reader.counters.add("chunks_without_room", float(met.first <= self.position))
            return met.first <= self.position  # in use already: its samples are read singly
        self._remember(this)
        self._fetching[self._pool.submit(self._fetch, this, wanted)] = this
        return True

    def _fetch(self, this: _Pass, wanted: ByteRange) -> bool:
        """Whether the chunk is in the cache now."""
        if self._stop.is_set():
            return False
        try:
            data = self.reader.storage.read_range(wanted)
        except StorageError as error:
            _log.warning("%s", error)
            return False
        self.reader.counters.add("chunks_fetched")
        return self._cache.put(this.key, data, self._time_of(this))

    def _remember(self, this: _Pass) -> None:
        self._passes.setdefault(this.chunk, []).append(this)
        heapq.heappush(self._starts, (this.first, this))
        heapq.heappush(self._ends, (this.last, this))

    def _pin_and_free(self) -> None:
        """Pins the chunks whose use begins, frees those whose use is over."""
        changes = self._claims
        while self._starts and self._starts[0][0] <= self.position:
            changes[heapq.heappop(self._starts)[1].key] = PINNED
        while self._ends and self._ends[0][0] < self.position:
            _, over = heapq.heappop(self._ends)
            left = self._passes[over.chunk]
            left.remove(over)
            if left:
                changes[over.key] = self._time_of(left[0])
                continue
            del self._passes[over.chunk]
            changes[over.key] = self._time_after(over)
        now_s = time.monotonic()
        if changes and (now_s - self._claimed_s > _IDLE_S or len(changes) > _MANY_CLAIMS):
            self._cache.set_next_use(changes)
            self._claims, self._claimed_s = {}, now_s

    def _collect(self, timeout_s: float) -> None:
        """Takes what was fetched, after at most `timeout_s` seconds; a shard that was changed stops the run."""
        if not self._fetching:
            self._stop.wait(timeout_s)
            return
        done, _ = wait(self._fetching, timeout_s, FIRST_COMPLETED)
        for future in done:
            this = self._fetching.pop(future)
            if not future.cancelled() and future.result() and this.last < self.position:
                self._claims[this.key] = self._time_after(this)  # its use ended while it was fetched

    def _time_after(self, over: _Pass) -> float:
        """When the pass after this one begins."""
        again = self._order.uses(over.chunk, over.last + 1)
        return self._time_of(_Pass(again.first, again.last, over.chunk, over.key))

    def _time_of(self, this: _Pass) -> float:
        """When a pass begins, as time.time() counts; pinned when it has begun."""
        position = self.position
        if this.first >= NEVER:
            return math.inf
        if this.first <= position:
            return PINNED
        seconds = time.monotonic() - self._begin_s
        rate = (position - self._begin) / seconds if position > self._begin and seconds > 1 else _ASSUMED_SAMPLES_PER_S
        return time.time() + (this.first - position) / rate
