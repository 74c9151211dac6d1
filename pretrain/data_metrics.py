"""What the data path did between two log points, over all ranks.

Enters: the sums that a rank's loader counted. Leaves: metrics with scope and unit in their names. Why it exists: when a
run waits for data, these say what for: the store, the cache, the decoder, or bad samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from pretrain.parallel.dist import World

_SUMS = (
    "samples_loaded",
    "read_s",
    "decode_s",
    "bytes_used",
    "bytes_fetched",
    "requests",
    "request_s",
    "request_errors",
    "retries",
    "throttled",
    "timeouts",
    "range_ignored",
    "cache_hits",
    "cache_misses",
    "cache_hit_bytes",
    "cache_evictions",
    "cache_refused",
    "cache_corrupt",
    "chunks_fetched",
    "chunks_without_room",
    "chunks_mostly_foreign",
    "ready_batches",
    "batches",
)
"""What a loader may count; every rank adds all of them, in this order."""
_CAUSES = "decode pixels channels label no_image bit_depth metadata caption no_video video frames other".split()  # noqa: SIM905
_COUNTS = ("retries", "throttled", "timeouts", "range_ignored", "cache_evictions", "cache_refused", "cache_corrupt")


class DataMeter:
    """Turns sums into metrics. Every rank calls `report` at the same steps."""

    def __init__(self, world: World, source_names: Sequence[str]) -> None:
        """source_names: of the data sets, in order; one name: no mixture."""
        self._world, self._sources = world, list(source_names) if len(source_names) > 1 else []
        self._fetched = self._used = 0.0

    def report(
        self,
        sums: Mapping[str, float],
        bad_by_cause: Mapping[str, int],
        waits_s: Sequence[float],
        seconds: float,
        wanted_shares: Sequence[float] = (),
    ) -> dict[str, float]:
        """The metrics of an interval of `seconds`. sums: of this rank, since the last call; bad_by_cause: of this rank,
        since the run's start; waits_s: this rank's wait for data in each step. A collective.
        """
        causes = _known_causes(bad_by_cause)
        columns = [sums.get(name, 0.0) for name in _SUMS]
        columns += [sums.get(f"source_{number}", 0.0) for number in range(len(self._sources))]
        totals = self._world.sum(torch.tensor([*columns, *causes], dtype=torch.float64)).tolist()
        total = dict(zip(_SUMS, totals, strict=False))
        shares, causes = totals[len(_SUMS) : -len(_CAUSES)], totals[-len(_CAUSES) :]
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
        metrics |= {f"data/bad_{cause}": count for cause, count in zip(_CAUSES, causes, strict=True) if count}
        if total["requests"] or self._fetched:
            metrics |= self._of_storage(total, seconds)
        consumed = max(1.0, sum(shares))
        for name, share, wanted in zip(self._sources, shares, wanted_shares, strict=False):
            metrics |= {f"data/share_{name}": share / consumed, f"data/wanted_share_{name}": wanted}
        return metrics

    def _of_storage(self, total: Mapping[str, float], seconds: float) -> dict[str, float]:
        looked_up = total["cache_hits"] + total["cache_misses"]
        return {
            "data/fetched_bytes_per_s": total["bytes_fetched"] / seconds,
            "data/requests_per_s": total["requests"] / seconds,
            "data/request_ms": 1e3 * total["request_s"] / max(1.0, total["requests"]),
            "data/read_amplification": self._fetched / max(1.0, self._used),
            **({"data/cache_hit_fraction": total["cache_hits"] / looked_up} if looked_up else {}),
            **({"data/cache_hit_bytes_per_s": total["cache_hit_bytes"] / seconds} if looked_up else {}),
            **{f"data/{name}": total[name] for name in _COUNTS if total[name]},
        }


def _known_causes(bad_by_cause: Mapping[str, int]) -> list[float]:
    counts = dict.fromkeys(_CAUSES, 0.0)
    for cause, count in bad_by_cause.items():
        counts[cause if cause in counts else "other"] += count
    return list(counts.values())
