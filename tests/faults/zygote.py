"""A process that has imported torch and pretrain, and forks itself: ranks start in milliseconds instead of ten seconds.

The ranks are processes of their own, as torchrun's workers are, and can be killed, stopped and signalled one by one.
Enters (a line of JSON on stdin): what to call, its arguments and environment. Leaves (a line on stdout): process ids
and exit codes. `python -m tests.faults.zygote` is the server; `Zygote` starts it and talks to it.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.pretrain.runs import ENVIRONMENT, ROOT
from tests.processes import PATIENCE_S

IMPORTED_BEFORE_FORKING = ("pretrain.train", "pretrain.__main__", "tests.faults.worker")


class Zygote:
    """Starts and reaps processes; a context manager that leaves none behind."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote"],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._running: set[int] = set()
        self._codes: dict[int, int] = {}
        self._ports: list[socket.socket] = []

    def __enter__(self) -> Zygote:
        return self

    def __exit__(self, *unused: object) -> None:
        for pid in self._poll():
            os.kill(pid, signal.SIGKILL)
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()
        for port in self._ports:
            port.close()

    def start(self, call: str, arguments: Sequence[str], environment: Mapping[str, str], output: Path) -> int:
        """Runs `call` ("module:function", given the arguments, returning an exit code) in a new process; its pid."""
        request = {"call": call, "arguments": list(arguments), "environment": dict(environment), "output": str(output)}
        pid = int(self._ask(request)["pid"])
        self._running.add(pid)
        return pid

    def reserve_port(self) -> int:
        """A port that nobody else is given before a rank listens on it: bound for as long as this object lives, in the
        way that lets another socket listen.
        """
        self._ports.append(socket.socket())
        self._ports[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._ports[-1].bind(("127.0.0.1", 0))
        return int(self._ports[-1].getsockname()[1])

    def code(self, pid: int) -> int | None:
        """The exit code (negative: the signal) of a started process; None while it runs."""
        self._poll()
        return self._codes.get(pid)

    def wait(self, pids: Sequence[int], timeout_s: float = PATIENCE_S) -> list[int | None]:
        """Exit codes of processes, None for those that still run after the time-out."""
        deadline = time.monotonic() + timeout_s
        while any(self.code(pid) is None for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.01)
        return [self._codes.get(pid) for pid in pids]

    def _poll(self) -> set[int]:
        for pid, code in self._ask({})["codes"].items():
            self._codes[int(pid)] = code
            self._running.discard(int(pid))
        return self._running

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        assert answer, "the zygote died; its error is above"
        found: dict[str, Any] = json.loads(answer)
        return found


def _serve() -> Callable[[], int]:
    """Answers requests until stdin ends; in a forked child it returns what the child is to do."""
    for line in sys.stdin:
        request = json.loads(line)
        if request:
            sys.stdout.flush()
            if (pid := os.fork()) == 0:
                return _become(request)
            answer: dict[str, Any] = {"pid": pid}
        else:
            answer = {"codes": _reap()}
        print(json.dumps(answer), flush=True)
    return lambda: 0


def _reap() -> dict[int, int]:
    codes: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return codes
        if pid == 0:
            return codes
        codes[pid] = os.waitstatus_to_exitcode(status)


def _become(request: dict[str, Any]) -> Callable[[], int]:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    null, output = os.open(os.devnull, os.O_RDONLY), os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for source, target in ((null, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.environ.update(request["environment"])
    module, _, name = request["call"].partition(":")
    function: Callable[[list[str]], int] = getattr(importlib.import_module(module), name)
    return lambda: function(request["arguments"])


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which then ends this process and its children
    for imported in IMPORTED_BEFORE_FORKING:
        importlib.import_module(imported)
    sys.exit(_serve()())
