"""Runs that are killed at a random moment and started again end as if nothing had happened.

Every run is a real one on real shards; kills are SIGKILLs of one rank from outside, when the journal shows a random
step.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pretrain.checkpoint.open_folder import open_folder
from pretrain.checkpoint.read import list_checkpoints, newest_complete, read_complete
from pretrain.config import ConfigError
from pretrain.run_owner import OWNER_FILE
from pretrain.tracking.journal import read_journal
from tests.faults.harness import JournalTail, Start
from tests.pretrain.runs import (
    CONFIG,
    assert_same_weights,
    losses,
    overrides_of,
    run_here,
    run_several,
    torchrun,
)
from tests.process_server import ENVIRONMENT, ProcessServer
from tests.processes import PATIENCE_S, kill_tree

STEPS, SAVE_EVERY = 60, 6
LENGTH = [f"train.steps={STEPS}", f"checkpoint.every_steps={SAVE_EVERY}", "train.val_every=1000"]


def _logged_steps(run_dir: Path) -> int:
    return max((int(record["step"]) for record in read_journal(run_dir) if record["type"] == "metrics"), default=0)


def _start_and_interrupt(command: list[str], run_dir: Path, step: int, number: signal.Signals, rank: int) -> int:
    """Starts a run, sends a signal to one rank when the journal shows `step`, and returns the launcher's exit code.

    Where the command is that of the fault suite's worker, the run waits for the signal before its last step.
    """
    pause = {"TESSERA_TEST_RECORD": f"{run_dir}-record", "TESSERA_TEST_PAUSE": f"data:{STEPS - 1}:0:{PATIENCE_S}"}
    process = subprocess.Popen(
        command, env={**ENVIRONMENT, **pause}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        target: int | None = None
        deadline = time.monotonic() + PATIENCE_S
        while target is None or _logged_steps(run_dir) < step:
            assert process.poll() is None, process.stderr.read()[-3000:] if process.stderr else ""
            assert time.monotonic() < deadline, "the run did not reach the step"
            if target is None and _logged_steps(run_dir) > 0:  # looked up early: the kill must not come too late
                pids = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
                target = next(pid for pid in pids if _rank_of(pid) == rank)
            time.sleep(0.002)
        os.kill(target, number)
        process.communicate()
    finally:
        kill_tree(process)
    return process.returncode


def _rank_of(pid: int) -> int:
    environment = psutil.Process(pid).environ()
    return int(environment.get("RANK", -1))


@pytest.mark.distributed
@pytest.mark.slow
def test_killed_runs_end_as_uninterrupted_ones(
    tiny_dataset: Path, tmp_path: Path, process_server: ProcessServer
) -> None:
    """Started as users start them, by torchrun and `python -m`; the default suite has the same in tests/faults.

    Single, DDP and FSDP2 on 2 processes: equal to the bit. 2 -> 1 and 1 -> 2 processes: the same samples, to fp
    tolerance.
    """
    seed = int(os.environ.get("KILL_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 30)
    print(f"KILL_SEED={seed}")
    chance = random.Random(seed)

    def run(name: str, *more: str) -> list[str]:
        return overrides_of(tiny_dataset, tmp_path, name, *LENGTH, *more)

    ddp, fsdp2 = "parallel.strategy=ddp", "parallel.strategy=fsdp2"
    run_here(run("single"))
    run_several(process_server, 2, [run("ddp", ddp), run("fsdp2", fsdp2)])

    # Not before the second save has begun: it waits for the first, so there is something to resume from.
    for name, strategy in (("ddp", ddp), ("fsdp2", fsdp2)):
        command = torchrun(2, "-m", "tests.faults.worker", str(CONFIG), *run(f"{name}_killed", strategy))
        step = chance.randrange(2 * SAVE_EVERY + 1, STEPS - 12)
        code = _start_and_interrupt(command, tmp_path / f"{name}_killed", step, signal.SIGKILL, chance.randrange(2))
        assert code != 0
        assert _logged_steps(tmp_path / f"{name}_killed") < STEPS
    single = [sys.executable, "-m", "tests.faults.worker", str(CONFIG), *run("single_killed")]
    code = _start_and_interrupt(
        single, tmp_path / "single_killed", chance.randrange(2 * SAVE_EVERY + 1, STEPS - 12), signal.SIGKILL, -1
    )
    assert code == -signal.SIGKILL

    for name in ("ddp", "fsdp2", "single"):  # what a kill left, continued on another number of processes
        assert newest_complete(open_folder(tmp_path / f"{name}_killed")) is not None
        shutil.copytree(tmp_path / f"{name}_killed", tmp_path / f"{name}_moved")
    run_here(run("single_killed"))
    run_here(run("ddp_moved"))
    run_here(run("fsdp2_moved"))
    run_several(
        process_server,
        2,
        [run("ddp_killed", ddp), run("fsdp2_killed", fsdp2), run("single_moved", fsdp2, "train.micro_batch=2")],
    )

    for name in ("single", "ddp", "fsdp2"):
        assert_same_weights(tmp_path / name, tmp_path / f"{name}_killed")
        assert losses(tmp_path / name) == losses(tmp_path / f"{name}_killed")
        assert_same_weights(tmp_path / name, tmp_path / f"{name}_moved", to_the_bit=False)
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / f"{name}_moved"), rel=5e-5)


@pytest.mark.distributed
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_exits_cleanly(
    tiny_dataset: Path, tmp_path: Path, number: signal.Signals, process_server: ProcessServer
) -> None:
    overrides = overrides_of(tiny_dataset, tmp_path, "run", "train.steps=4000", "train.val_every=100000")
    log, journal = tmp_path / "log", JournalTail(tmp_path / "run")
    pid = process_server.start("pretrain.__main__:main", [[str(CONFIG), *overrides]], {}, log)
    start = Start(process_server, [pid], log)
    assert start.wait_until(lambda: journal.look() >= 5, "step 5"), start.log()
    start.send(number)
    assert start.codes() == [0], start.log()
    checkpoint = newest_complete(open_folder(tmp_path / "run"))
    assert checkpoint is not None
    complete = read_complete(checkpoint)
    assert complete["position"] == 8 * complete["step"] >= 40
    statuses = [record["status"] for record in read_journal(tmp_path / "run") if record["type"] == "status"]
    assert statuses[-1] == "KILLED"


def test_a_changed_batch_goes_on_at_the_same_sample(tiny_dataset: Path, tmp_path: Path) -> None:
    """The position counts samples: 10 steps of 8, then steps of 4, reach the same end."""
    epochs = ["train.steps=null", "train.epochs=4", "checkpoint.every_steps=10"]
    first = run_here(overrides_of(tiny_dataset, tmp_path, "run", *epochs[1:], "train.epochs=1.32", "train.steps=null"))
    assert first["samples"] == 80
    second = run_here(overrides_of(tiny_dataset, tmp_path, "run", *epochs, "train.global_batch=4"))
    assert second["samples"] == 244
    assert second["steps_this_start"] == (244 - 80) // 4


def test_another_model_or_seed_is_refused_and_nothing_is_lost(tiny_dataset: Path, tmp_path: Path) -> None:
    overrides = overrides_of(tiny_dataset, tmp_path, "run", "train.steps=2")
    run_here(overrides)

    def written() -> dict[Path, int]:
        """Of everything but where the ranks of a start stand, and who tried last."""
        files = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.parent.name != "watchdog"]
        files = [path for path in files if path.name != OWNER_FILE]
        return {path: path.stat().st_mtime_ns for path in files}

    before = written()
    with pytest.raises(ConfigError, match="another objective"):
        run_here([*overrides, "objective.model.mask_ratio=0.5"])
    with pytest.raises(ConfigError, match="another seed"):
        run_here([*overrides, "seed=1"])
    with pytest.raises(ConfigError, match=r"resume is never"):
        run_here([*overrides, "checkpoint.resume=never"])
    assert before == written()


def test_a_torn_checkpoint_is_passed_over_and_kept(tiny_dataset: Path, tmp_path: Path) -> None:
    overrides = overrides_of(tiny_dataset, tmp_path, "run", "train.steps=9", "checkpoint.every_steps=3")
    run_here(overrides)
    whole = losses(tmp_path / "run")
    newest = list_checkpoints(open_folder(tmp_path / "run"))[-1]
    assert newest.local_path is not None
    shard = next(newest.local_path.glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)  # the size is right, the hash is not
    summary = run_here(overrides)
    assert summary["steps_this_start"] == 3
    assert losses(tmp_path / "run") == whole
    set_aside = list((tmp_path / "run" / "checkpoints").glob("torn-step-00000009-*"))
    assert len(set_aside) == 1
    assert (set_aside[0] / "COMPLETE").exists()
    assert json.loads(newest.read("COMPLETE"))["step"] == 9


def test_a_finished_run_does_nothing_more(tiny_dataset: Path, tmp_path: Path) -> None:
    overrides = overrides_of(tiny_dataset, tmp_path, "run", "train.steps=3")
    run_here(overrides)
    again = run_here(overrides)
    assert (again["status"], again["steps_this_start"], again["step"]) == ("finished", 0, 3)
