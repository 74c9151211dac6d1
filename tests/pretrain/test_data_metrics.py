"""The metrics of the data path, from what loaders count."""

from __future__ import annotations

import pytest
import torch

from pretrain.metrics import DataMeter
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
    metrics = DataMeter(ALONE, ("train",)).report(sums, {"decode": 2, "strange": 1}, [0.1] * 99 + [5.0], 2.0)
    assert metrics["data/wait_p50_ms_per_step"] == pytest.approx(100)
    assert 100 < metrics["data/wait_p99_ms_per_step"] < 5000
    assert metrics["data/read_ms_per_sample"] == pytest.approx(0.5)
    assert metrics["data/decode_ms_per_sample"] == pytest.approx(2)
    assert metrics["data/used_bytes_per_s"] == pytest.approx(2.5e6)
    assert metrics["data/ready_batches"] == pytest.approx(1.5)
    assert (metrics["data/bad_decode"], metrics["data/bad_other"]) == (2, 1)
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
