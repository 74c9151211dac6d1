"""A process that has imported torch and the trainer, and forks itself: ranks start in milliseconds, not in ten seconds.

The ranks are processes of their own, as torchrun's workers are, and can be killed, stopped and signalled one by one.
Enters (a line of JSON on stdin): what to call, its arguments and environment. Leaves (a line on stdout): process ids
and exit codes. `python -m tests.process_server MODULE ...` is the server; `ProcessServer` starts it and talks to it.

What it leaves out is the start itself: torchrun, the command line, and a seed of its own for each process's hashes.
`tests/pretrain/test_torchrun.py`, test_resume.py and the fault suite have those.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from tests.processes import PATIENCE_S

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
"""Of every process that a test starts."""
RUNS = (
    "pytest",
    "pretrain.train",
    "pretrain.__main__",
    "launchers.cli",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
)
"""What a run imports sooner or later: imported in the server, once for all of them."""
DEEPSPEED_RUNS = (*RUNS, "tests.pretrain.parallel.zero_runs:import_deepspeed")
INHERITED = Path("-")
"""In place of a file for stderr: where this process has it."""
_POLL_S = 0.01


class ProcessServer:
    """Starts and reaps processes; a context manager that leaves none behind."""

    def __init__(self, *prepared: str) -> None:
        """prepared: modules to import and functions to call ("module:function") before the first process is forked."""
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.process_server", *prepared],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pids: list[int] = []
        """Of all processes that were started, in their order."""
        self._codes: dict[int, int] = {}
        self._ports: list[socket.socket] = []

    def __enter__(self) -> ProcessServer:
        return self

    def __exit__(self, *unused: object) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()
        for port in self._ports:
            port.close()

    def run_ranks(self, num_ranks: int, call: str, *arguments: Any, **environment: str) -> str:
        """Runs `call` on several ranks, as `torchrun --nproc-per-node` does, until all have ended well.

        Args:
            num_ranks: Processes; each finds its rank and the others in the environment.
            call: "module:function". It returns None or an exit code.
            arguments: Of the function; whatever JSON can carry.
            environment: Further variables.

        Returns:
            What the ranks wrote on stdout. Where a rank fails, the others are ended and the test fails with their logs.
        """
        with tempfile.TemporaryDirectory() as folder:
            logs = [Path(folder) / f"rank{rank}.log" for rank in range(num_ranks)]
            variables = self.rank_environments(num_ranks)
            pids = [
                self.start(call, arguments, {**variables[rank], **environment}, log.with_suffix(".out"), log)
                for rank, log in enumerate(logs)
            ]
            try:
                codes = self._until_one_fails(pids)
            finally:
                for pid in pids:
                    self.kill(pid)
            said = [f"rank {rank} left with {codes[rank]}\n{log.read_text()[-4000:]}" for rank, log in enumerate(logs)]
            assert codes == [0] * num_ranks, "\n".join(said)
            return "".join(log.with_suffix(".out").read_text() for log in logs)

    def run(self, call: str, *arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs `call` in one process, to its end: its exit code and what it wrote."""
        with tempfile.TemporaryDirectory() as folder:
            output, errors = Path(folder) / "out", Path(folder) / "log"
            pid = self.start(call, arguments, environment, output, errors)
            try:
                (code,) = self._until_one_fails([pid])
            finally:
                self.kill(pid)
            assert code is not None
            return subprocess.CompletedProcess([call], code, output.read_text(), errors.read_text())

    def open(self, call: str, *arguments: Any, **environment: str) -> Forked:
        """Runs `call` in one process, whose stdout is read while it runs; stderr goes where this process has it."""
        with tempfile.TemporaryDirectory() as folder:
            pipe = Path(folder) / "stdout"
            os.mkfifo(pipe)
            pid = self.start(call, arguments, environment, pipe, INHERITED)
            return Forked(self, pid, pipe.open())  # waits for the other end

    def start(
        self,
        call: str,
        arguments: Sequence[Any],
        environment: Mapping[str, str],
        output: Path,
        errors: Path | None = None,
    ) -> int:
        """Runs `call` in a new process, in a session of its own; its pid. Without `errors`, stderr goes to `output`."""
        request = {"call": call, "arguments": list(arguments), "environment": dict(environment)}
        pid = int(self._ask({**request, "output": str(output), "errors": str(errors or output)})["pid"])
        self.pids.append(pid)
        return pid

    def rank_environments(self, num_ranks: int) -> list[dict[str, str]]:
        """What torchrun tells each rank of one node, with a port that nobody else is given before a rank listens on it:
        it is bound for as long as this object lives, in the way that lets another socket listen.
        """
        self._ports.append(socket.socket())
        self._ports[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._ports[-1].bind(("127.0.0.1", 0))
        shared = {
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._ports[-1].getsockname()[1]),
        }
        return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(num_ranks)]

    def code(self, pid: int) -> int | None:
        """The exit code (negative: the signal) of a started process; None while it runs."""
        self._codes |= {int(ended): code for ended, code in self._ask({})["codes"].items()}
        return self._codes.get(pid)

    def wait(self, pids: Sequence[int], timeout_s: float = PATIENCE_S) -> list[int | None]:
        """Exit codes of processes, None for those that still run after the time-out."""
        deadline = time.monotonic() + timeout_s
        while any(self.code(pid) is None for pid in pids) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return [self._codes.get(pid) for pid in pids]

    def kill(self, pid: int) -> None:
        """SIGKILL for a process and for all that it started, unless it has ended."""
        if self.code(pid) is None:
            _kill_session(pid)
            self.wait([pid])

    def _until_one_fails(self, pids: Sequence[int]) -> list[int | None]:
        """Exit codes when all have ended well, or one has not. Only pytest's limit says how long that may take."""
        while True:
            codes = [self.code(pid) for pid in pids]
            if None not in codes or any(codes):
                return codes
            time.sleep(_POLL_S)

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        assert answer, "the process server died; its error is above"
        found: dict[str, Any] = json.loads(answer)
        return found


class Forked:
    """A process of `ProcessServer.open`, with the part of subprocess.Popen's face that the tests use."""

    def __init__(self, server: ProcessServer, pid: int, stdout: TextIO) -> None:
        self._server, self.pid, self.stdout = server, pid, stdout

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        return self._server.code(self.pid)

    def wait(self) -> int | None:
        """The exit code, when it has ended."""
        return self._server.wait([self.pid])[0]

    def kill(self) -> None:
        """SIGKILL for this process alone; returns when it is gone."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()
        self.stdout.close()


def _kill_session(pid: int) -> None:
    for kill in (os.killpg, os.kill):  # it may not have its session yet
        with contextlib.suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)


def _serve() -> Callable[[], int | None]:
    """Answers requests until stdin ends, and then ends what runs; in a forked child, returns what it is to do."""
    running: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if request:
            sys.stdout.flush()
            if (pid := os.fork()) == 0:
                return _become(request)
            running.add(pid)
            answer: dict[str, Any] = {"pid": pid}
        else:
            answer = {"codes": _reap()}
            running -= answer["codes"].keys()
        print(json.dumps(answer), flush=True)
    for pid in running:
        _kill_session(pid)
    return lambda: None


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


def _leave_at_once(code: int | None) -> None:
    """Ends as Python does, but without clearing the modules one by one, which takes two seconds of a core."""
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as Python does
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code or 0)


def _prepare(wanted: str) -> None:
    """Imports a module, or calls a function of one ("module:function")."""
    module, _, function = wanted.partition(":")
    imported = importlib.import_module(module)
    if function:
        getattr(imported, function)()


def _become(request: dict[str, Any]) -> Callable[[], int | None]:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    appending = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    places = ((os.devnull, os.O_RDONLY), (request["output"], appending), (request["errors"], appending))
    for target, (path, flags) in enumerate(places):
        if path == str(INHERITED):
            continue
        opened = os.open(path, flags, 0o644)
        os.dup2(opened, target)
        os.close(opened)
    os.environ.update(request["environment"])
    module, _, name = request["call"].partition(":")
    function: Callable[..., int | None] = getattr(importlib.import_module(module), name)
    return lambda: function(*request["arguments"])


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which then ends this process and its children
    for wanted in sys.argv[1:]:
        _prepare(wanted)
    gc.collect()
    gc.freeze()  # a collection in a forked process would copy every page of what was imported
    _leave_at_once(_serve()())
