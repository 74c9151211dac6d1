"""Real runs on mixtures, on object stores and on shards that cannot be indexed."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from pretrain.config import ConfigError
from pretrain.report.report import build_report
from pretrain.tracking.journal import read_metrics
from tests.data_pipes.store.faulty_server import FaultyServer
from tests.data_pipes.tiny_shards import write_shards
from tests.pretrain.runs import assert_same_weights, losses, overrides_of, run_here

STEPS = 12


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three data sets: with classes, with others, without."""
    root = tmp_path_factory.mktemp("sources")
    write_shards(root / "photos", [40, 30], classes=[f"photo {i}" for i in range(7)])
    write_shards(root / "web", [25], classes=[f"web {i}" for i in range(7)])
    write_shards(root / "small", [9])
    return [root / name for name in ("photos", "web", "small")]


def mixed(sources: list[Path], output: Path, name: str, *more: str) -> list[str]:
    listed = ", ".join(f"{{path: {path}, weight: {weight}}}" for path, weight in zip(sources, (3, 2, 1), strict=True))
    return [
        *overrides_of(sources[0], output, name),
        "data.train=null",
        f"data.mixture.sources=[{listed}]",
        "data.mixture.schedule=[{at_sample: 48, weights: [0, 1, 1]}]",
        f"train.steps={STEPS}",
        "checkpoint.every_steps=5",
        "checkpoint.keep_last=3",
        "data.order.run=2",
        *more,
    ]


def test_a_mixture_trains_resumes_and_reports_its_shares(sources: list[Path], tmp_path: Path) -> None:
    run_here(mixed(sources, tmp_path, "whole"))
    run_here(mixed(sources, tmp_path, "cut"))
    metrics = read_metrics(tmp_path / "whole")
    assert {name for name in metrics if name.startswith("data/share_")} == {
        "data/share_photos",
        "data/share_web",
        "data/share_small",
    }
    consumed = [point.value for point in metrics["data/share_photos"]]
    wanted = [point.value for point in metrics["data/wanted_share_photos"]]
    assert wanted == [0.5] * 6 + [0.0] * 6
    assert sum(consumed[:6]) / 6 == pytest.approx(0.5, abs=0.1)
    assert sum(consumed[6:]) == 0
    assert "Shares of the sources" in build_report(tmp_path / "whole").read_text()
    for newest in (tmp_path / "cut" / "checkpoints").glob("step-*"):
        if newest.name != "step-00000005":
            (newest / "COMPLETE").unlink()
    run_here(mixed(sources, tmp_path, "cut"))
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


def test_a_run_on_a_failing_store_equals_the_local_one(tiny_dataset: Path, tmp_path: Path) -> None:
    more = [f"train.steps={STEPS}", "data.workers=2", "data.storage.backoff_s=0.01"]
    run_here(overrides_of(tiny_dataset, tmp_path, "local", *more))
    with FaultyServer(tiny_dataset, chances={"503": 0.05, "drop": 0.05}) as server:
        cache = [f"data.cache.dir={tmp_path / 'cache'}", "data.cache.max_bytes=67108864"]
        overrides = overrides_of(tiny_dataset, tmp_path, "remote", *more, *cache)
        run_here([*overrides, f"data.train={server.url}", f"data.val={server.url}"])
    assert_same_weights(tmp_path / "local", tmp_path / "remote")
    metrics = read_metrics(tmp_path / "remote")
    assert metrics["data/read_amplification"][-1].value > 0
    assert "data/requests_per_s" in metrics
    assert "data/cache_hit_fraction" in metrics
    assert "Read amplification" in build_report(tmp_path / "remote").read_text()


def test_compressed_shards_train_and_say_that_resume_is_approximate(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in tiny_dataset.glob("*.tar"):
        with tarfile.open(path) as plain, tarfile.open(tmp_path / f"{path.name}.gz", "w:gz") as packed:
            for member in plain.getmembers():
                packed.addfile(member, plain.extractfile(member))
    more = ["data.train=null", f"data.unindexed.urls=[{tmp_path}/*.tar.gz]", "checkpoint.every_steps=5"]
    overrides = overrides_of(tiny_dataset, tmp_path, "packed", *more)
    summary = run_here([*overrides, "train.steps=5"])
    assert summary["samples"] == 40
    assert "approximate" in capsys.readouterr().err
    assert run_here([*overrides, "train.steps=8"])["steps_this_start"] == 3
    with pytest.raises(ConfigError, match=r"data\.unindexed.*train\.steps"):
        run_here([*overrides, "train.epochs=2"])


def test_only_one_way_to_name_the_data(sources: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.train and data\.mixture are both given"):
        run_here([*mixed(sources, tmp_path, "both"), f"data.train={sources[0]}"])
