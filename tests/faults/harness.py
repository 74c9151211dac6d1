"""Starts the ranks of real runs, hurts them at chosen moments, starts them again, and reads what they did.

A moment is something that the run has done (a line of its journal, a file), never a time: the tests share their cores
with others. What a fault leaves behind is cleaned up as torchrun does it: survivors get SIGTERM, then SIGKILL.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf.errors import OmegaConfBaseException

from pretrain.config import load_config
from pretrain.tracking.journal import JOURNAL_NAME, read_journal, read_lines
from tests.pretrain.runs import CONFIG
from tests.process_server import ProcessServer
from tests.processes import PATIENCE_S

_POLL_S = 0.005
_SLACK_STEPS = 5
STRATEGIES = ("single", "ddp", "fsdp2", "zero1", "zero2", "zero3")


def why_not(strategy: str) -> str | None:
    """Why a strategy cannot be tested here, or None."""
    try:
        load_config(CONFIG, [f"parallel.strategy={strategy}"])
    except (ValueError, OmegaConfBaseException) as error:
        return f"parallel.strategy does not know {strategy}: {str(error)[:200]}"
    return None


class JournalTail:
    """What was added to a run's journal since this was made; reads each line once."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / JOURNAL_NAME
        self.offset = self.path.stat().st_size if self.path.exists() else 0
        self.newest_step = -1
        """-1: the new start has not written anything; 0: it has begun."""

    def look(self) -> int:
        for record, offset in read_lines(self.path, self.offset):
            self.offset = offset
            if record is not None:
                self.newest_step = max(self.newest_step, int(record["step"]) if record["type"] == "metrics" else 0)
        return self.newest_step


def statuses(run_dir: Path) -> list[str]:
    return [str(record["status"]) for record in read_journal(run_dir) if record["type"] == "status"]


def is_saving(run_dir: Path) -> bool:
    """A checkpoint's folder is there that has no COMPLETE yet."""
    return any(not (path / "COMPLETE").exists() for path in (run_dir / "checkpoints").glob("step-*"))


@dataclass
class Start:
    """The ranks of one start of a run."""

    server: ProcessServer
    pids: list[int]
    output: Path

    def wait_until(self, happened: Callable[[], bool], what: str) -> bool:
        """Waits for something that the run does; False when all ranks have ended without it."""
        deadline = time.monotonic() + PATIENCE_S
        while not happened():
            if all(self.server.code(pid) is not None for pid in self.pids):
                return happened()
            assert time.monotonic() < deadline, f"{what} did not happen\n{self.log()}"
            time.sleep(_POLL_S)
        return True

    def send(self, number: signal.Signals, rank: int | None = None) -> None:
        """To one rank, or to all."""
        for pid in self.pids if rank is None else [self.pids[rank]]:
            if self.server.code(pid) is None:
                os.kill(pid, number)

    def codes(self) -> list[int | None]:
        """Waits until all ranks have ended by themselves."""
        codes = self.server.wait(self.pids)
        assert None not in codes, f"exit codes {codes}: a rank did not leave\n{self.log()}"
        return codes

    def clean_up(self, patience_s: float) -> None:
        """Ends survivors of a fault as torchrun does."""
        for number, limit_s in ((signal.SIGTERM, patience_s), (signal.SIGKILL, PATIENCE_S)):
            self.send(number)
            if None not in self.server.wait(self.pids, limit_s):
                return
        raise AssertionError(f"a rank outlived SIGKILL\n{self.log()}")

    def log(self) -> str:
        return self.output.read_text()[-6000:] if self.output.exists() else ""


@dataclass
class Run:
    """One run below `folder`, started as often as needed. `overrides`: as for `python -m pretrain`."""

    server: ProcessServer
    folder: Path
    name: str
    overrides: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def run_dir(self) -> Path:
        return self.folder / self.name

    @property
    def record_dir(self) -> Path:
        return self.folder / f"{self.name}-record"

    def start(self, num_ranks: int, *more: str, **environment: str) -> Start:
        """num_ranks: 0: one process without a process group. environment: of this start alone."""
        self.record_dir.mkdir(parents=True, exist_ok=True)
        output = self.folder / f"{self.name}.log"
        arguments = [str(CONFIG), *self.overrides, *more]
        ranks = self.server.rank_environments(num_ranks) if num_ranks else [{}]
        variables = {"TESSERA_TEST_RECORD": str(self.record_dir), **self.environment, **environment}
        pids = [
            self.server.start("tests.faults.worker:main", [arguments], {**rank, **variables}, output) for rank in ranks
        ]
        return Start(self.server, pids, output)

    def finish(self, num_ranks: int, *more: str) -> None:
        """Starts the run and lets it end."""
        start = self.start(num_ranks, *more)
        codes = start.codes()
        assert codes == [0] * len(codes), start.log()

    def samples(self) -> dict[int, str]:
        """The key of the sample at each position that any start took. Fails where two starts differ."""
        found: dict[int, str] = {}
        for path in sorted(self.record_dir.glob("*.jsonl")):
            for line in path.read_bytes().splitlines(keepends=True):
                if line.endswith(b"\n"):  # a kill may leave half a line
                    for position, key in zip(*json.loads(line), strict=True):
                        assert found.setdefault(position, key) == key, f"position {position} had two samples"
        return found


@dataclass(frozen=True)
class Kill:
    """A fault at a moment."""

    victim: int | None
    """A rank; None: all of them at the same time."""
    step: int
    """Not before the journal shows it."""
    while_saving: bool
    """Not before a checkpoint is half written."""
    delay_s: float
    """After that: a random part of a step."""
    freeze: bool = False
    """SIGSTOP, so that the others hang until the watchdog ends them, in place of SIGKILL."""


def random_kills(chance: random.Random, number: int, num_ranks: int, first: int, last: int) -> list[Kill]:
    """`number` kills at growing steps in [first, last); about a third of them hits all ranks, a third a save."""
    steps = sorted(chance.sample(range(first, last), number))
    return [
        Kill(
            victim=None if chance.random() < 1 / 3 else chance.randrange(max(num_ranks, 1)),
            step=step,
            while_saving=chance.random() < 1 / 3,
            delay_s=chance.random() * 0.02,
        )
        for step in steps
    ]


def inflict(run: Run, num_ranks: int, kill: Kill, *more: str) -> bool:
    """Starts the run, kills it, and cleans up. False when it ended before, which it should have no time for.

    Rank 0 waits for the kill `_SLACK_STEPS` after the step of the kill, should this process be slower than the run.
    """
    journal = JournalTail(run.run_dir)
    last = kill.step + _SLACK_STEPS
    start = run.start(num_ranks, *more, TESSERA_TEST_PAUSE=f"data:{last}:0:{PATIENCE_S}")
    paused = run.record_dir / f"paused-data-{last}"

    def is_due() -> bool:
        return paused.exists() or (journal.look() >= kill.step and (not kill.while_saving or is_saving(run.run_dir)))

    hit = start.wait_until(is_due, f"{kill}")
    time.sleep(kill.delay_s)
    start.send(signal.SIGSTOP if kill.freeze else signal.SIGKILL, kill.victim)
    if kill.victim is not None and num_ranks > 1:
        survivors = [pid for rank, pid in enumerate(start.pids) if rank != kill.victim]
        run.server.wait(survivors, PATIENCE_S if kill.freeze else 5)
    start.clean_up(20)
    return hit
