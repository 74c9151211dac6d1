"""What broken storage does to a run: every outcome that the head of pretrain/checkpoint/checkpoints.py promises.

Where a mount is allowed the disks are real ones (a small tmpfs that fills up or turns read-only).
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import pretrain.checkpoint.saver as saver_module
import pretrain.checkpoint.write as write_module
from pretrain.checkpoint.checkpoints import Checkpoints
from pretrain.checkpoint.config import CheckpointConfig
from pretrain.checkpoint.errors import CheckpointError
from pretrain.checkpoint.open_folder import LocalFolder, open_folder
from pretrain.checkpoint.read import find_damage, list_checkpoints, newest_complete, step_of
from pretrain.checkpoint.saver import Saver
from pretrain.parallel.world import World
from tests.process_server import ProcessServer
from tests.processes import PATIENCE_S

WORLD = World(0, 1, 0, torch.device("cpu"), None, None)
CONFIG = "name: run\n"
NUM_VALUES = 100_000  # 400 kB per save


def _save(saver: Saver, step: int, *, last: bool = False) -> bool:
    state = {"model.model": {"weight": torch.full((NUM_VALUES,), float(step))}}
    return saver.save(step, state, {"position": 8 * step}, CONFIG, last=last)


def _saved(run_dir: Path, config: CheckpointConfig | None = None, *steps: int) -> Saver:
    """A saver that has saved these steps."""
    saver = Saver(Checkpoints(run_dir, config or CheckpointConfig(), WORLD))
    for step in steps or (1,):
        _save(saver, step)
        saver.wait()
    return saver


def _steps(run_dir: Path) -> list[int]:
    """The steps whose checkpoints are good, checked to the last byte."""
    return [step_of(place) for place in list_checkpoints(open_folder(run_dir)) if find_damage(place) is None]


def _assert_failed(saver: Saver, run_dir: Path, step: int, caplog: pytest.LogCaptureFixture) -> None:
    """The failed save was loud, left nothing that counts, and the good checkpoint is as it was."""
    assert saver.stats()["checkpoint/failed"] == 1
    events = [event for event in saver.checkpoints.take_events() if event["event"] == "failed"]
    assert [event["step"] for event in events] == [step]
    json.dumps(events)
    assert f"A checkpoint was not saved (step {step}" in caplog.text
    assert _steps(run_dir) == [1]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 1.5 MB: room for 3 saves."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1536k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_dir = small_disk / "run"
    saver = _saved(run_dir)
    (small_disk / "ballast").write_bytes(b"x" * 900_000)
    assert _save(saver, 2)
    with pytest.raises(CheckpointError, match=f"Errno {errno.ENOSPC}"):
        saver.wait()
    _assert_failed(saver, run_dir, 2, caplog)
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-00000001"]
    (small_disk / "ballast").unlink()
    _save(saver, 3)
    saver.wait()
    assert _steps(run_dir) == [1, 3]
    assert saver.stats()["checkpoint/failed_in_a_row"] == 0


def test_space_is_freed_before_a_save_where_that_is_allowed(small_disk: Path) -> None:
    """Three fit on the disk. Kept are three: freeing afterwards needs room for a fourth, and freeing before does not;
    at no time there are fewer than two good ones."""
    counts: list[int] = []
    write = LocalFolder.write

    def counting(self: LocalFolder, name: str, data: bytes) -> None:
        counts.append(len(_steps(run_dir)))
        write(self, name, data)

    run_dir = small_disk / "after"
    saver = _saved(run_dir, CheckpointConfig(keep_last=3), 1, 2, 3)
    _save(saver, 4)
    with pytest.raises(CheckpointError, match="No space"):
        saver.wait()
    assert _steps(run_dir) == [1, 2, 3]
    shutil.rmtree(run_dir)
    run_dir = small_disk / "before"
    saver = _saved(run_dir, CheckpointConfig(keep_last=3, free_before=True), 1, 2, 3)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(LocalFolder, "write", counting)
        _save(saver, 4)
        saver.wait()
    assert min(counts) == 2
    assert _steps(run_dir) == [2, 3, 4]


def test_space_is_not_freed_for_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = _saved(tmp_path, CheckpointConfig(keep_last=2, free_before=True), 1, 2)
    _fail_fsync(monkeypatch, errno.EIO)
    _save(saver, 3)
    saver.settle()
    assert _steps(tmp_path) == [1, 2]


def test_a_disk_that_turns_read_only(
    small_disk: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = small_disk / "run"
    saver = _saved(run_dir)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    _save(saver, 2)
    saver.settle()  # says so and goes on
    _assert_failed(saver, run_dir, 2, caplog)
    monkeypatch.setattr(saver_module, "_RETRY_S", 0.0)
    _save(saver, 3, last=True)
    with pytest.raises(CheckpointError, match=f"Errno {errno.EROFS}"):
        saver.wait()


def test_a_file_that_may_not_grow(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saver = _saved(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        _save(saver, 2)
        saver.settle()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    _assert_failed(saver, tmp_path, 2, caplog)
    assert "File too large" in caplog.text
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def _fail_fsync(monkeypatch: pytest.MonkeyPatch, number: int, after: int = 0) -> None:
    """Every fsync but the first `after` ones fails; a disk that dies says so there."""
    fsync, calls = os.fsync, [0]

    def failing(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] > after:
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)


@pytest.mark.parametrize("after", range(10))
def test_an_io_error_at_every_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, after: int
) -> None:
    """1 for the folder, 1 for the tensors, 2 (file and folder) for each of .metadata, config.yaml, state.json and
    COMPLETE."""
    saver = _saved(tmp_path)
    with monkeypatch.context() as patched:
        _fail_fsync(patched, errno.EIO, after)
        _save(saver, 2)
        with pytest.raises(CheckpointError, match="Input/output error"):
            saver.wait()
    _assert_failed(saver, tmp_path, 2, caplog)
    assert Checkpoints(tmp_path, CheckpointConfig(), WORLD).find() == newest_complete(open_folder(tmp_path))
    _save(saver, 2)  # the same step again
    saver.wait()
    assert _steps(tmp_path) == [1, 2]


def test_a_folder_that_vanishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saver = _saved(tmp_path)
    publish = write_module._publish

    def without_folder(job: write_module.SaveJob, *more: Any) -> int:
        shutil.rmtree(tmp_path / "checkpoints" / "step-00000002")
        return publish(job, *more)

    with monkeypatch.context() as patched:
        patched.setattr(write_module, "_publish", without_folder)
        _save(saver, 2)
        saver.settle()
    _assert_failed(saver, tmp_path, 2, caplog)
    shutil.rmtree(tmp_path / "checkpoints")
    _save(saver, 3)
    saver.wait()
    assert _steps(tmp_path) == [3]


def test_a_file_that_another_node_does_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes that do not share the folder: rank 0 publishes nothing, and says what to do."""
    saver = _saved(tmp_path)
    files = LocalFolder.files
    hide = lambda self: {n: s for n, s in files(self).items() if not n.endswith(".distcp")}
    with monkeypatch.context() as patched:
        patched.setattr(LocalFolder, "files", hide)
        _save(saver, 2)
        with pytest.raises(CheckpointError, match="do not share this folder"):
            saver.wait()
    assert _steps(tmp_path) == [1]


@contextmanager
def _stuck_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Writing tensors hangs until the yielded function is called."""
    gate, create = threading.Event(), LocalFolder.create

    @contextmanager
    def waiting(self: LocalFolder, name: str) -> Iterator[Any]:
        assert gate.wait(PATIENCE_S)
        with create(self, name) as stream:
            yield stream

    with monkeypatch.context() as patched:
        patched.setattr(LocalFolder, "create", waiting)
        try:
            yield gate.set
        finally:
            gate.set()


def _record_waits(monkeypatch: pytest.MonkeyPatch, then: Callable[[], None] = lambda: None) -> list[float]:
    """How long the loop is ready to wait for a running save, each time; `then` is called as it begins to wait."""
    patience_s: list[float] = []
    wait = saver_module.Saver._ended_within

    def recorded(self: saver_module.Saver, seconds: float) -> bool:
        patience_s.append(seconds)
        then()
        return wait(self, seconds)

    monkeypatch.setattr(saver_module.Saver, "_ended_within", recorded)
    return patience_s


def test_a_save_that_is_longer_than_the_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saver = _saved(tmp_path, CheckpointConfig(busy_wait_s=0.05))
    with _stuck_disk(monkeypatch) as release:
        assert _save(saver, 2)
        assert not _save(saver, 3)
        assert not _save(saver, 4)
        assert saver.stats()["checkpoint/blocked_ms"] < 500 * PATIENCE_S
        assert "The save of step 3 is skipped: that of step 2 still runs" in caplog.text
        release()
        saver.wait()
    assert _steps(tmp_path) == [1, 2]
    assert saver.stats()["checkpoint/skipped"] == 2
    assert saver.stats()["checkpoint/failed"] == 0
    skipped = [event["step"] for event in saver.checkpoints.take_events() if event["event"] == "skipped"]
    assert skipped == [3, 4]
    assert _save(saver, 5)
    saver.wait()
    assert _steps(tmp_path) == [2, 5]


def test_an_old_save_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = _saved(tmp_path, CheckpointConfig(busy_wait_s=0.0, wait_after_s=0.0))
    with _stuck_disk(monkeypatch) as release:
        _save(saver, 2)
        patience_s = _record_waits(monkeypatch, release)
        assert _save(saver, 3)
        saver.wait()
    assert _steps(tmp_path) == [2, 3]
    assert patience_s[0] > 0.5 * CheckpointConfig().hung_after_s


def test_the_last_save_waits_and_is_never_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = _saved(tmp_path, CheckpointConfig(busy_wait_s=0.0))
    with _stuck_disk(monkeypatch) as release:
        _save(saver, 2)
        _record_waits(monkeypatch, release)
        assert _save(saver, 3, last=True)
        saver.wait()
    assert _steps(tmp_path) == [2, 3]


def test_a_disk_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The run goes on, with one copy in memory; the last save ends it with an error; a disk that comes back is used."""
    saver = _saved(tmp_path)
    saver._config = CheckpointConfig(busy_wait_s=0.05, wait_after_s=0.05, hung_after_s=0.2)
    patience_s = _record_waits(monkeypatch)
    with _stuck_disk(monkeypatch) as release:
        _save(saver, 2)
        time.sleep(0.1)
        assert not _save(saver, 3)  # waits until it counts as hung
        assert "has not ended in" in caplog.text
        assert not _save(saver, 4)
        assert patience_s[1:] == [0.0]  # no more waiting
        assert saver.stats()["checkpoint/failed_in_a_row"] >= 3
        with pytest.raises(CheckpointError, match=r"step 5, the last of this run, cannot be saved.*has hung"):
            _save(saver, 5, last=True)
        with pytest.raises(CheckpointError, match="has not ended in"):
            saver.wait()
        assert _steps(tmp_path) == [1]
        release()
        saving = saver._running
        assert saving is not None
        assert saving.ended.wait(PATIENCE_S)
    saver._config = CheckpointConfig()
    assert _save(saver, 6)
    saver.wait()
    assert _steps(tmp_path) == [2, 6]
    assert saver.stats()["checkpoint/failed_in_a_row"] == 0
    assert {"hung", "failed", "saved"} == {event["event"] for event in saver.checkpoints.take_events()}


@pytest.mark.parametrize("limit", [None, 2])
def test_failures_in_a_row_end_the_run_only_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None
) -> None:
    saver = _saved(tmp_path, CheckpointConfig(max_failures=limit))
    with monkeypatch.context() as patched:
        _fail_fsync(patched, errno.EIO)
        for step in (2, 3):
            assert _save(saver, step)
        if limit is None:
            for step in (4, 5, 6):
                assert _save(saver, step)
        else:
            with pytest.raises(CheckpointError, match=r"2 saves in a row failed and checkpoint\.max_failures is 2"):
                _save(saver, 4)
        saver.settle()
    assert _steps(tmp_path) == [1]


@pytest.mark.parametrize("num_failures", [2, 3])
def test_the_last_save_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_failures: int) -> None:
    saver = _saved(tmp_path)
    monkeypatch.setattr(saver_module, "_RETRY_S", 0.01)
    publish, failures = write_module._publish, iter(range(num_failures))

    def failing(*arguments: Any) -> int:
        if next(failures, None) is not None:
            raise OSError(errno.EIO, "Input/output error")
        return publish(*arguments)

    monkeypatch.setattr(write_module, "_publish", failing)
    _save(saver, 2, last=True)
    if num_failures < 3:
        saver.wait()
        assert _steps(tmp_path) == [1, 2]
    else:
        with pytest.raises(CheckpointError, match=r"step-00000002 failed.*Input/output error.*3 attempts"):
            saver.wait()
        assert _steps(tmp_path) == [1]


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _saved(tmp_path)

    def failing(path: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(CheckpointError, match=r"cannot be listed.*nothing was started anew"):
        Checkpoints(tmp_path, CheckpointConfig(), WORLD).find()


def test_old_ones_that_cannot_be_deleted_do_not_fail_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saver = _saved(tmp_path, None, 1, 2)

    def failing(path: Any, *more: Any, **options: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(shutil, "rmtree", failing)
    _save(saver, 3)
    saver.wait()
    assert "were not deleted" in caplog.text
    assert _steps(tmp_path) == [2, 3]


def test_killed_at_every_point_of_a_save(tmp_path: Path, process_server: ProcessServer) -> None:
    """SIGKILL before each write, fsync, rename and removal of a save: what was good before is good after, what counts
    is whole, and the next save works."""
    done = process_server.run("tests.pretrain.checkpoint.kills:main", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    points = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(points) > 20
    assert points[-1]["killed"] is False
    for point in points:
        assert point["found"] == (2 if point["complete"] else 1), point
        assert point["after"] == 3, point
    assert {point["complete"] for point in points[:-1]} == {False, True}


@pytest.mark.distributed
@pytest.mark.parametrize("fault", ["disk", "peer"])
def test_one_rank_fails_and_all_agree(tmp_path: Path, fault: str, process_server: ProcessServer) -> None:
    """Rank 1's disk fails at step 2, or it comes too late for the others: no rank takes that save for good, no rank
    hangs, and the next save works."""
    process_server.run_ranks(2, "tests.pretrain.checkpoint.ranks:main", str(tmp_path), fault)
    said = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    for rank in said:
        assert rank["failed"] == 1
        assert [event["event"] for event in rank["events"]] == ["saved", "failed", "saved"]
    if fault == "disk":
        assert all(
            "rank 1" in rank["events"][1]["reason"] and "Errno 5" in rank["events"][1]["reason"] for rank in said
        )
    assert _steps(tmp_path) == [1, 3]
    assert sum(rank["staged_bytes"] for rank in said) < 1.1 * said[0]["state_bytes"]  # replicas are divided
