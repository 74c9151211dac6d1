"""Sums by name: what the parts of the data path count (requests, bytes, seconds) until somebody reads them.

Enters: declared names with amounts, from any thread. Leaves: one dictionary of sums, then zeros again. Why it exists:
the metrics of a loader come from many places, some of them in other processes, and adding is the only thing they share.
All names are declared here and nowhere else: whoever counts something undeclared is refused, and whoever shows the sums
(pretrain.data_meter) goes through the declaration, so that nothing counted gets lost.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

CounterName = Literal[
    # the loader
    "samples_loaded",  # samples in the batches that were made
    "batches",  # micro-batches that the trainer took
    "ready_batches",  # micro-batches that were loaded and waiting, summed over the moments at which one was taken
    "read_s",  # seconds that loading waited for the bytes of samples
    "decode_s",  # seconds of decoding and augmenting, summed over workers
    "bytes_used",  # bytes of the samples that were asked for
    "shards_read",  # shards that were read from front to back, where there is no index
    # requests to stores
    "requests",  # attempts, retries included
    "request_s",  # seconds of all attempts
    "bytes_fetched",  # bytes that arrived
    "request_errors",  # attempts that failed and were worth another one; the three below are its parts
    "timeouts",  # nothing, or next to nothing, arrived in time
    "throttled",  # the store asked for fewer requests (429, 503)
    "broken_requests",  # connections that broke, answers that were too short, other errors of the server
    "retries",  # attempts that were made after one of these
    "range_ignored",  # answers with the whole object in place of the range
    # the cache
    "cache_hits",  # reads that the cache answered
    "cache_misses",  # reads that it could have answered and did not
    "cache_hit_bytes",  # bytes of the hits
    "cache_evictions",  # chunks that were removed to make room
    "cache_refused",  # chunks that found no room, or that the disk did not take
    "cache_corrupt",  # chunks whose checksums were wrong; they were removed
    # fetching chunks into the cache ahead of the trainer
    "chunks_fetched",  # chunks that were fetched
    "chunks_without_room",  # chunks in use that found no room; their samples are read one by one
    "chunks_mostly_foreign",  # chunks of which this node needs less than half; their samples are read one by one
]
"""Everything that is counted; a mixture also counts samples by source, see `source_counter`."""

COUNTER_NAMES: tuple[CounterName, ...] = get_args(CounterName)
"""The names in the order in which every rank lists them."""

_DECLARED = frozenset(COUNTER_NAMES)
_OF_SOURCE = re.compile(r"source_\d+")


class UndeclaredCounterError(ValueError):
    """Something was counted under a name that nobody declared, so no metric would show it."""


def source_counter(number: int) -> CounterName:
    """The name that counts the samples of the data set `number` of a mixture."""
    return cast(CounterName, f"source_{number}")


class Counters:
    """Sums by name. Safe for threads; cheap to pickle (the sums stay behind: they belong to the process)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: dict[CounterName, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def add(self, name: CounterName, amount: float = 1) -> None:
        """Adds to one sum.

        Raises:
            UndeclaredCounterError: the name is not one of `CounterName`.
        """
        _check_declared(name)
        with self._lock:
            self._sums[name] = self._sums.get(name, 0) + amount

    def merge(self, sums: Mapping[CounterName, float]) -> None:
        """Adds to several sums, for example what other counters counted.

        Raises:
            UndeclaredCounterError: a name is not one of `CounterName`; then nothing is added.
        """
        for name in sums:
            _check_declared(name)
        with self._lock:
            for name, amount in sums.items():
                self._sums[name] = self._sums.get(name, 0) + amount

    def take(self) -> dict[CounterName, float]:
        """The sums since the last call; they start at zero again."""
        with self._lock:
            sums, self._sums = self._sums, {}
        return sums

    def peek(self) -> dict[CounterName, float]:
        """The sums, left as they are."""
        with self._lock:
            return dict(self._sums)


def _check_declared(name: str) -> None:
    if name not in _DECLARED and not _OF_SOURCE.fullmatch(name):
        raise UndeclaredCounterError(f"{name!r} is no counter; declare it in data_pipes.store.counters.CounterName")
