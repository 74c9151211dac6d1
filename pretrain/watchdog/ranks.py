"""Where the ranks of a run stand, as files: what the watchdog publishes, reads and writes its report from.

Enters: a rank's `Stand`. Leaves: `RUN/watchdog/rank00003.json`, overwritten every few seconds, and after a stall a
verdict on each rank.

Files and not torch.distributed's store, because the store lives in rank 0's process (or in the launcher's) and answers
nobody when that is what was killed or stopped, and because a report must be readable after everything has ended. The
run's folder is shared by all nodes anyway, for its checkpoints. A rank reads the others' files only when something is
wrong with its own progress (rank 0 also now and then, to find slow ranks), so n ranks cost n small writes per interval.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import psutil

from pretrain.watchdog.config import LIMIT_OF


@dataclass(frozen=True)
class Stand:
    """Where a rank stood when it last published."""

    attempt: str
    """The start of the run that this belongs to."""
    rank: int
    host: str
    pid: int
    process_created_s: float
    """Unix time; tells a process from a later one with its pid."""
    sequence: int
    """Grows with each publication."""
    phase: str
    step: int
    idle_s: float
    """Seconds since the last beat."""
    limit_s: float
    """Seconds that the phase may take."""
    beat_time_s: float
    """Unix time of the last beat."""
    local_step_s: float | None
    """Seconds per step that the rank spent on its own (data, forward); None where nothing was measured."""
    waits: bool
    """The main thread is inside of torch.distributed or the backward pass, where a rank waits for the others."""
    ended: str | None
    """How the rank left: `left`, or `failed: ` and the error; None while it runs."""

    @property
    def overdue(self) -> bool:
        return self.ended is None and self.idle_s > self.limit_s


def stand_path(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank:05d}.json"


def publish(folder: Path, stand: Stand) -> None:
    """Replaces the rank's file; without fsync, as nobody needs it after a loss of power."""
    write_whole(stand_path(folder, stand.rank), json.dumps(asdict(stand)))


def write_whole(path: Path, text: str) -> None:
    """Readers see the old or the new content, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def read_stands(folder: Path, size: int, attempt: str) -> dict[int, Stand]:
    """The stands of this start by rank; without ranks that have not published yet."""
    names = {field.name for field in fields(Stand)}
    stands = {}
    for rank in range(size):
        try:
            found = json.loads(stand_path(folder, rank).read_text())
        except (OSError, ValueError):
            continue
        if isinstance(found, dict) and found.keys() == names and found["attempt"] == attempt:
            stands[rank] = Stand(**found)
    return stands


def process_state(stand: Stand, host: str) -> str | None:
    """`gone`, `stopped` or `there` for a process of this host; None for another host's."""
    if stand.host != host:
        return None
    try:
        process = psutil.Process(stand.pid)
        status = process.status()
        if abs(process.create_time() - stand.process_created_s) > 1 or status == psutil.STATUS_ZOMBIE:
            return "gone"
    except psutil.NoSuchProcess:
        return "gone"
    except psutil.Error:
        return "there"
    return "stopped" if status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP) else "there"


@dataclass(frozen=True)
class Verdict:
    """What a report says of one rank."""

    rank: int
    kind: str
    """One of `VERDICTS`."""
    text: str
    stand: Stand | None


VERDICTS = ("killed", "stopped", "silent", "failed", "hung", "slow", "working", "waits", "left")
"""From the likeliest cause of a stall to the least likely one."""


def judge(stands: Mapping[int, Stand], size: int, *, host: str, silent: set[int], slow_factor: float) -> list[Verdict]:
    """A verdict on each rank, the likeliest culprit first; among equals the one that is furthest behind.

    silent: ranks whose file did not change while it was watched.
    """
    ratios, phases = slowness(stands), list(LIMIT_OF)
    verdicts = [
        _judge(rank, stands.get(rank), host, rank in silent, ratios.get(rank, 1.0), slow_factor) for rank in range(size)
    ]

    def suspicion(verdict: Verdict) -> tuple[float, ...]:
        stand = verdict.stand
        place = (-1, -1, 0.0) if stand is None else (stand.step, phases.index(stand.phase), stand.beat_time_s)
        return (VERDICTS.index(verdict.kind), *place, verdict.rank)

    return sorted(verdicts, key=suspicion)


def _judge(rank: int, stand: Stand | None, host: str, silent: bool, ratio: float, slow_factor: float) -> Verdict:
    if stand is None:
        return Verdict(rank, "silent", "never published where it stands", None)
    state = process_state(stand, host)
    if stand.ended is not None:
        kind = "left" if stand.ended == "left" else "failed"
        return Verdict(rank, kind, stand.ended, stand)
    if state == "gone":
        return Verdict(rank, "killed", f"killed: its process {stand.pid} is gone, without a word", stand)
    if state == "stopped":
        return Verdict(
            rank, "stopped", f"hung: its process {stand.pid} is stopped (SIGSTOP, a debugger, a freezer)", stand
        )
    if silent and state == "there":
        text = f"hung: process {stand.pid} is there, but none of its threads runs or its disk does not answer"
        return Verdict(rank, "silent", text, stand)
    if silent:
        text = f"silent: process {stand.pid} on {stand.host} was killed or stopped, or its node or disk is gone"
        return Verdict(rank, "silent", text, stand)
    if stand.overdue and stand.waits:
        return Verdict(rank, "waits", "waits for the others, in a collective or the backward pass", stand)
    if stand.overdue:
        return Verdict(rank, "hung", f"hung: no progress in more than {stand.limit_s:g} s, not in a collective", stand)
    if ratio >= slow_factor:
        return Verdict(rank, "slow", f"slow: {ratio:.1f} times the others' median of own work per step", stand)
    return Verdict(rank, "working", f"works within the {stand.limit_s:g} s that this phase may take", stand)


def slowness(stands: Mapping[int, Stand]) -> dict[int, float]:
    """Each rank's own seconds per step, divided by the median of the others'. Empty for less than two ranks."""
    local = {rank: stand.local_step_s for rank, stand in stands.items() if stand.local_step_s is not None}
    ratios = {}
    for rank, seconds in local.items():
        others = [value for other, value in local.items() if other != rank]
        if others:
            ratios[rank] = seconds / max(statistics.median(others), 1e-6)
    return ratios
