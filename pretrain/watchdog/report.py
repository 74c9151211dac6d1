"""The report of a stall or a failure: stacks of every rank that can still write, and who is to blame, as text.

Enters: the verdicts on all ranks. Leaves: `RUN/watchdog/<start>/report.txt`, beside `rank00003.txt` (stacks) of each
rank. The first rank that makes the file `claim` writes the report; the others see the claim and add their stacks.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path

from data_pipes.store.files import write_atomically
from pretrain.watchdog.heartbeats import Verdict


class Report:
    """The report of one start of a run, as one rank sees it."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / "report.txt"
        self.rank = rank

    def is_claimed(self) -> bool:
        """Whether a rank writes the report already."""
        return (self.path.parent / "claim").exists()

    def add_stacks(self, text: str) -> None:
        """This rank's part. What the disk refuses is missing."""
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._stacks_path(self.rank), text.encode(), durable=False)

    def claim(self) -> bool:
        """Whether this rank is the one that writes the report."""
        try:
            os.close(os.open(self.path.parent / "claim", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        except OSError:  # nothing can be written: every rank tells stderr
            return True
        return True

    def write(self, cause: str, verdicts: list[Verdict]) -> None:
        """To the file, and without the stacks to stderr."""
        stacks = {}
        for verdict in verdicts:
            with contextlib.suppress(OSError):
                stacks[verdict.rank] = self._stacks_path(verdict.rank).read_text()
        table = report_table(cause, verdicts)
        print(f"watchdog: {table}stacks of all ranks: {self.path}", file=sys.__stderr__, flush=True)
        with contextlib.suppress(OSError):
            write_atomically(self.path, (table + report_stacks(verdicts, stacks)).encode(), durable=False)

    def _stacks_path(self, rank: int) -> Path:
        return self.path.with_name(f"rank{rank:05d}.txt")


def report_table(cause: str, verdicts: list[Verdict]) -> str:
    """The cause, and a line per rank in the order of `verdicts`."""
    lines = [cause, "", "rank  step      phase       idle s  last beat (UTC)       own ms/step  verdict"]
    for verdict in verdicts:
        heartbeat = verdict.heartbeat
        if heartbeat is None:
            lines.append(f"{verdict.rank:<5} {verdict.text}")
            continue
        beat = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(heartbeat.beat_time_s))
        own = "-" if heartbeat.local_step_s is None else f"{1e3 * heartbeat.local_step_s:.1f}"
        place = f"{verdict.rank:<5} {heartbeat.step:<9} {heartbeat.phase:<11} {heartbeat.idle_s:<7.1f} {beat}"
        lines.append(f"{place}   {own:<12} {verdict.text}")
    return "\n".join(lines) + "\n"


def report_stacks(verdicts: list[Verdict], stacks: Mapping[int, str]) -> str:
    """The stacks of each rank, in the order of `verdicts`."""
    lines = []
    for verdict in verdicts:
        found = stacks.get(verdict.rank, "no stacks: this rank could not write any more\n")
        lines += ["", f"--- rank {verdict.rank}, {verdict.text}", found.rstrip()]
    return "\n".join(lines) + "\n"


def all_stacks() -> str:
    """The Python stacks of all threads of this process, the main thread first, innermost call last."""
    threads = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    parts = []
    for ident, frame in sorted(sys._current_frames().items(), key=lambda item: item[0] != main):
        stack = "".join(traceback.format_stack(frame))
        parts.append(f"thread {threads.get(ident, 'not from Python')} ({ident}):\n{stack}")
    return "\n".join(parts)


def main_thread_waits() -> bool:
    """Whether the main thread is in a collective, or in a backward pass (which holds the reduction of gradients)."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    innermost = traceback.extract_stack(frame)[-4:] if frame is not None else []
    in_collective = any("/torch/distributed/" in entry.filename.replace("\\", "/") for entry in innermost)
    return in_collective or bool(innermost and innermost[-1].name == "_engine_run_backward")
