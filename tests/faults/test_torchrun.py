"""The same faults under torchrun itself: it restarts the ranks, passes signals on, or is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence

import psutil
import pytest

from pretrain.checkpoint.open_folder import open_folder
from pretrain.checkpoint.read import newest_complete, step_of
from pretrain.watchdog.watchdog import EXIT_NO_PROGRESS
from tests.faults.conftest import LENGTH
from tests.faults.harness import JournalTail, Run, statuses
from tests.pretrain.runs import CONFIG, assert_same_weights, losses, torchrun
from tests.process_server import ENVIRONMENT
from tests.processes import PATIENCE_S, kill_tree

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
MakeRun = Callable[..., Run]
Reference = Callable[[str, int], Run]
RESTARTS = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""As in docs/faults.md: ranks that are started again must not find what the ones before them left in the store."""
ENDLESS = ["train.steps=100000", "checkpoint.every_steps=5", "train.val_every=1000000"]


class Launched:
    """A run on two ranks under torchrun; leaves no process behind."""

    def __init__(
        self, run: Run, max_restarts: int = 0, more: Sequence[str] = (), handled: str = "SIGTERM", **environment: str
    ) -> None:
        self.run, self.pids = run, set[int]()
        run.record_dir.mkdir(parents=True, exist_ok=True)
        arguments = ["-m", "tests.faults.worker", str(CONFIG), *run.overrides, *more]
        options = f"--max-restarts={max_restarts}", "--monitor-interval=0.1", f"--signals-to-handle={handled}"
        command = torchrun(2, *options, *arguments)
        variables = {**ENVIRONMENT, **RESTARTS, "TESSERA_TEST_RECORD": str(run.record_dir), **environment}
        self.output = run.folder / "torchrun.log"
        with self.output.open("a") as output:
            self.process = subprocess.Popen(command, env=variables, stdout=output, stderr=output)

    def rank_pid(self, rank: int) -> int:
        """Of the start that runs now, from where the watchdog publishes it."""
        path = self.run.run_dir / "watchdog" / f"rank{rank:05d}.json"

        def published() -> int:
            pid = int(json.loads(path.read_text())["pid"]) if path.exists() else -1
            return -1 if pid in self.pids or pid < 0 or _is_gone(pid) else pid

        self.wait_until(lambda: published() > 0, "a start")
        pid = published()
        self.pids.add(pid)
        return pid

    def wait_until(self, happened: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not happened():
            assert time.monotonic() < deadline, f"{what} did not happen\n{self.log()}"
            time.sleep(0.005)

    def code(self) -> int:
        return self.process.wait(PATIENCE_S)

    def log(self) -> str:
        return self.output.read_text()[-6000:]

    def end(self) -> None:
        if self.process.poll() is None:
            kill_tree(self.process)
            self.process.wait()
        for pid in self.pids:
            if psutil.pid_exists(pid) and "tests.faults.worker" in " ".join(psutil.Process(pid).cmdline()):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def launch() -> Iterator[Callable[..., Launched]]:
    started: list[Launched] = []

    def start(*arguments: object, **keywords: object) -> Launched:
        started.append(Launched(*arguments, **keywords))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for launched in started:
        launched.end()


Launch = Callable[..., Launched]


def _is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_torchrun_restarts_killed_ranks(make_run: MakeRun, reference: Reference, launch: Launch) -> None:
    run = make_run("run", "ddp", *LENGTH)
    launched = launch(run, max_restarts=3)
    for rank, step in ((1, 9), (0, 17)):  # a kill comes well before the end of the run
        journal = JournalTail(run.run_dir)
        pid = [launched.rank_pid(each) for each in range(2)][rank]  # both, so that neither is taken for a new one later
        launched.wait_until(lambda journal=journal, step=step: journal.look() >= step, f"step {step}")  # type: ignore[misc]
        os.kill(pid, signal.SIGKILL)
    assert launched.code() == 0, launched.log()
    whole = reference("ddp", 2)
    assert_same_weights(whole.run_dir, run.run_dir)
    assert losses(whole.run_dir) == losses(run.run_dir)


def test_torchrun_restarts_after_a_hung_rank(make_run: MakeRun, reference: Reference, launch: Launch) -> None:
    run = make_run("run", "ddp", *LENGTH)
    launched = launch(run, 2, ["watchdog.step_timeout_s=10"], TORCH_ELASTIC_SHUTDOWN_TIMEOUT="2")
    journal = JournalTail(run.run_dir)
    pid = launched.rank_pid(1)
    launched.wait_until(lambda: journal.look() >= 10, "step 10")
    os.kill(pid, signal.SIGSTOP)
    assert launched.code() == 0, launched.log()
    assert f"exitcode: {EXIT_NO_PROGRESS}" in launched.output.read_text()
    assert_same_weights(reference("ddp", 2).run_dir, run.run_dir)


@pytest.mark.parametrize(
    ("number", "handled", "code"),
    [
        (signal.SIGTERM, "SIGTERM", 1),
        (signal.SIGUSR1, "SIGTERM,SIGUSR1", 1),
        (signal.SIGUSR1, "SIGTERM", -signal.SIGUSR1),
        (signal.SIGKILL, "SIGTERM", -signal.SIGKILL),
    ],
    ids=["terminated", "warned", "warned-unhandled", "killed"],
)
def test_signals_to_torchrun(
    number: signal.Signals, handled: str, code: int, make_run: MakeRun, launch: Launch
) -> None:
    """The ranks save and leave, also when torchrun is gone at once; then the same command goes on."""
    run = make_run("run", "ddp", *ENDLESS)
    journal = JournalTail(run.run_dir)
    launched = launch(run, handled=handled, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="120")
    pids = [launched.rank_pid(rank) for rank in range(2)]
    launched.wait_until(lambda: journal.look() >= 7, "step 7")
    launched.process.send_signal(number)
    assert launched.code() == code, launched.log()
    launched.wait_until(lambda: all(_is_gone(pid) for pid in pids), "the ranks' end")
    assert statuses(run.run_dir)[-1] == "KILLED"
    newest = newest_complete(open_folder(run.run_dir))
    assert newest is not None
    step = step_of(newest)
    assert step == max(losses(run.run_dir)) >= 7
    run.finish(2, f"train.steps={step + 2}")
    assert max(losses(run.run_dir)) == step + 2
