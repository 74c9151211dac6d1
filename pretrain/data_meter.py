"""The metrics of the data path, from what the loaders of all ranks counted.

Enters: each rank's sums by counter, its bad samples by cause, its waits for data. Leaves: metrics by name, the same on
every rank. Why it exists: only sums can be added over ranks; rates, means and shares are made here, once. Every
declared counter and cause is shown: those of `_IN_A_RATIO` within a rate or a mean, all others as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from data_pipes.errors import CAUSES, Cause
from data_pipes.store.counters import COUNTER_NAMES, CounterName, source_counter
from pretrain.parallel.world import World

_IN_A_RATIO: frozenset[CounterName] = frozenset({
    "samples_loaded", "batches", "ready_batches", "read_s", "decode_s", "bytes_used", "bytes_fetched", "requests",
    "request_s", "cache_hits", "cache_misses", "cache_hit_bytes",
})  # fmt: skip
"""Counters that are shown as a rate, a mean or a share."""
_AS_THEY_ARE = tuple(name for name in COUNTER_NAMES if name not in _IN_A_RATIO)
"""Counters that are shown as the interval's sum over ranks, where it is not 0."""


class DataMeter:
    """Turns sums into metrics. Every rank calls `report` at the same steps."""

    def __init__(self, world: World, source_names: Sequence[str]) -> None:
        """
        Args:
            world: the ranks that are added up.
            source_names: names of the data sets, in order; a single one is no mixture, and its share is not shown.
        """
        self._world, self._sources = world, list(source_names) if len(source_names) > 1 else []
        self._fetched = self._used = 0.0

    def report(
        self,
        sums: Mapping[CounterName, float],
        bad_by_cause: Mapping[Cause, int],
        waits_s: Sequence[float],
        seconds: float,
        wanted_shares: Sequence[float] = (),
    ) -> dict[str, float]:
        """The metrics of an interval, over all ranks. A collective.

        Args:
            sums: what this rank's loader counted since the last call.
            bad_by_cause: this rank's bad samples since the run's start.
            waits_s: seconds that this rank waited for data, in each step of the interval.
            seconds: length of the interval.
            wanted_shares: the share of the samples that a mixture asks for, by source.
        Returns:
            Metrics by name. Bytes, requests and counts are sums over ranks; waits are those of the slowest rank.
        """
        sources = [source_counter(number) for number in range(len(self._sources))]
        counters = (*COUNTER_NAMES, *sources)
        # The same numbers in the same order on every rank, whatever this one has counted.
        columns = [*(sums.get(name, 0.0) for name in counters), *(bad_by_cause.get(cause, 0) for cause in CAUSES)]
        added = self._world.sum(torch.tensor(columns, dtype=torch.float64)).tolist()
        total = dict(zip(counters, added, strict=False))
        bad = dict(zip(CAUSES, added[len(counters) :], strict=True))
        quantiles = np.quantile(waits_s, (0.5, 0.99)).tolist() if waits_s else [0.0, 0.0]
        p50, p99 = self._world.max(torch.tensor(quantiles, dtype=torch.float64)).tolist()
        self._fetched += total["bytes_fetched"]
        self._used += total["bytes_used"]
        samples = max(1.0, total["samples_loaded"])
        metrics = {
            "data/wait_p50_ms_per_step": 1e3 * p50,
            "data/wait_p99_ms_per_step": 1e3 * p99,
            "data/read_ms_per_sample": 1e3 * total["read_s"] / samples,
            "data/decode_ms_per_sample": 1e3 * total["decode_s"] / samples,
            "data/used_bytes_per_s": total["bytes_used"] / seconds,
            "data/ready_batches": total["ready_batches"] / max(1.0, total["batches"]),
        }
        metrics |= {f"data/{name}": total[name] for name in _AS_THEY_ARE if total[name]}
        metrics |= {f"data/bad_{cause}": count for cause, count in bad.items() if count}
        if total["requests"] or self._fetched:
            metrics |= self._of_requests(total, seconds)
        metrics |= _of_cache(total, seconds)
        consumed = max(1.0, sum(total[source] for source in sources))
        for name, source, wanted in zip(self._sources, sources, wanted_shares, strict=False):
            metrics |= {f"data/share_{name}": total[source] / consumed, f"data/wanted_share_{name}": wanted}
        return metrics

    def _of_requests(self, total: Mapping[CounterName, float], seconds: float) -> dict[str, float]:
        return {
            "data/fetched_bytes_per_s": total["bytes_fetched"] / seconds,
            "data/requests_per_s": total["requests"] / seconds,
            "data/request_ms": 1e3 * total["request_s"] / max(1.0, total["requests"]),
            "data/read_amplification": self._fetched / max(1.0, self._used),
        }


def _of_cache(total: Mapping[CounterName, float], seconds: float) -> dict[str, float]:
    looked_up = total["cache_hits"] + total["cache_misses"]
    if not looked_up:
        return {}
    return {
        "data/cache_hit_fraction": total["cache_hits"] / looked_up,
        "data/cache_hit_bytes_per_s": total["cache_hit_bytes"] / seconds,
    }
