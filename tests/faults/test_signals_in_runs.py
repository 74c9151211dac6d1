"""SIGTERM, SIGUSR1 and SIGINT in every phase of a run: what `pretrain/signals.py` documents."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from pretrain.checkpoint.open_folder import open_folder
from pretrain.checkpoint.read import newest_complete, read_complete
from tests.faults.harness import Run, statuses
from tests.pretrain.runs import assert_same_weights, losses
from tests.processes import PATIENCE_S

pytestmark = [pytest.mark.distributed]
MakeRun = Callable[..., Run]
LENGTH = ["train.steps=14", "checkpoint.every_steps=5", "train.val_every=7", "train.val_samples=16"]


def _interrupt(run: Run, num_ranks: int, phase: str, step: int, number: signal.Signals, rank: int | None) -> None:
    """Sends a signal while rank 0 is held in a phase; all ranks must leave by themselves with 0."""
    start = run.start(num_ranks, TESSERA_TEST_PAUSE=f"{phase}:{step}:0:{PATIENCE_S}")
    pause = run.record_dir / f"paused-{phase}-{step}"
    assert start.wait_until(pause.exists, str(pause))
    start.send(number, rank)
    (run.record_dir / f"go-on-{phase}-{step}").touch()
    codes = start.codes()
    assert codes == [0] * len(codes), start.log()


def _saved_step(run: Run) -> int | None:
    newest = newest_complete(open_folder(run.run_dir))
    return None if newest is None else int(read_complete(newest)["step"])


CASES = {
    "start": ("start", 0, signal.SIGTERM, None),
    "first-step": ("data", 0, signal.SIGUSR1, 1),
    "step": ("forward", 3, signal.SIGTERM, 4),
    "save": ("save", 5, signal.SIGUSR1, 6),
    "validate": ("validate", 7, signal.SIGTERM, 7),
    "close": ("close", 14, signal.SIGTERM, 14),
    "interrupt": ("step", 3, signal.SIGINT, 4),
}
"""Phase and step of the pause, the signal, and the step that is saved at most one later (the ranks agree on it)."""


@pytest.mark.parametrize("case", CASES)
def test_one_process(case: str, make_run: MakeRun) -> None:
    phase, step, number, saved = CASES[case]
    run = make_run("run", "single", *LENGTH)
    _interrupt(run, 0, phase, step, number, None)
    found = _saved_step(run)
    assert found == saved or (found is not None and saved is not None and saved < found <= min(saved + 1, 14))
    assert statuses(run.run_dir)[-1] == ("FINISHED" if case == "close" else "KILLED")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("rank", [1, None], ids=["one", "all"])
@pytest.mark.parametrize("case", [case for case in CASES if case not in ("start", "interrupt")])
def test_several_ranks(case: str, rank: int | None, strategy: str, make_run: MakeRun) -> None:
    """All leave at the same step, whoever got the signal, and the run goes on to the same end."""
    phase, step, number, _ = CASES[case]
    whole, run = make_run("whole", strategy, *LENGTH), make_run("run", strategy, *LENGTH)
    _interrupt(run, 2, phase, step, number, rank)
    assert _saved_step(run) is not None
    whole.finish(2)
    run.finish(2)
    assert losses(run.run_dir) == losses(whole.run_dir)
    assert_same_weights(whole.run_dir, run.run_dir)
