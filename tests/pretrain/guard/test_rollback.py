"""The numerical guard in real runs: faults are planted in samples and in the learning rate."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import pretrain.optim
from pretrain.checkpoint.open_folder import open_folder
from pretrain.checkpoint.read import list_checkpoints
from pretrain.objectives.image_mae import ImageMAEObjective
from pretrain.tracking.journal import read_journal
from tests.pretrain.guard.spoiled_runs import spoil
from tests.pretrain.runs import CONFIG, assert_same_weights, final_weights, losses, overrides_of, run_here
from tests.process_server import ProcessServer

BATCH = 8


@pytest.fixture
def plant_nan(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """`spoil`, for one test."""
    monkeypatch.setattr(ImageMAEObjective, "turns", ImageMAEObjective.turns)  # put back afterwards
    return spoil


def events(run: Path, name: str) -> list[dict[str, Any]]:
    return [record for record in read_journal(run) if record["type"] == "event" and record["name"] == name]


def test_one_bad_sample_costs_one_step(tiny_dataset: Path, tmp_path: Path, plant_nan: Callable[..., None]) -> None:
    plant_nan(45, 46)
    run_here(overrides_of(tiny_dataset, tmp_path, "run", "train.steps=10", "train.micro_batch=4"))
    (event,) = events(tmp_path / "run", "skipped_step")
    assert event["at_step"] == 6
    assert event["position"] == 40
    assert event["num_samples"] == 4  # the half of the batch that was spoiled
    folder = Path(event["folder"])
    listed = [json.loads(line) for line in (folder / "rank00000.jsonl").read_text().splitlines()]
    assert [row["position"] for row in listed] == list(range(40, 48))
    assert [row["loss"] == "nan" for row in listed] == [False] * 4 + [True] * 4
    assert event["samples"] == [f"{row['shard']}:{row['key']}" for row in listed[4:]]
    dumped = load_file(folder / "rank00000-micro001.safetensors")
    assert dumped["positions"].tolist() == [44, 45, 46, 47]
    assert dumped["images"].shape == (4, 1, 8, 8)
    assert not events(tmp_path / "run", "rollback")
    assert all(torch.isfinite(tensor).all() for tensor in final_weights(tmp_path / "run").values())


def test_a_row_of_bad_samples_is_left_out(tiny_dataset: Path, tmp_path: Path, plant_nan: Callable[..., None]) -> None:
    """Equal to a run that was told to leave them out; also when it is interrupted later."""
    plant_nan(6 * BATCH, 9 * BATCH)
    options = ["train.steps=16", "guard.nonfinite_steps=3", "checkpoint.every_steps=4"]
    summary = run_here(overrides_of(tiny_dataset, tmp_path, "run", *options))
    (event,) = events(tmp_path / "run", "rollback")
    assert event["position"] == 6 * BATCH
    assert event["num_samples"] == BATCH
    assert "steps 7 to 9 was not finite" in event["reason"]
    assert summary["step"] == 16 - 3  # their samples are consumed all the same
    assert summary["samples"] == 16 * BATCH
    found = losses(tmp_path / "run")
    assert list(found) == list(range(1, 14))
    assert all(map(math.isfinite, found.values()))
    names = [path.name for path in list_checkpoints(open_folder(tmp_path / "run"))]
    assert names == ["step-00000012", "step-00000013"]
    state = json.loads((tmp_path / "run" / "checkpoints" / names[-1] / "state.json").read_text())
    assert state["skipped"] == [[6 * BATCH, 9 * BATCH]]
    assert state["rollbacks"] == 1


def test_a_spike_of_the_learning_rate(tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = pretrain.optim.scheduled_lr
    spiked = lambda position, **curve: honest(position, **curve) * (3e5 if position == 20 * BATCH else 1)
    monkeypatch.setattr(pretrain.optim, "scheduled_lr", spiked)
    options = ["train.steps=40", "checkpoint.every_steps=7", "optim.clip_norm=null", "optim.schedule=constant"]
    guard = ["guard.window=10", "guard.spike_steps=3", "guard.spike_factor=2.0"]
    run_here(overrides_of(tiny_dataset, tmp_path, "run", *options, *guard))
    (event,) = events(tmp_path / "run", "rollback")
    assert event["at_step"] == 21  # the step with the rate
    assert event["position"] == 20 * BATCH
    assert "a spike" in event["reason"]
    (resume,) = [record for record in read_journal(tmp_path / "run") if record["type"] == "resume"]
    assert resume["step"] == 14  # the checkpoint of step 21 has the spoiled weights
    found = losses(tmp_path / "run")
    assert max(list(found.values())[10:]) < 2 * found[10]


def test_a_run_that_cannot_go_back_says_so(tiny_dataset: Path, tmp_path: Path, plant_nan: Callable[..., None]) -> None:
    plant_nan(2 * BATCH, 100 * BATCH)
    with pytest.raises(FloatingPointError, match=r"cannot go back.*rollback 1 .*step 2 or before"):
        run_here(overrides_of(tiny_dataset, tmp_path, "run", "train.steps=20", "guard.nonfinite_steps=2"))
    options = ["train.steps=40", "guard.nonfinite_steps=2", "guard.max_rollbacks=2", "checkpoint.every_steps=1"]
    with pytest.raises(FloatingPointError, match=r"this would be rollback \d of at most guard.max_rollbacks=2"):
        run_here(overrides_of(tiny_dataset, tmp_path, "other", *options))


@pytest.mark.distributed
def test_ranks_skip_and_go_back_together(
    tiny_dataset: Path, tmp_path: Path, plant_nan: Callable[[int, int], None], process_server: ProcessServer
) -> None:
    """The bad samples are all of rank 1; every rank leaves them out, as the single process does."""
    options = ["train.steps=12", "guard.nonfinite_steps=2", "checkpoint.every_steps=2"]
    begin, end = 5 * BATCH + 5, 6 * BATCH + 6
    runs = [
        overrides_of(tiny_dataset, tmp_path, kind, *options, f"parallel.strategy={kind}") for kind in ("ddp", "fsdp2")
    ]
    process_server.run_ranks(2, "tests.pretrain.guard.spoiled_runs:main", str(CONFIG), runs, begin, end)
    plant_nan(begin, end)
    run_here(overrides_of(tiny_dataset, tmp_path, "single", *options))
    expected = losses(tmp_path / "single")
    assert list(expected) == list(range(1, 11))
    for kind in ("ddp", "fsdp2"):
        assert losses(tmp_path / kind) == pytest.approx(expected, rel=1e-4)
        (event,) = events(tmp_path / kind, "rollback")
        assert event["position"] == 5 * BATCH
        assert event["num_samples"] == BATCH // 2
        folder = tmp_path / kind / "guard" / "step-00000006"
        images = [path.name for path in sorted(folder.glob("*.safetensors"))]
        assert images == ["rank00000-micro000.safetensors", "rank00001-micro000.safetensors"]


def test_a_calm_run_is_not_touched(tiny_dataset: Path, tmp_path: Path) -> None:
    run_here(overrides_of(tiny_dataset, tmp_path, "with", "train.steps=12"))
    run_here(overrides_of(tiny_dataset, tmp_path, "without", "train.steps=12", "guard.spike_factor=null"))
    assert_same_weights(tmp_path / "with", tmp_path / "without")
    assert not (tmp_path / "with" / "guard").exists()
