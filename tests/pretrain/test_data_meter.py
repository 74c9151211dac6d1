"""The metrics of the data path, from what loaders count."""

from __future__ import annotations

import pytest
import torch

from data_pipes.errors import CAUSES
from data_pipes.store.counters import COUNTER_NAMES
from pretrain.data_meter import DataMeter
from pretrain.parallel.world import World

ALONE = World(0, 1, 0, torch.device("cpu"), None, None)


def test_local_data_shows_times_and_no_store() -> None:
    sums = {
        "samples_loaded": 100.0,
        "read_s": 0.05,
        "decode_s": 0.2,
        "bytes_used": 5e6,
        "batches": 4,
        "ready_batches": 6,
    }
    metrics = DataMeter(ALONE, ("train",)).report(sums, {"decode": 2, "aspect": 1}, [0.1] * 99 + [5.0], 2.0)
    assert metrics["data/wait_p50_ms_per_step"] == pytest.approx(100)
    assert 100 < metrics["data/wait_p99_ms_per_step"] < 5000
    assert metrics["data/read_ms_per_sample"] == pytest.approx(0.5)
    assert metrics["data/decode_ms_per_sample"] == pytest.approx(2)
    assert metrics["data/used_bytes_per_s"] == pytest.approx(2.5e6)
    assert metrics["data/ready_batches"] == pytest.approx(1.5)
    assert (metrics["data/bad_decode"], metrics["data/bad_aspect"]) == (2, 1)
    assert not any("share" in name or "fetched" in name or "cache" in name for name in metrics)


def test_amplification_counts_from_the_start_and_hits_from_the_interval() -> None:
    meter = DataMeter(ALONE, ("train",))
    meter.report({"bytes_fetched": 3e6, "bytes_used": 1e6, "requests": 3}, {}, [], 1.0)
    later = {
        "bytes_fetched": 1e6,
        "bytes_used": 3e6,
        "cache_hits": 3,
        "cache_misses": 1,
        "request_s": 0.4,
        "requests": 2,
    }
    metrics = meter.report(later | {"retries": 5}, {}, [], 2.0)
    assert metrics["data/read_amplification"] == pytest.approx(1.0)
    assert metrics["data/cache_hit_fraction"] == pytest.approx(0.75)
    assert metrics["data/request_ms"] == pytest.approx(200)
    assert metrics["data/fetched_bytes_per_s"] == pytest.approx(5e5)
    assert metrics["data/retries"] == 5
    assert "data/throttled" not in metrics


def test_shares_of_a_mixture_beside_the_wanted_ones() -> None:
    meter = DataMeter(ALONE, ("photos", "web"))
    metrics = meter.report({"source_0": 30.0, "source_1": 10.0}, {}, [], 1.0, [0.7, 0.3])
    assert metrics["data/share_photos"] == 0.75
    assert metrics["data/wanted_share_photos"] == 0.7
    assert metrics["data/share_web"] == 0.25


def test_every_counter_and_cause_reaches_the_metrics() -> None:
    """One more of anything that may be counted changes what is shown."""

    def shown(sums: dict[str, float], bad: dict[str, int]) -> dict[str, float]:
        return DataMeter(ALONE, ("train",)).report(sums, bad, [], 1.0)

    sums, bad = dict.fromkeys(COUNTER_NAMES, 10.0), dict.fromkeys(CAUSES, 10)
    before = shown(sums, bad)
    for name in COUNTER_NAMES:
        assert shown(sums | {name: 11.0}, bad) != before, name
    for cause in CAUSES:
        assert shown(sums, bad | {cause: 11})[f"data/bad_{cause}"] == 11
    assert before["data/shards_read"] == 10
    assert not [name for name, value in shown({}, {}).items() if value]


def test_ranks_add_the_same_numbers_in_the_same_order() -> None:
    added: list[torch.Tensor] = []

    class Recording(World):
        def sum(self, values: torch.Tensor) -> torch.Tensor:
            added.append(values)
            return values

    world = Recording(0, 2, 0, torch.device("cpu"), None, None)
    meter = DataMeter(world, ("photos", "web"))
    meter.report({"retries": 1.0, "bytes_used": 2.0, "source_1": 3.0}, {"video": 4}, [], 1.0)
    meter.report({"source_1": 3.0, "bytes_used": 2.0, "retries": 1.0}, {"video": 4}, [], 1.0)
    meter.report({}, {}, [], 1.0)
    assert torch.equal(added[0], added[1])
    assert added[0][COUNTER_NAMES.index("retries")] == 1
    assert added[0][len(COUNTER_NAMES) + 1] == 3
    assert [len(values) for values in added] == [len(COUNTER_NAMES) + 2 + len(CAUSES)] * 3
