"""Heartbeats: files in which each rank says where it is, and the verdicts that can be drawn from them.

Enters: a rank's `Heartbeat`. Leaves: `RUN/watchdog/rank00003.json`, overwritten every few seconds, and after a stall a
verdict on each rank.

Files and not torch.distributed's store, because the store lives in rank 0's process (or in the launcher's) and answers
nobody when that is what was killed or stopped, and because a report must be readable after everything has ended. The
run's folder is shared by all nodes anyway, for its checkpoints. A rank reads the others' files only when something is
wrong with its own progress (rank 0 also now and then, to find slow ranks), so n ranks cost n small writes per interval.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import psutil

from data_pipes.store.files import write_atomically
from pretrain.watchdog.config import LIMIT_OF


@dataclass(frozen=True)
class Heartbeat:
    """Where a rank was when it last published."""

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


def heartbeat_path(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank:05d}.json"


def publish(folder: Path, heartbeat: Heartbeat) -> None:
    """Replaces the rank's file; without fsync, as nobody needs it after a loss of power."""
    content = json.dumps(asdict(heartbeat)).encode()
    write_atomically(heartbeat_path(folder, heartbeat.rank), content, durable=False)


def read_heartbeats(folder: Path, size: int, attempt: str) -> dict[int, Heartbeat]:
    """The newest heartbeats of this start by rank; ranks that have not published yet are not among them."""
    names = {field.name for field in fields(Heartbeat)}
    heartbeats = {}
    for rank in range(size):
        try:
            found = json.loads(heartbeat_path(folder, rank).read_text())
        except (OSError, ValueError):
            continue
        if isinstance(found, dict) and found.keys() == names and found["attempt"] == attempt:
            heartbeats[rank] = Heartbeat(**found)
    return heartbeats


def process_state(heartbeat: Heartbeat, host: str) -> str | None:
    """`gone`, `stopped` or `there` for a process of this host; None for another host's."""
    if heartbeat.host != host:
        return None
    try:
        process = psutil.Process(heartbeat.pid)
        status = process.status()
        if abs(process.create_time() - heartbeat.process_created_s) > 1 or status == psutil.STATUS_ZOMBIE:
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
    heartbeat: Heartbeat | None


VERDICTS = ("killed", "stopped", "silent", "failed", "hung", "slow", "working", "waits", "left")
"""From the likeliest cause of a stall to the least likely one."""


def verdicts_on(
    heartbeats: Mapping[int, Heartbeat], size: int, *, host: str, silent: set[int], slow_factor: float
) -> list[Verdict]:
    """A verdict on each rank, the likeliest culprit first; among equals the one that is furthest behind.

    Args:
        heartbeats: by rank; ranks that never published are missing.
        size: number of ranks.
        host: the name of this process's node, whose other processes can be looked at.
        silent: ranks whose file did not change while it was watched.
        slow_factor: a rank is slow that takes this many times the others' median for its own work.
    """
    ratios, phases = slowness(heartbeats), list(LIMIT_OF)
    verdicts = [
        _verdict_on(rank, heartbeats.get(rank), host, rank in silent, ratios.get(rank, 1.0), slow_factor)
        for rank in range(size)
    ]

    def suspicion(verdict: Verdict) -> tuple[float, ...]:
        heartbeat = verdict.heartbeat
        place = (
            (-1, -1, 0.0)
            if heartbeat is None
            else (heartbeat.step, phases.index(heartbeat.phase), heartbeat.beat_time_s)
        )
        return (VERDICTS.index(verdict.kind), *place, verdict.rank)

    return sorted(verdicts, key=suspicion)


def _verdict_on(
    rank: int, heartbeat: Heartbeat | None, host: str, silent: bool, ratio: float, slow_factor: float
) -> Verdict:
    if heartbeat is None:
        return Verdict(rank, "silent", "never published where it stands", None)
    state = process_state(heartbeat, host)
    if heartbeat.ended is not None:
        kind = "left" if heartbeat.ended == "left" else "failed"
        return Verdict(rank, kind, heartbeat.ended, heartbeat)
    if state == "gone":
        return Verdict(rank, "killed", f"killed: its process {heartbeat.pid} is gone, without a word", heartbeat)
    if state == "stopped":
        return Verdict(
            rank, "stopped", f"hung: its process {heartbeat.pid} is stopped (SIGSTOP, a debugger, a freezer)", heartbeat
        )
    if silent and state == "there":
        text = f"hung: process {heartbeat.pid} is there, but none of its threads runs or its disk does not answer"
        return Verdict(rank, "silent", text, heartbeat)
    if silent:
        text = f"silent: process {heartbeat.pid} on {heartbeat.host} was killed or stopped, or its node or disk is gone"
        return Verdict(rank, "silent", text, heartbeat)
    if heartbeat.overdue and heartbeat.waits:
        return Verdict(rank, "waits", "waits for the others, in a collective or the backward pass", heartbeat)
    if heartbeat.overdue:
        return Verdict(
            rank, "hung", f"hung: no progress in more than {heartbeat.limit_s:g} s, not in a collective", heartbeat
        )
    if ratio >= slow_factor:
        return Verdict(rank, "slow", f"slow: {ratio:.1f} times the others' median of own work per step", heartbeat)
    return Verdict(rank, "working", f"works within the {heartbeat.limit_s:g} s that this phase may take", heartbeat)


def slowness(heartbeats: Mapping[int, Heartbeat]) -> dict[int, float]:
    """Each rank's own seconds per step, divided by the median of the others'. Empty for less than two ranks."""
    local = {
        rank: heartbeat.local_step_s for rank, heartbeat in heartbeats.items() if heartbeat.local_step_s is not None
    }
    ratios = {}
    for rank, seconds in local.items():
        others = [value for other, value in local.items() if other != rank]
        if others:
            ratios[rank] = seconds / max(statistics.median(others), 1e-6)
    return ratios
