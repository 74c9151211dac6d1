"""A run is who its `run.json` says, wherever it lies; what was lost is never taken for what never was."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

from launchers.cli import main
from pretrain.checkpoint.errors import CheckpointError
from pretrain.checkpoint.open_folder import LocalFolder, open_folder
from pretrain.checkpoint.read import newest_complete, step_of
from pretrain.config import ConfigError, load_config
from pretrain.fork import fork_run
from pretrain.tracking.journal import read_journal
from pretrain.train import train
from tests.pretrain.runs import assert_same_weights, losses, overrides_of, run_here

SMALL = (
    *("objective.model.encoder.width=16", "objective.model.encoder.depth=1", "objective.model.encoder.heads=2"),
    *("objective.model.decoder_width=8", "objective.model.decoder_depth=1", "objective.model.decoder_heads=2"),
    *("data.val=null", "train.num_pictures=0", "optim.schedule=constant"),
)
EVERY_STEP = ("checkpoint.every_steps=1", "checkpoint.keep_last=3", "train.steps=3")


@pytest.fixture
def run(tiny_dataset: Path, tmp_path: Path) -> Path:
    """A run of 3 steps with a checkpoint of each."""
    run_here(overrides_of(tiny_dataset, tmp_path, "run", *SMALL, *EVERY_STEP))
    return tmp_path / "run"


def go_on(run: Path, *more: str) -> dict[str, Any]:
    """Continues the run in a folder by its own config.yaml, to step 5."""
    config = run / "config.yaml"
    return train(load_config(config, ["train.steps=5", *more]), config_path=config, overrides=["train.steps=5", *more])


def identity(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "run.json").read_text())
    return found


def folders(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def empty_shards(run: Path) -> None:
    for shard in run.glob("checkpoints/*/*.distcp"):
        shard.write_bytes(b"")


def fail_to_read(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    read = LocalFolder.read

    def failing(self: LocalFolder, file: str) -> bytes:
        if file == name:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self / file))
        return read(self, file)

    monkeypatch.setattr(LocalFolder, "read", failing)


# -- "found nothing" is not "there never was anything" ----------------------------------------------------------------


def test_damage_of_all_checkpoints_is_said_and_nothing_is_lost(run: Path) -> None:
    empty_shards(run)
    before = folders(run)
    with pytest.raises(CheckpointError) as caught:
        go_on(run)
    for step in (1, 2, 3):
        assert f"step-{step:08d}: __0_0.distcp has 0 bytes" in str(caught.value)
    assert "checkpoint.restart=true" in str(caught.value)
    assert folders(run) == before
    with pytest.raises(CheckpointError, match="none of them can be used"):  # eval, export and report say the same
        newest_complete(open_folder(run))


def test_a_run_begins_anew_on_purpose_and_then_goes_on(run: Path) -> None:
    empty_shards(run)
    assert go_on(run, "checkpoint.restart=true", "checkpoint.every_steps=2")["steps_this_start"] == 5
    assert sum(name.startswith("dropped-step-") for name in folders(run)) == 3
    assert [record["step"] for record in read_journal(run) if record["type"] == "resume"] == [-1]
    again = go_on(run, "checkpoint.restart=true", "train.steps=7")  # the same command after the next crash
    assert (again["steps_this_start"], again["step"]) == (2, 7)


@pytest.mark.parametrize("lost", ["deleted", "moved"])
def test_checkpoints_that_are_gone_are_missed(run: Path, lost: str) -> None:
    if lost == "deleted":
        shutil.rmtree(run / "checkpoints")
    else:
        (run / "checkpoints").rename(run / "checkpoints.old")
    with pytest.raises(CheckpointError, match="the journal says that step 3 was saved, and no checkpoint is there"):
        go_on(run)
    assert go_on(run, "checkpoint.restart=true")["steps_this_start"] == 5


@pytest.mark.parametrize("name", ["COMPLETE", "run.json"])
def test_what_cannot_be_read_is_not_damaged(run: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    before = folders(run)
    with monkeypatch.context() as patched:
        fail_to_read(patched, name)
        with pytest.raises((CheckpointError, OSError), match="Input/output error"):
            go_on(run)
        with pytest.raises(OSError, match="Input/output error"):
            newest_complete(open_folder(run))
    assert folders(run) == before
    assert go_on(run)["steps_this_start"] == 2


def test_a_run_that_died_before_its_first_checkpoint_begins_again(tiny_dataset: Path, tmp_path: Path) -> None:
    run_here(overrides_of(tiny_dataset, tmp_path, "run", *SMALL, "train.steps=2"))
    run = tmp_path / "run"
    (run / "checkpoints" / "step-00000002" / "COMPLETE").unlink()  # killed while it saved for the first time
    lines = [line for line in (run / "journal.jsonl").read_text().splitlines() if "checkpoint_saved" not in line]
    (run / "journal.jsonl").write_text("\n".join(lines) + "\n")
    assert go_on(run, "checkpoint.every_steps=1")["steps_this_start"] == 5
    assert any(name.startswith("torn-step-00000002") for name in folders(run))


# -- by identity, not by name -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("elsewhere", [False, True], ids=["in the run", "in checkpoint.folder"])
def test_a_renamed_run_goes_on(tiny_dataset: Path, tmp_path: Path, elsewhere: bool, capfd: Any) -> None:
    folder = [f"checkpoint.folder={tmp_path / 'kept'}"] if elsewhere else []
    run_here(overrides_of(tiny_dataset, tmp_path, "before", *SMALL, *EVERY_STEP, *folder))
    (tmp_path / "before").rename(tmp_path / "after")
    uid = identity(tmp_path / "after")["run_uid"]
    assert go_on(tmp_path / "after")["steps_this_start"] == 2
    assert "goes on as" in capfd.readouterr().err
    assert (identity(tmp_path / "after")["run_uid"], identity(tmp_path / "after")["name"]) == (uid, "after")
    assert not (tmp_path / "before").exists()
    newest = newest_complete(open_folder(tmp_path / "after"))
    assert newest is not None
    assert step_of(newest) == 5


def test_a_relative_folder_is_found_from_elsewhere(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_here(overrides_of(tiny_dataset, tmp_path, "run", *SMALL, *EVERY_STEP, "checkpoint.folder=kept"))
    (tmp_path / "deeper").mkdir()
    monkeypatch.chdir(tmp_path / "deeper")
    newest = newest_complete(open_folder(tmp_path / "run"))
    assert newest is not None
    assert step_of(newest) == 3
    assert go_on(tmp_path / "run")["steps_this_start"] == 2


def test_two_runs_do_not_save_to_one_folder(tiny_dataset: Path, tmp_path: Path) -> None:
    kept = f"checkpoint.folder={tmp_path / 'kept'}"
    run_here(overrides_of(tiny_dataset, tmp_path / "a", "run", *SMALL, *EVERY_STEP, kept))
    run_here(overrides_of(tiny_dataset, tmp_path / "b", "run", *SMALL, *EVERY_STEP))
    with pytest.raises(ConfigError, match=r"kept/run/step-00000003 belongs to another run"):
        go_on(tmp_path / "b" / "run", kept)


# -- copies -----------------------------------------------------------------------------------------------------------


def test_a_copy_becomes_a_run_of_its_own(run: Path, tmp_path: Path, capfd: Any) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "mlflow.json").write_text("{}")
    assert go_on(copy, "optim.lr=1e-2")["steps_this_start"] == 2
    assert "is a copy of" in capfd.readouterr().err
    assert not (copy / "mlflow.json").exists()  # else both curves would go to one run of MLflow
    mine, parents = identity(copy), identity(run)
    assert mine["run_uid"] != parents["run_uid"]
    assert mine["parent_run"] == {**{name: parents[name] for name in ("run_uid", "name", "folder")}, "step": 3}
    assert [record["run_uid"] for record in read_journal(copy) if record["type"] == "run"][-1] == mine["run_uid"]
    assert go_on(run)["steps_this_start"] == 2  # the original knows nothing of it
    assert identity(run)["run_uid"] == parents["run_uid"]
    assert go_on(copy, "train.steps=6")["steps_this_start"] == 1
    assert identity(copy)["run_uid"] == mine["run_uid"]


def test_a_copy_does_not_follow_its_parent(tiny_dataset: Path, tmp_path: Path) -> None:
    """Where checkpoints lie outside of the run's folder, both know the same ones."""
    run = tmp_path / "run"
    overrides = overrides_of(
        tiny_dataset, tmp_path, "run", *SMALL, *EVERY_STEP, f"checkpoint.folder={tmp_path / 'kept'}"
    )
    run_here(overrides)
    shutil.copytree(run, tmp_path / "copy")
    assert go_on(tmp_path / "copy", "train.steps=4")["steps_this_start"] == 1
    assert go_on(run)["steps_this_start"] == 2
    assert go_on(tmp_path / "copy")["steps_this_start"] == 1  # from its own step 4, not from its parent's 5


@pytest.mark.parametrize("step", [None, 1])
def test_fork(run: Path, tmp_path: Path, step: int | None, capsys: pytest.CaptureFixture[str]) -> None:
    at = [] if step is None else ["--at", str(step)]
    assert main(["fork", str(run), str(tmp_path / "fork"), *at, "--json"]) == 0
    begin = step or 3
    assert json.loads(capsys.readouterr().out)["step"] == begin
    assert go_on(tmp_path / "fork")["steps_this_start"] == 5 - begin
    assert identity(tmp_path / "fork")["parent_run"]["step"] == begin
    assert go_on(run)["step"] == 5
    assert_same_weights(run, tmp_path / "fork")  # the same settings lead to the same run


def test_forks_that_cannot_be(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no complete checkpoint of step 7; it has those of steps: 1, 2, 3"):
        fork_run(run, tmp_path / "fork", at=7)
    with pytest.raises(ValueError, match="is no run"):
        fork_run(tmp_path, tmp_path / "fork")
    with pytest.raises(ValueError, match="exists"):
        fork_run(run, run)
    assert not (tmp_path / "fork").exists()


# -- earlier versions -------------------------------------------------------------------------------------------------


def test_a_run_of_the_first_format_goes_on(tiny_dataset: Path, tmp_path: Path) -> None:
    """2 of 4 steps by the first version that we keep; it went on with the losses below."""
    with tarfile.open(Path(__file__).parent / "run_0.1.0.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    run = tmp_path / "run"
    uid = identity(run)["run_uid"]
    config = run / "config.yaml"
    more = ["train.steps=4", f"data.train={tiny_dataset}"]
    summary = train(load_config(config, more), config_path=config, overrides=more)
    assert summary["steps_this_start"] == 2
    assert (identity(run)["run_uid"], identity(run)["format"]) == (uid, 1)
    assert [losses(run)[step] for step in (3, 4)] == pytest.approx([1.44208824634552, 1.0146657228469849], rel=1e-5)


def test_a_key_that_a_newer_version_added_has_its_default(run: Path) -> None:
    saved = run / "config.yaml"
    text = saved.read_text()
    assert "  init_from: null\n" in text
    saved.write_text(text.replace("  init_from: null\n", "", 1))
    assert go_on(run)["steps_this_start"] == 2


def test_a_key_of_another_version_is_named(run: Path) -> None:
    config = load_config(run / "config.yaml")
    saved = run / "config.yaml"
    saved.write_text(saved.read_text().replace("objective:\n", "objective:\n  of_tomorrow: 1\n", 1))
    with pytest.raises(ConfigError, match=r"of_tomorrow.*begun by another version"):
        train(config, config_path=saved)


def test_another_objective_is_still_refused(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"-\s+mask_ratio: 0.75\n\+\s+mask_ratio: 0.5"):
        go_on(run, "objective.model.mask_ratio=0.5")
