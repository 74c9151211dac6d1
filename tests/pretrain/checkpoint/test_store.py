"""Checkpoints in object stores: on a server that speaks S3's protocol, in fsspec's memory, and in one with faults."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

import pretrain.checkpoint.saver as saver_module
from pretrain.checkpoint.checkpoints import Checkpoints
from pretrain.checkpoint.config import CheckpointConfig
from pretrain.checkpoint.errors import CheckpointError
from pretrain.checkpoint.folder import Folder
from pretrain.checkpoint.open_folder import StoreFolder, open_folder
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
from tests.pretrain.runs import losses, overrides_of, run_here

WORLD = World(0, 1, 0, torch.device("cpu"), None, None)


def _state(value: float) -> dict[str, dict[str, torch.Tensor]]:
    weights = {"layer.weight": torch.full((300, 400), value), "layer.bias": torch.arange(8.0) + value}
    return {"model.model": weights, "optimizer.model": {"layer.weight.step": torch.tensor(value)}}


def _saved(run_dir: Path, config: CheckpointConfig, *steps: int) -> Saver:
    saver = Saver(Checkpoints(run_dir, config, WORLD))
    for step in steps:
        saver.save(step, _state(float(step)), {"position": step, "run_uid": "abc"}, "name: run\n")
        saver.wait()
    return saver


def _steps(folder: Folder) -> list[int]:
    return [step_of(place) for place in list_checkpoints(folder) if find_damage(place) is None]


@pytest.fixture
def memory() -> Iterator[str]:
    """A folder of fsspec's memory."""
    url = f"memory://{uuid.uuid4().hex}"
    yield url
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture(params=["memory", "s3"])
def bucket(request: pytest.FixtureRequest, memory: str) -> Iterator[str]:
    if request.param == "memory":
        yield memory
        return
    pytest.importorskip("moto.server", reason="the S3 server of moto is not installed")
    from tests.data_pipes.store.s3_server import s3_server

    with s3_server() as url:
        yield f"{url}/checkpoints"


def test_save_list_verify_load_retire(bucket: str, tmp_path: Path) -> None:
    config = CheckpointConfig(folder=bucket, keep_last=2, keep_every=4)
    saver = _saved(tmp_path / "run", config, 4, 5, 6, 7)
    folder = saver.checkpoints.folder
    assert str(folder) == f"{bucket}/run"
    assert _steps(folder) == [4, 6, 7]
    newest = newest_complete(open_folder(f"{bucket}/run"))
    assert newest is not None
    assert str(newest) == f"{bucket}/run/step-00000007"
    complete = read_complete(newest)
    assert (complete["step"], complete["run_uid"]) == (7, "abc")
    assert set(complete["files"]) == set(newest.files()) - {"COMPLETE"}
    assert torch.equal(load_weights(open_folder(str(newest)), "model")["layer.bias"], torch.arange(8.0) + 7)
    state = _state(0.0)
    assert saver.checkpoints.load(newest, state)["position"] == 7
    assert torch.equal(state["model.model"]["layer.weight"], torch.full((300, 400), 7.0))
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("damage", ["no COMPLETE", "missing", "truncated", "flipped"])
def test_damage_is_found_and_the_one_before_is_used(
    memory: str, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = CheckpointConfig(folder=memory, keep_last=3)
    newest = _saved(tmp_path / "run", config, 1, 2).checkpoints.folder / "step-00000002"
    assert isinstance(newest, StoreFolder)
    shard = "__0_0.distcp"
    content = bytearray(newest.open(shard).read())
    if damage == "no COMPLETE":
        newest.connection.file_system.rm(f"{newest}/COMPLETE")
    elif damage == "missing":
        newest.connection.file_system.rm(f"{newest}/{shard}")
    elif damage == "truncated":
        newest.write(shard, bytes(content[:-1]))
    else:
        content[-1] ^= 0xFF
        newest.write(shard, bytes(content))
    saver = Saver(Checkpoints(tmp_path / "run", config, WORLD))
    found = saver.checkpoints.find()
    assert found is not None
    assert step_of(found) == 1
    assert "step-00000002 is not used" in caplog.text
    assert [event["event"] for event in saver.checkpoints.take_events()] == ["damaged"]
    assert "COMPLETE" in newest.files() or damage == "no COMPLETE"
    saver.save(2, _state(20.0), {"position": 2}, "name: run\n")  # the torn one is moved out of the way
    saver.wait()
    assert _steps(saver.checkpoints.folder) == [1, 2]
    names = [folder.name for folder in saver.checkpoints.folder.subfolders()]
    assert len([name for name in names if name.startswith("torn-step-00000002-")]) == 1


def test_later_ones_are_set_aside_after_a_rollback(bucket: str, tmp_path: Path) -> None:
    saver = _saved(tmp_path / "run", CheckpointConfig(folder=bucket, keep_last=4), 1, 2, 3)
    found = saver.checkpoints.find(up_to_step=1)
    assert found is not None
    assert step_of(found) == 1
    saver.checkpoints.discard_after(1)
    assert _steps(saver.checkpoints.folder) == [1]
    saver.save(2, _state(20.0), {"position": 2}, "name: run\n")  # the step comes again, with other weights
    saver.wait()
    assert load_weights(saver.checkpoints.folder / "step-00000002", "model")["layer.bias"][0] == 20.0


def test_a_run_goes_on_from_a_store_on_another_machine(bucket: str, tiny_dataset: Path, tmp_path: Path) -> None:
    """The run's folder is lost with its machine; the same configuration goes on from the store, to the bit."""
    more = ["checkpoint.every_steps=3", f"checkpoint.folder={bucket}"]
    whole = run_here(overrides_of(tiny_dataset, tmp_path, "whole", "train.steps=9", *more))
    run_here(overrides_of(tiny_dataset, tmp_path, "cut", "train.steps=9", *more))
    last = newest_complete(open_folder(tmp_path / "cut"))
    assert last is not None
    last.remove()
    last.write("__0_0.distcp", b"torn")  # killed while it was saved again: there is no config.yaml in it
    before = losses(tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut")
    summary = run_here(overrides_of(tiny_dataset, tmp_path, "cut", "train.steps=9", *more))
    assert (whole["steps_this_start"], summary["steps_this_start"]) == (9, 3)
    assert before | losses(tmp_path / "cut") == losses(tmp_path / "whole")
    ends = [
        newest_complete(open_folder(tmp_path / name)) for name in ("whole", "cut")
    ]  # found by the run's config.yaml
    assert all(isinstance(end, StoreFolder) and step_of(end) == 9 for end in ends)
    first, second = (load_weights(end, "model") for end in ends if end is not None)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert ends[0] is not None
    assert load_run_config(ends[0]).name == "whole"


def test_a_changed_folder_does_not_hide_what_was_saved_before(memory: str, tmp_path: Path) -> None:
    _saved(tmp_path / "run", CheckpointConfig(), 1)
    moved = Checkpoints(tmp_path / "run", CheckpointConfig(folder=memory), WORLD)
    assert moved.find() == open_folder(tmp_path / "run" / "checkpoints" / "step-00000001")
    _saved(tmp_path / "run", CheckpointConfig(folder=memory), 2)
    assert str(moved.find()) == f"{memory}/run/step-00000002"


@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        ("https://host/x", "cannot be saved to"),
        ("hf://buckets/x", "cannot be saved to"),
        ("pipe:cat", "shell"),
        ("simplecache::s3://b/x", "chained"),
        ("s3://key:secret@b/x", "a user or password"),
        ("ftp://host/x", "not allowed"),
    ],
)
def test_urls_that_are_no_place_for_checkpoints(folder: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        CheckpointConfig(folder=folder)


class _FaultyFile(MemoryFile):
    def write(self, data: Any) -> int:
        if _Faulty.broken == "write" and self.tell() + len(data) > 100_000:
            raise OSError(errno.EIO, "the store broke the connection")
        return super().write(data)


class _Faulty(MemoryFileSystem):
    """fsspec's memory, broken on demand."""

    protocol = "memory"
    broken = ""

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if "w" not in mode:
            return super()._open(path, mode, **options)
        if self.broken == "open":
            raise PermissionError(errno.EACCES, "Forbidden")
        file = _FaultyFile(self, self._strip_protocol(path), options.get("data"))
        file.commit()
        return file

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        if self.broken == "COMPLETE" and path.endswith("COMPLETE"):
            raise OSError(errno.EIO, "the store is away")
        super().pipe_file(path, value, mode, **options)

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        if self.broken == "ls":
            raise OSError(errno.EIO, "the store is away")
        return super().ls(path, detail, **options)


@pytest.fixture
def faulty(memory: str) -> Iterator[str]:
    before = fsspec.get_filesystem_class("memory")
    fsspec.register_implementation("memory", _Faulty, clobber=True)
    yield memory
    _Faulty.broken = ""
    fsspec.register_implementation("memory", before, clobber=True)


@pytest.mark.parametrize("broken", ["write", "open", "COMPLETE", "ls"])
def test_a_store_with_faults(
    faulty: str, tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The same outcomes as with a disk: the save fails, loudly, and what was good stays so."""
    saver = _saved(tmp_path / "run", CheckpointConfig(folder=faulty), 1)
    folder = saver.checkpoints.folder
    assert isinstance(folder, StoreFolder)
    storage = folder.connection.storage
    monkeypatch.setattr(storage, "config", dataclasses.replace(storage.config, retries=1, backoff_s=0.0))
    storage.close()
    _Faulty.broken = broken
    saver.save(2, _state(2.0), {"position": 2}, "name: run\n")
    with pytest.raises(CheckpointError, match=r"the store broke|Forbidden|access denied|the store is away"):
        saver.wait()
    if broken == "ls":
        with pytest.raises(CheckpointError, match="cannot be listed"):
            Checkpoints(tmp_path / "run", CheckpointConfig(folder=faulty), WORLD).find()
    _Faulty.broken = ""
    assert saver.stats()["checkpoint/failed"] == 1
    assert "A checkpoint was not saved (step 2" in caplog.text
    assert _steps(saver.checkpoints.folder) == [1]
    assert list_checkpoints(saver.checkpoints.folder) == [saver.checkpoints.folder / "step-00000001"] or broken == "ls"
    monkeypatch.setattr(saver_module, "_RETRY_S", 0.0)
    saver.save(3, _state(3.0), {"position": 3}, "name: run\n", last=True)
    saver.wait()
    assert _steps(saver.checkpoints.folder) == [1, 3]


def test_a_folder_is_its_path_or_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, remote = open_folder(tmp_path), open_folder("s3://bucket/a/run/")
    assert here == open_folder(str(tmp_path)) == open_folder(f"file://{tmp_path}")
    assert remote == open_folder("s3://bucket/a/run")
    assert len({here, open_folder(tmp_path), remote, open_folder("s3://bucket/a/run")}) == 2
    assert (here.local_path, remote.local_path) == (tmp_path, None)
    for folder, text in ((here, str(tmp_path)), (remote, "s3://bucket/a/run")):
        step = folder / "step-1"
        assert (str(step), step.name, step.parent) == (f"{text}/step-1", "step-1", folder)
        assert str(folder.parent) == text.rpartition("/")[0]
    monkeypatch.chdir(tmp_path)
    assert (open_folder(".").name, open_folder(".").parent) == (tmp_path.name, open_folder(tmp_path.parent))


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_the_operations_on_a_folder(kind: str, memory: str, tmp_path: Path) -> None:
    """The same on a disk and in a store."""
    run = open_folder(tmp_path / "run" if kind == "local" else f"{memory}/run")
    folder = run / "step-00000001"
    assert not folder.exists()
    assert (folder.files(), run.subfolders()) == ({}, [])
    folder.remove()  # nothing
    folder.make()
    folder.write("COMPLETE", b"{}")
    with folder.create("tensors") as stream:
        stream.write(b"12345")
    assert stream.fingerprint == (5, hashlib.sha256(b"12345").hexdigest())
    assert folder.exists()
    assert (folder.files(), run.files()) == ({"COMPLETE": 2, "tensors": 5}, {})
    assert run.subfolders() == [folder]
    assert folder.read("COMPLETE") == b"{}"
    with folder.open("tensors") as file:
        file.seek(2)
        assert file.read() == b"345"
    with pytest.raises(FileNotFoundError):
        folder.read("absent")
    folder.rename("torn-1")
    assert run.subfolders() == [run / "torn-1"]
    assert (run / "torn-1").files() == {"COMPLETE": 2, "tensors": 5}
    (run / "torn-1").remove()
    assert not (run / "torn-1").exists()


def test_a_run_is_found_by_its_folder_and_by_that_of_its_checkpoints(memory: str, tmp_path: Path) -> None:
    """Both kinds alike; config.yaml says where the checkpoints of a run's folder lie."""
    _saved(tmp_path / "run", CheckpointConfig(), 1)
    _saved(tmp_path / "run", CheckpointConfig(folder=memory), 2)
    assert _steps(open_folder(tmp_path / "run")) == _steps(open_folder(tmp_path / "run" / "checkpoints")) == [1]
    assert _steps(open_folder(f"{memory}/run")) == [2]
    (tmp_path / "run" / "config.yaml").write_text(f"checkpoint: {{folder: {memory}}}\n")
    assert _steps(open_folder(tmp_path / "run")) == [2]
    MemoryFileSystem().pipe_file(f"{memory}/whole/checkpoints/step-00000003/COMPLETE", b"")
    assert [step_of(folder) for folder in list_checkpoints(open_folder(f"{memory}/whole"))] == [3]
