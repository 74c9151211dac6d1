"""Hung, stopped, killed and slow ranks: the watchdog ends the run where it must, and its report tells them apart."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.tracking.journal import read_metrics
from pretrain.watchdog.watchdog import EXIT_NO_PROGRESS
from tests.faults.harness import JournalTail, Run, Start

pytestmark = [pytest.mark.distributed]
MakeRun = Callable[..., Run]
PATIENT = ["watchdog.step_timeout_s=8", "watchdog.interval_s=0.5"]
"""Hundreds of times what a step takes, and what a heartbeat takes, for machines that do other things too."""
ENDLESS = ["train.steps=100000", "checkpoint.every_steps=5", "train.val_every=1000000"]


def _report(run: Run) -> str:
    reports = list((run.run_dir / "watchdog").glob("*/report.txt"))
    assert len(reports) == 1, run.folder
    return reports[0].read_text()


def _verdicts(report: str) -> dict[int, str]:
    """By rank, in the order of the report."""
    lines = report.split("\n---")[0].splitlines()[3:]
    return {int(line.split()[0]): re.split(r"  +", line.strip())[-1] for line in lines if line.strip()}


def _begin(run: Run, step: int, *more: str, **environment: str) -> Start:
    journal = JournalTail(run.run_dir)
    start = run.start(2, *more, **environment)
    assert start.wait_until(lambda: journal.look() >= step, f"step {step}")
    return start


def test_a_stopped_rank_is_named_and_the_run_ends(make_run: MakeRun) -> None:
    """SIGSTOP: the other rank waits in a collective, until its watchdog's limit."""
    run = make_run("run", "ddp", *ENDLESS, *PATIENT)
    start = _begin(run, 6)
    start.send(signal.SIGSTOP, 1)
    assert run.server.wait(start.pids[:1]) == [EXIT_NO_PROGRESS], start.log()
    start.clean_up(1)
    verdicts = _verdicts(_report(run))
    assert list(verdicts) == [1, 0]
    assert "SIGSTOP" in verdicts[1]
    assert "waits for the others" in verdicts[0]
    assert "no stacks: this rank could not write" in _report(run)
    assert "thread MainThread" in _report(run)


def test_a_rank_that_hangs_in_python_is_named_with_its_stack(make_run: MakeRun) -> None:
    run = make_run("run", "ddp", *ENDLESS, *PATIENT)
    start = run.start(2, TESSERA_TEST_PAUSE="data:7:1:1000")
    assert start.codes() == [EXIT_NO_PROGRESS, EXIT_NO_PROGRESS], start.log()
    report = _report(run)
    verdicts = _verdicts(report)
    assert list(verdicts) == [1, 0]
    assert verdicts[1].startswith("hung"), report
    assert "waits for the others" in verdicts[0], report
    assert "in pausing" in report.split("--- rank 1")[1].split("--- rank 0")[0]


def test_a_killed_rank_is_named(make_run: MakeRun) -> None:
    """The survivor's collective fails; it says why."""
    run = make_run("run", "ddp", *ENDLESS)
    start = _begin(run, 6)
    start.send(signal.SIGKILL, 1)
    assert start.codes() == [1, -signal.SIGKILL]
    verdicts = _verdicts(_report(run))
    assert list(verdicts) == [1, 0]
    assert verdicts[1].startswith("killed")
    assert verdicts[0].startswith("failed")


def test_one_process_that_hangs(make_run: MakeRun) -> None:
    run = make_run("run", "single", *ENDLESS, "watchdog.step_timeout_s=1")
    start = run.start(0, TESSERA_TEST_PAUSE="forward:3:0:1000")
    assert start.codes() == [EXIT_NO_PROGRESS], start.log()
    assert _verdicts(_report(run))[0].startswith("hung")


def test_a_slow_rank_is_reported_and_the_run_goes_on(make_run: MakeRun) -> None:
    pauses = ",".join(f"data:{step}:1:0.5" for step in range(2, 20))
    run = make_run("run", "ddp", "train.steps=20", "watchdog.step_timeout_s=120")
    start = run.start(2, TESSERA_TEST_PAUSE=pauses)
    assert start.codes() == [0, 0], start.log()
    slowest = read_metrics(run.run_dir)["watchdog/slowest_rank"]
    assert slowest[-1].value == 1
    assert read_metrics(run.run_dir)["watchdog/slowest_ratio"][-1].value > 2
    assert "rank 1 on" in start.log()
    assert "is slow" in start.log()
    assert not list((run.run_dir / "watchdog").glob("*/report.txt"))


def test_a_rank_that_waits_for_a_long_save_is_no_stall(make_run: MakeRun) -> None:
    """Rank 0 is 14 s in its save, rank 1 waits for it in the next step for longer than a step may take."""
    run = make_run("run", "ddp", "train.steps=12", "checkpoint.every_steps=5", *PATIENT)
    start = run.start(2, TESSERA_TEST_PAUSE="save:5:0:14")
    assert start.codes() == [0, 0], start.log()


def test_reports_say_nothing_after_a_clean_run(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("run", "single", "train.steps=3")
    run.finish(0)
    assert sorted(path.name for path in (run.run_dir / "watchdog").iterdir()) == ["rank00000.json"]
