"""Checkpoints in object stores: on a server that speaks S3's protocol, in fsspec's memory, and in one with faults."""

from __future__ import annotations

import dataclasses
import errno
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
from data_pipes.store.transport import StorageConfig
from pretrain.checkpoint.checkpointer import Checkpointer
from pretrain.checkpoint.config import CheckpointConfig
from pretrain.checkpoint.errors import CheckpointError
from pretrain.checkpoint.read import (
    find_damage,
    list_checkpoints,
    load_weights,
    newest_complete,
    read_complete,
    step_of,
)
from pretrain.checkpoint.store import ObjectStore, Place, RemoteFolder, place_of, store_of
from pretrain.config import load_run_config
from pretrain.parallel.world import World
from tests.pretrain.runs import losses, overrides_of, run_here

WORLD = World(0, 1, 0, torch.device("cpu"), None, None)


def _state(value: float) -> dict[str, dict[str, torch.Tensor]]:
    weights = {"layer.weight": torch.full((300, 400), value), "layer.bias": torch.arange(8.0) + value}
    return {"model.model": weights, "optimizer.model": {"layer.weight.step": torch.tensor(value)}}


def _saved(run_dir: Path, config: CheckpointConfig, *steps: int) -> Checkpointer:
    checkpointer = Checkpointer(run_dir, config, WORLD)
    for step in steps:
        checkpointer.save(step, _state(float(step)), {"position": step, "run_uid": "abc"}, "name: run\n")
        checkpointer.wait()
    return checkpointer


def _steps(folder: Place) -> list[int]:
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
    checkpointer = _saved(tmp_path / "run", config, 4, 5, 6, 7)
    folder = checkpointer.folder
    assert str(folder) == f"{bucket}/run"
    assert _steps(folder) == [4, 6, 7]
    newest = newest_complete(f"{bucket}/run")
    assert newest is not None
    assert str(newest) == f"{bucket}/run/step-00000007"
    complete = read_complete(newest)
    assert (complete["step"], complete["run_uid"]) == (7, "abc")
    assert set(complete["files"]) == set(store_of(newest).files(newest)) - {"COMPLETE"}
    assert torch.equal(load_weights(str(newest), "model")["layer.bias"], torch.arange(8.0) + 7)
    state = _state(0.0)
    assert checkpointer.load(newest, state)["position"] == 7
    assert torch.equal(state["model.model"]["layer.weight"], torch.full((300, 400), 7.0))
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("damage", ["no COMPLETE", "missing", "truncated", "flipped"])
def test_damage_is_found_and_the_one_before_is_used(
    memory: str, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = CheckpointConfig(folder=memory, keep_last=3)
    newest = _saved(tmp_path / "run", config, 1, 2).folder / "step-00000002"
    assert isinstance(newest, RemoteFolder)
    store, shard = store_of(newest), "__0_0.distcp"
    content = bytearray(store.open(newest, shard).read())
    if damage == "no COMPLETE":
        newest.store._fs.rm(f"{newest.url}/COMPLETE")
    elif damage == "missing":
        newest.store._fs.rm(f"{newest.url}/{shard}")
    elif damage == "truncated":
        store.write(newest, shard, bytes(content[:-1]))
    else:
        content[-1] ^= 0xFF
        store.write(newest, shard, bytes(content))
    checkpointer = Checkpointer(tmp_path / "run", config, WORLD)
    found = checkpointer.find()
    assert found is not None
    assert step_of(found) == 1
    assert "step-00000002 is not used" in caplog.text
    assert [event["event"] for event in checkpointer.take_events()] == ["damaged"]
    assert "COMPLETE" in store.files(newest) or damage == "no COMPLETE"
    checkpointer.save(2, _state(20.0), {"position": 2}, "name: run\n")  # the torn one is moved out of the way
    checkpointer.wait()
    assert _steps(checkpointer.folder) == [1, 2]
    torn = [name for name in store.subfolders(checkpointer.folder) if name.startswith("torn-step-00000002-")]
    assert len(torn) == 1


def test_later_ones_are_set_aside_after_a_rollback(bucket: str, tmp_path: Path) -> None:
    checkpointer = _saved(tmp_path / "run", CheckpointConfig(folder=bucket, keep_last=4), 1, 2, 3)
    found = checkpointer.find(up_to_step=1)
    assert found is not None
    assert step_of(found) == 1
    checkpointer.discard_after(1)
    assert _steps(checkpointer.folder) == [1]
    checkpointer.save(2, _state(20.0), {"position": 2}, "name: run\n")  # the step comes again, with other weights
    checkpointer.wait()
    assert load_weights(checkpointer.folder / "step-00000002", "model")["layer.bias"][0] == 20.0


def test_a_run_goes_on_from_a_store_on_another_machine(bucket: str, tiny_dataset: Path, tmp_path: Path) -> None:
    """The run's folder is lost with its machine; the same configuration goes on from the store, to the bit."""
    more = ["checkpoint.every_steps=3", f"checkpoint.folder={bucket}"]
    whole = run_here(overrides_of(tiny_dataset, tmp_path, "whole", "train.steps=9", *more))
    run_here(overrides_of(tiny_dataset, tmp_path, "cut", "train.steps=9", *more))
    last = newest_complete(tmp_path / "cut")
    assert last is not None
    store_of(last).remove(last)
    before = losses(tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut")
    summary = run_here(overrides_of(tiny_dataset, tmp_path, "cut", "train.steps=9", *more))
    assert (whole["steps_this_start"], summary["steps_this_start"]) == (9, 3)
    assert before | losses(tmp_path / "cut") == losses(tmp_path / "whole")
    ends = [newest_complete(tmp_path / name) for name in ("whole", "cut")]  # found by the run's config.yaml
    assert all(isinstance(end, RemoteFolder) and step_of(end) == 9 for end in ends)
    first, second = (load_weights(end, "model") for end in ends if end is not None)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert ends[0] is not None
    assert load_run_config(ends[0]).name == "whole"


def test_a_changed_folder_does_not_hide_what_was_saved_before(memory: str, tmp_path: Path) -> None:
    _saved(tmp_path / "run", CheckpointConfig(), 1)
    moved = Checkpointer(tmp_path / "run", CheckpointConfig(folder=memory), WORLD)
    assert moved.find() == tmp_path / "run" / "checkpoints" / "step-00000001"
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
    checkpointer = _saved(tmp_path / "run", CheckpointConfig(folder=faulty), 1)
    assert isinstance(checkpointer.folder, RemoteFolder)
    monkeypatch.setattr(checkpointer.folder.store._storage, "config", _quick(checkpointer.folder.store))
    checkpointer.folder.store._storage.close()
    _Faulty.broken = broken
    checkpointer.save(2, _state(2.0), {"position": 2}, "name: run\n")
    with pytest.raises(CheckpointError, match=r"the store broke|Forbidden|access denied|the store is away"):
        checkpointer.wait()
    if broken == "ls":
        with pytest.raises(CheckpointError, match="cannot be listed"):
            Checkpointer(tmp_path / "run", CheckpointConfig(folder=faulty), WORLD).find()
    _Faulty.broken = ""
    assert checkpointer.stats()["checkpoint/failed"] == 1
    assert "A checkpoint was not saved (step 2" in caplog.text
    assert _steps(checkpointer.folder) == [1]
    assert list_checkpoints(checkpointer.folder) == [checkpointer.folder / "step-00000001"] or broken == "ls"
    monkeypatch.setattr(saver_module, "_RETRY_S", 0.0)
    checkpointer.save(3, _state(3.0), {"position": 3}, "name: run\n", last=True)
    checkpointer.wait()
    assert _steps(checkpointer.folder) == [1, 3]


def _quick(store: ObjectStore) -> StorageConfig:
    return dataclasses.replace(store._storage.config, retries=1, backoff_s=0.0)


def test_places_are_told_apart(tmp_path: Path) -> None:
    assert place_of(str(tmp_path)) == tmp_path
    assert place_of(f"file://{tmp_path}") == tmp_path
    remote = place_of("s3://bucket/a/run/")
    assert isinstance(remote, RemoteFolder)
    assert (str(remote / "step-1"), (remote / "step-1").name, str(remote.parent)) == (
        "s3://bucket/a/run/step-1",
        "step-1",
        "s3://bucket/a",
    )
    assert remote == place_of("s3://bucket/a/run")
