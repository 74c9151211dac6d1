"""Checkpoints from outside: what is complete, what is kept, and what a hostile one cannot do."""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader

from pretrain.checkpoint.checkpoints import Checkpoints
from pretrain.checkpoint.config import CheckpointConfig
from pretrain.checkpoint.errors import CheckpointError
from pretrain.checkpoint.folder import Folder
from pretrain.checkpoint.open_folder import open_folder
from pretrain.checkpoint.read import (
    find_damage,
    list_checkpoints,
    load_weights,
    newest_complete,
    read_complete,
    step_of,
)
from pretrain.checkpoint.saver import Saver
from pretrain.config import load_run_config
from pretrain.parallel.world import World
from tests.pretrain.runs import overrides_of, run_here

WORLD = World(0, 1, 0, torch.device("cpu"), None, None)
CONFIG = "name: run\n"


def _newest_step(run_dir: Path) -> int:
    newest = newest_complete(open_folder(run_dir))
    assert newest is not None
    return step_of(newest)


def _path(folder: Folder) -> Path:
    """Where a local folder lies."""
    assert folder.local_path is not None
    return folder.local_path


def _state(value: float) -> dict[str, dict[str, torch.Tensor]]:
    weights = {"layer.weight": torch.full((8, 4), value), "layer.bias": torch.arange(8.0) + value}
    return {"model.model": weights, "optimizer.model": {"layer.weight.step": torch.tensor(value)}}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with complete checkpoints of steps 1 to 3."""
    saver = Saver(Checkpoints(tmp_path, CheckpointConfig(keep_last=3), WORLD))
    for step in (1, 2, 3):
        saver.save(step, _state(float(step)), {"position": step * 8, "run_uid": "abc"}, CONFIG)
    saver.wait()
    saver.close()
    return tmp_path


def test_what_is_saved_is_what_it_was_when_save_was_called(tmp_path: Path) -> None:
    """The copy is taken before `save` returns: the next step may change the tensors at once."""
    saver = Saver(Checkpoints(tmp_path, CheckpointConfig(), WORLD))
    state = {"model.model": {"weight": torch.zeros(2_000_000)}}
    saver.save(1, state, {"position": 8}, CONFIG)
    state["model.model"]["weight"].fill_(1.0)
    saver.wait()
    saved = newest_complete(open_folder(tmp_path))
    assert saved is not None
    assert load_weights(saved, "model")["weight"].abs().max() == 0


def test_a_save_that_fails_is_loud_and_the_next_one_works(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = Saver(Checkpoints(tmp_path, CheckpointConfig(), WORLD))
    saver.save(1, _state(1.0), {"position": 8}, CONFIG)
    saver.wait()
    broken = {"model.model": {"weight": torch.zeros(2)}}
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        saver.save(2, broken, {"position": 16}, CONFIG)
        saver.save(3, broken, {"position": 24}, CONFIG)  # waits for the failed one and goes on
        with pytest.raises((CheckpointError, OSError), match="No space"):
            saver.wait()
    assert "A checkpoint was not saved" in caplog.text
    assert _newest_step(tmp_path) == 1
    saver.save(3, _state(3.0), {"position": 24}, CONFIG)
    saver.wait()
    assert _newest_step(tmp_path) == 3


def test_complete_lists_every_file(run: Path) -> None:
    newest = newest_complete(open_folder(run))
    assert newest is not None
    complete = read_complete(newest)
    assert (complete["step"], complete["position"], complete["run_uid"]) == (3, 24, "abc")
    assert set(complete["files"]) == set(newest.files()) - {"COMPLETE"}
    assert find_damage(newest) is None
    assert torch.equal(load_weights(newest, "model")["layer.bias"], torch.arange(8.0) + 3)


def test_retention_keeps_the_last_and_the_multiples(tmp_path: Path) -> None:
    saver = Saver(Checkpoints(tmp_path, CheckpointConfig(keep_last=2, keep_every=3), WORLD))
    for step in range(1, 9):
        saver.save(step, _state(1.0), {"position": step}, CONFIG)
    saver.wait()
    assert [step_of(path) for path in list_checkpoints(open_folder(tmp_path))] == [3, 6, 7, 8]


@pytest.mark.parametrize("damage", ["no COMPLETE", "half COMPLETE", "missing", "truncated", "flipped", "no metadata"])
def test_damage_is_found_and_the_one_before_is_used(run: Path, damage: str) -> None:
    newest = _path(list_checkpoints(open_folder(run))[-1])
    shard = next(newest.glob("*.distcp"))
    if damage == "no COMPLETE":
        (newest / "COMPLETE").unlink()
    elif damage == "half COMPLETE":
        text = (newest / "COMPLETE").read_text()
        (newest / "COMPLETE").write_text(text[: len(text) // 2])
    elif damage == "missing":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "flipped":
        content = bytearray(shard.read_bytes())
        content[-1] ^= 0xFF
        shard.write_bytes(content)
    else:
        (newest / ".metadata").unlink()
    before = sorted(path.name for path in newest.iterdir())
    found = Checkpoints(run, CheckpointConfig(), WORLD).find()
    assert found is not None
    assert step_of(found) == 2
    assert sorted(path.name for path in newest.iterdir()) == before  # never deleted silently


class _Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("where", ["metadata", "shard"])
def test_a_pickle_in_a_checkpoint_is_not_run(run: Path, tmp_path: Path, where: str) -> None:
    checkpoint, marker = list_checkpoints(open_folder(run))[-1], tmp_path / "marker"
    path = _path(checkpoint)
    if where == "metadata":
        (path / ".metadata").write_bytes(pickle.dumps(_Bomb(marker)))
    else:
        shard = next(path.glob("*.distcp"))
        bomb = io.BytesIO()
        torch.save(_Bomb(marker), bomb, _use_new_zipfile_serialization=False)
        shard.write_bytes(bomb.getvalue().ljust(shard.stat().st_size, b"\0"))
    with pytest.raises(CheckpointError) as caught:
        load_weights(checkpoint, "model")
    assert not marker.exists()
    if where == "metadata":
        assert "nothing was executed" in str(caught.value)
        assert "mkdir" in str(caught.value)
        with pytest.raises(AttributeError):
            FileSystemReader(path).read_metadata()
        assert marker.exists()  # torch's own reader runs it: this test can fail


def test_entries_that_are_no_tensors_and_paths_that_leave_are_refused(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    with pytest.warns(UserWarning, match="single process"):
        save(
            {"model.model": {"weight": torch.zeros(2), "note": {"a", "set"}}}, storage_writer=FileSystemWriter(tmp_path)
        )
    with pytest.raises(CheckpointError, match="BytesStorageMetadata, which no description of tensors needs"):
        load_weights(open_folder(tmp_path), "model")


def test_another_shape_or_a_missing_average_is_said(run: Path) -> None:
    checkpoints = Checkpoints(run, CheckpointConfig(), WORLD)
    newest = list_checkpoints(open_folder(run))[-1]
    state = _state(0.0)
    state["model.model"]["layer.bias"] = torch.zeros(9)
    with pytest.raises(CheckpointError, match=r"layer\.bias has shape \(8,\)"):
        checkpoints.load(newest, state)
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors .* ema\.model\.layer\.bias"):
        checkpoints.load(newest, _state(0.0) | {"ema.model": {"layer.bias": torch.zeros(8)}})
    with pytest.raises(CheckpointError, match="no moving average"):
        load_weights(newest, "model", ema=True)
    newest.remove()
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_weights(newest, "model")


def test_a_run_leaves_what_evaluation_needs(tiny_dataset: Path, tmp_path: Path) -> None:
    overrides = overrides_of(tiny_dataset, tmp_path, "run", "train.steps=3", "checkpoint.every_steps=2")
    summary = run_here(overrides)
    checkpoint = open_folder(str(summary["checkpoint"]))
    config = load_run_config(checkpoint)
    weights = load_weights(checkpoint, "model")
    with torch.device("meta"):
        expected = config.build_objective().players["model"].state_dict()
    assert {name: tensor.shape for name, tensor in weights.items()} == {n: t.shape for n, t in expected.items()}
    average = load_weights(checkpoint, "model", ema=True)
    assert not torch.equal(weights["decoder.pred.weight"], average["decoder.pred.weight"])
    loop = json.loads(checkpoint.read("state.json"))
    assert loop["order"]["position"] == 24
