"""The process server: ranks see what torchrun's see, a rank that fails ends the others, and nothing outlives a test."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.process_server import ProcessServer
from tests.processes import wait_until

CALLS = "tests.test_process_server"


@pytest.fixture(scope="module")
def server() -> Iterator[ProcessServer]:
    """One that imports nothing: none of this needs torch."""
    with ProcessServer() as started:
        yield started


def say(*words: str) -> None:
    print(json.dumps([os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["MASTER_PORT"], *words]))


def fail_on_one(rank: str) -> None:
    if os.environ["RANK"] == rank:
        raise ZeroDivisionError("a defect")
    time.sleep(10_000)


def leave_with(code: int | None) -> int | None:
    sys.stderr.write("said on the way out")
    return code


def wait_for_ever(folder: str) -> None:
    """With a child that is no child of the server."""
    if os.fork() != 0:
        (Path(folder) / "pid").write_text(str(os.getpid()))
    else:
        (Path(folder) / "child").write_text(str(os.getpid()))
    time.sleep(10_000)


def _is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_ranks_know_each_other(server: ProcessServer) -> None:
    first, second = ([json.loads(line) for line in server.run_ranks(3, f"{CALLS}:say", "a").splitlines()] for _ in "12")
    assert [line[:2] + line[3:] for line in first] == [[str(rank), "3", "a"] for rank in range(3)]
    assert len({line[2] for line in first}) == 1
    assert first[0][2] != second[0][2], "two groups shared a port"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_that_fails_ends_the_others(server: ProcessServer, rank: str) -> None:
    with pytest.raises(AssertionError, match=rf"(?s)rank {rank} left with 1.*ZeroDivisionError: a defect"):
        server.run_ranks(2, f"{CALLS}:fail_on_one", rank)
    assert all(_is_gone(pid) for pid in server.pids)


@pytest.mark.parametrize("code", [None, 0, 3])
def test_a_process_gives_its_code_and_what_it_wrote(server: ProcessServer, code: int | None) -> None:
    done = server.run(f"{CALLS}:leave_with", code)
    assert (done.returncode, done.stdout, done.stderr) == (code or 0, "", "said on the way out")


def test_processes_are_killed_one_by_one_and_with_all_that_they_started(tmp_path: Path, server: ProcessServer) -> None:
    opened = server.open(f"{CALLS}:wait_for_ever", str(tmp_path))
    wait_until(lambda: _written(tmp_path), "a start")
    assert opened.poll() is None
    child = int((tmp_path / "child").read_text())
    opened.kill()
    assert opened.poll() == -signal.SIGKILL
    assert not _is_gone(child)
    os.kill(child, signal.SIGKILL)


def test_nothing_outlives_the_server(tmp_path: Path) -> None:
    with ProcessServer() as server:
        server.start(f"{CALLS}:wait_for_ever", [str(tmp_path)], {}, tmp_path / "log")
        wait_until(lambda: _written(tmp_path), "a start")
    for name in ("pid", "child"):
        pid = int((tmp_path / name).read_text())
        wait_until(lambda pid=pid: _is_gone(pid), f"the end of the {name}")  # type: ignore[misc]
        assert _is_gone(pid)


def _written(folder: Path) -> bool:
    return all((folder / name).exists() and (folder / name).read_text() for name in ("pid", "child"))
