"""Processes that tests start: none outlives its test, and only pytest's limit says how long it may take.

A test's own limit on the wall clock fails wherever other work has the cores. Limits are there for what hangs, and for
that one is enough, a long one.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

PATIENCE_S = 600.0
"""For anything to happen at all. Shorter than pytest's limit, so that the test can still say what did not happen."""


def run_to_end(
    command: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """The exit code of a command and what it wrote. Whatever ends the test first ends all of its processes."""
    with subprocess.Popen(
        command, env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            stdout, stderr = process.communicate()
        except BaseException:
            kill_tree(process)
            raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def kill_tree(process: subprocess.Popen[str]) -> None:
    """SIGKILL for a process and for all that it started: torchrun's ranks outlive it."""
    if process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        process.kill()


def wait_until(happened: Callable[[], bool], what: str) -> None:
    """Waits for something that another thread or process does."""
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline, f"{what} did not happen within {PATIENCE_S:g} s"
        time.sleep(0.002)
