"""Sums by name: what the parts of the data path count (requests, bytes, milliseconds) until somebody reads them.

Enters: names with amounts, from any thread. Leaves: one dictionary of sums, then zeros again. Why it exists: the
metrics of a loader come from many places, some of them in other processes, and adding is the only thing they share.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any


class Counters:
    """Sums by name. Safe for threads; cheap to pickle (the sums stay behind: they belong to the process)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: dict[str, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def add(self, name: str, amount: float = 1) -> None:
        """Adds to one sum."""
        with self._lock:
            self._sums[name] = self._sums.get(name, 0) + amount

    def merge(self, sums: Mapping[str, float]) -> None:
        """Adds what other counters counted."""
        with self._lock:
            for name, amount in sums.items():
                self._sums[name] = self._sums.get(name, 0) + amount

    def take(self) -> dict[str, float]:
        """The sums since the last call; they start at zero again."""
        with self._lock:
            sums, self._sums = self._sums, {}
        return sums

    def peek(self) -> dict[str, float]:
        """The sums, left as they are."""
        with self._lock:
            return dict(self._sums)
