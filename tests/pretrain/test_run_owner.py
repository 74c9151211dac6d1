"""A run has one owner: another start is refused while it lives, and never once it is dead."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from pretrain import run_owner
from pretrain.checkpoint.folder import Folder
from pretrain.checkpoint.open_folder import open_folder
from pretrain.run_owner import OWNER_FILE, RunInUseError, own_folder
from tests.processes import wait_until

HOLDER = """
import sys, time
from pretrain.checkpoint.open_folder import open_folder
from pretrain.run_owner import own_folder
with own_folder(open_folder(sys.argv[1])):
    print("owned", flush=True)
    if len(sys.argv) > 2:
        import os
        if os.fork() == 0:  # a worker that outlives its parent
            time.sleep(600)
    time.sleep(600)
"""


def hold(root: Path, folder: Path, *more: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), *more], cwd=root, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "owned\n"
    return process


def test_a_living_owner_is_named_and_a_killed_one_is_not_in_the_way(root: Path, tmp_path: Path) -> None:
    owner = hold(root, tmp_path / "run", "with a worker")
    worker = [int(pid) for pid in Path(f"/proc/{owner.pid}/task/{owner.pid}/children").read_text().split()]
    try:
        with pytest.raises(RunInUseError, match=rf"run is in use: process {owner.pid} on "):
            own_folder(open_folder(tmp_path / "run")).__enter__()
        owner.kill()
        owner.wait()
        with own_folder(open_folder(tmp_path / "run")):
            assert json.loads((tmp_path / "run" / OWNER_FILE).read_text())["pid"] == os.getpid()
    finally:
        owner.kill()
        for pid in worker:
            os.kill(pid, signal.SIGKILL)
        owner.wait()
        assert owner.stdout is not None
        owner.stdout.close()


def test_a_process_owns_a_folder_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with own_folder(open_folder(tmp_path / "run")):
        with pytest.raises(RunInUseError, match="is in use"):
            own_folder(open_folder("run")).__enter__()  # the same one, under another name
        with own_folder(open_folder(tmp_path / "other")):
            pass
    with own_folder(open_folder(tmp_path / "run")):
        pass


@pytest.fixture(params=["no locks", "object store"])
def unlocked(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    """A folder without locks: on a file system that has none, as some of NFS, or in a store."""
    monkeypatch.setattr(run_owner, "BEAT_S", 0.02)
    monkeypatch.setattr(run_owner, "STALE_S", 1.0)
    if request.param == "object store":
        return open_folder(f"memory://owners/{uuid.uuid4().hex}")

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    return open_folder(tmp_path / "run")


def owner_of(folder: Folder) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(folder.read(OWNER_FILE))
    return found


def test_without_locks_a_beating_owner_is_refused_and_one_that_left_is_not(unlocked: Folder) -> None:
    with own_folder(unlocked):
        first = owner_of(unlocked)["beat"]
        wait_until(lambda: owner_of(unlocked)["beat"] > first + 1, "another beat")
        run_owner._owned_here.clear()  # as another process would see it
        with pytest.raises(RunInUseError, match=f"process {os.getpid()} on"):
            own_folder(unlocked).__enter__()
    assert owner_of(unlocked)["released"]
    with own_folder(unlocked):
        assert "released" not in owner_of(unlocked)
    assert not [thread for thread in threading.enumerate() if thread.name == "owner"]


def test_without_locks_a_dead_owner_is_replaced(unlocked: Folder) -> None:
    elsewhere = {"host": "another-machine", "pid": 1, "since": "yesterday", "token": "x", "beat": 7}
    unlocked.make()
    unlocked.write(OWNER_FILE, json.dumps(elsewhere).encode())
    begin_s = time.monotonic()
    with own_folder(unlocked):
        assert time.monotonic() - begin_s >= run_owner.STALE_S  # its number was watched
        assert owner_of(unlocked)["pid"] == os.getpid()


def test_without_locks_a_process_that_died_here_is_not_waited_for(
    unlocked: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_owner, "STALE_S", 1e6)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    unlocked.make()
    unlocked.write(OWNER_FILE, json.dumps(run_owner._owner_now() | {"pid": dead.pid, "token": "x"}).encode())
    with own_folder(unlocked):
        assert owner_of(unlocked)["pid"] == os.getpid()


def test_half_a_file_is_no_owner(unlocked: Folder) -> None:
    unlocked.make()
    unlocked.write(OWNER_FILE, b'{"pid": 1')
    with own_folder(unlocked):
        assert owner_of(unlocked)["pid"] == os.getpid()
