"""The watchdog: a thread in each rank that ends a run which makes no progress, and says which rank is to blame.

Enters: `with watchdog.phase(name, step)` from the loop. Leaves: each rank's heartbeat (`RUN/watchdog/`, see
`heartbeats.py`), metrics of the slowest rank, and on a stall `RUN/watchdog/<start>/report.txt` and exit code 75, after
which torchrun (`--max-restarts`) or whoever requeues starts the run again from its newest checkpoint.

A stall: this rank's phase takes longer than its limit, and no rank that is alive still is within its own (a rank that
waits in a collective while rank 0 writes a checkpoint is not stalled). A killed rank makes its peers' collectives fail
at once (gloo) or hang (NCCL, until torchrun ends them); both lead to a report. A slow rank is only told: its own work
per step (waiting for data, and the forward pass) against the median of the others. The other parts of a step contain
collectives and take the same time on all ranks; under FSDP2 the forward pass does too, so the ratio is smaller than it
really is; on CUDA it is the host's time.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import psutil

from pretrain.parallel.world import World
from pretrain.signals import StopRequest
from pretrain.watchdog.config import WatchdogConfig
from pretrain.watchdog.heartbeats import Heartbeat, publish, read_heartbeats, slowness, verdicts_on
from pretrain.watchdog.report import Report, all_stacks, main_thread_waits

EXIT_NO_PROGRESS = 75
"""The process's exit code after a stall, or when it could not leave in time after a stop signal: try again."""
_IN_A_STEP = ("first_step", "data", "forward", "step")
_OWN_WORK = ("data", "forward")
_NANOSECOND = 1e-9
_LOOKS_PER_COMPARISON = 6
_NOTICEABLE_S = 0.005
"""Per step: a rank that loses less is not warned about."""
_SETTLE_S = 1.0
"""After a failure: meanwhile the others publish theirs, and a killed process disappears."""

logger = logging.getLogger(__name__)


class Watchdog:
    """Watches this rank from `with` to its end. Every rank makes one; entering it is a collective."""

    def __init__(self, run_dir: Path, world: World, config: WatchdogConfig, stop: StopRequest | None = None) -> None:
        """Watches nothing yet: that begins with `with`.

        Args:
            run_dir: the run's folder, which all nodes share.
            world: the processes.
            config: how long each phase may take.
            stop: whose signals bound the time to leave, and which is told when the launcher is gone.
        """
        self.world, self.config, self.stop = world, config, stop
        self.folder = run_dir / "watchdog"
        self.attempt = ""
        self._host = socket.gethostname()
        self._created_s = psutil.Process().create_time()
        self._launcher_pid = stop.launcher_pid if stop is not None else os.getppid()
        self._by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        self._place = ("start", 0, time.monotonic_ns())
        self._first_step: int | None = None
        self._own_ns, self._num_steps = 0, 0
        self._done = self._measured = (0, 0)
        self._local_step_s: float | None = None
        self._sequence = 0
        self._seen: dict[int, tuple[int, float]] = {}
        self._metrics: dict[str, float] = {}
        self._warned_of: int | None = None
        self._compared_s = self._checked_s = float("-inf")
        self._orphaned = self._disk_failed = False
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    # -- the loop's side -----------------------------------------------------------------------------------------

    def __enter__(self) -> Watchdog:
        if self.config.enabled:
            named = time.strftime("%Y%m%d-%H%M%S", time.gmtime()) + f"-{os.getpid()}"
            self.attempt = self.world.broadcast(named)
            self._report = Report(self.folder / self.attempt, self.world.rank)
            self.beat("start", 0)
            self._thread.start()
        return self

    @contextlib.contextmanager
    def phase(self, phase: str, step: int) -> Iterator[None]:
        """Within, the loop is in `phase` of the step after `step` finished ones; costs a few microseconds.

        After it comes `step`, which stands for all that is no phase of its own. An error leaves the phase as it is, so
        that a report names where it was raised.

        Args:
            phase: start, data, forward, step (backward and optimizer), save, validate or close. The limit of the first
                step is that of `first_step`, which may also be given.
            step: optimizer steps done.
        """
        self.beat(phase, step)
        yield
        self._enter("step", step)

    def beat(self, phase: str, step: int) -> None:
        """The loop begins `phase`, as in the method `phase`, and is in it until the next one begins."""
        self._enter(phase, step)

    def _enter(self, phase: str, step: int) -> None:
        now = time.monotonic_ns()
        before, last_step, since = self._place
        if phase in _IN_A_STEP:
            if self._first_step is None:
                self._first_step = step
            if step == self._first_step:
                phase = "first_step"
        if before in _OWN_WORK:
            self._own_ns += now - since
        if step != last_step and before != "first_step":
            self._num_steps += 1
            self._done = (self._own_ns, self._num_steps)
        self._place = (phase, step, now)

    def metrics(self) -> dict[str, float]:
        """On rank 0 of several, where known: `watchdog/slowest_rank`, and `watchdog/slowest_ratio` of its own work per
        step to the others' median."""
        return dict(self._metrics)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.config.enabled:
            return
        self._leaving.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        with contextlib.suppress(OSError):  # nothing may hide the error that ends the run
            self._publish(ended="left" if error is None else f"failed: {kind.__name__ if kind else ''}: {error}"[:500])
            if error is not None and self.world.size > 1 and not isinstance(error, (ValueError, KeyboardInterrupt)):
                self._report_failure()

    # -- the thread's side ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            try:
                self._look()
                self._disk_failed = False
            except Exception as error:  # the run outlives a full disk, so the watchdog does too
                if not self._disk_failed:
                    logger.warning("the watchdog cannot publish to %s (%r); it goes on watching", self.folder, error)
                self._disk_failed = True
            if self._leaving.wait(self.config.interval_s):
                return

    def _look(self) -> None:
        phase, _, since = self._place
        idle_s, limit_s = _NANOSECOND * (time.monotonic_ns() - since), self.config.limit_s(phase)
        # Where native code holds the interpreter lock, or this file system no longer answers, this thread stands still
        # too: then C code prints all stacks to stderr and ends the process with 1.
        if sys.__stderr__ is not None:
            faulthandler.dump_traceback_later(limit_s + 2 * self._silent_s, exit=True, file=sys.__stderr__)
        self._notice_orphan()
        arrived_s = None if self.stop is None else self.stop.arrived_s()
        if arrived_s is not None and time.monotonic() - arrived_s > self.config.stop_timeout_s:
            self._end(f"rank {self.world.rank} did not leave within {self.config.stop_timeout_s:g} s of a stop signal")
        elif idle_s > limit_s and self._nobody_progresses():
            self._end(
                f"no progress: rank {self.world.rank} is in phase {phase} since {idle_s:.0f} s ({limit_s:g} s allowed)"
            )
        self._measure()
        self._publish()
        if self.world.size > 1 and self._report.is_claimed():
            self._end("another rank found that the run makes no progress")
        if self.world.is_main and time.monotonic() - self._compared_s > _LOOKS_PER_COMPARISON * self.config.interval_s:
            self._compare()

    @property
    def _silent_s(self) -> float:
        """A rank that has not published for this long is silent."""
        return 4 * self.config.interval_s

    def _notice_orphan(self) -> None:
        """A run whose torchrun was killed saves and leaves: whoever starts it again would write to the same folder."""
        if self._by_torchrun and not self._orphaned and os.getppid() != self._launcher_pid:
            self._orphaned = True
            logger.warning("the launcher (process %d) is gone; saving, then leaving", self._launcher_pid)
            if self.stop is not None:
                os.kill(os.getpid(), signal.SIGTERM)

    def _nobody_progresses(self) -> bool:
        """Whether no other rank is alive and within its limit. May say no for a while before it knows."""
        now = time.monotonic()
        # n ranks that all read n files: at most 20,000 reads per second.
        if now - self._checked_s < max(self.config.interval_s, self.world.size**2 / 20_000) * 0.9:
            return False
        self._checked_s = now
        heartbeats = self._others()
        silent = self._silent(heartbeats)
        return not any(
            rank not in silent and heartbeat.ended is None and not heartbeat.overdue
            for rank, heartbeat in heartbeats.items()
        )

    def _others(self) -> dict[int, Heartbeat]:
        heartbeats = read_heartbeats(self.folder, self.world.size, self.attempt)
        return {rank: heartbeat for rank, heartbeat in heartbeats.items() if rank != self.world.rank}

    def _silent(self, heartbeats: dict[int, Heartbeat]) -> set[int]:
        """Ranks whose file has not changed for `_silent_s`, as far as this rank has looked; no clocks are compared."""
        now = time.monotonic()
        for rank, heartbeat in heartbeats.items():
            if rank not in self._seen or self._seen[rank][0] != heartbeat.sequence:
                self._seen[rank] = (heartbeat.sequence, now)
        return {rank for rank in heartbeats if now - self._seen[rank][1] >= self._silent_s}

    def _measure(self) -> None:
        own_ns, num_steps = self._done
        if num_steps > self._measured[1]:
            self._local_step_s = _NANOSECOND * (own_ns - self._measured[0]) / (num_steps - self._measured[1])
            self._measured = (own_ns, num_steps)

    def _publish(self, ended: str | None = None) -> None:
        phase, step, since = self._place
        idle_s = _NANOSECOND * (time.monotonic_ns() - since)
        self._sequence += 1
        heartbeat = Heartbeat(
            attempt=self.attempt,
            rank=self.world.rank,
            host=self._host,
            pid=os.getpid(),
            process_created_s=self._created_s,
            sequence=self._sequence,
            phase=phase,
            step=step,
            idle_s=idle_s,
            limit_s=self.config.limit_s(phase),
            beat_time_s=time.time() - idle_s,
            local_step_s=self._local_step_s,
            waits=main_thread_waits(),
            ended=ended,
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        publish(self.folder, heartbeat)

    def _compare(self) -> None:
        """Rank 0: who is slow."""
        self._compared_s = time.monotonic()
        heartbeats = read_heartbeats(self.folder, self.world.size, self.attempt)
        ratios = slowness(heartbeats)
        if not ratios:
            return
        slowest = max(ratios, key=lambda rank: ratios[rank])
        self._metrics = {"watchdog/slowest_rank": float(slowest), "watchdog/slowest_ratio": ratios[slowest]}
        own_s = heartbeats[slowest].local_step_s or 0.0
        noticeable = own_s * (1 - 1 / max(ratios[slowest], 1.0)) > _NOTICEABLE_S
        if ratios[slowest] >= self.config.slow_factor and noticeable and slowest != self._warned_of:
            self._warned_of = slowest
            logger.warning(
                "rank %d on %s is slow: its own work takes %.1f ms per step, %.1f times the others' median",
                slowest,
                heartbeats[slowest].host,
                1e3 * own_s,
                ratios[slowest],
            )

    # -- reports -------------------------------------------------------------------------------------------------

    def _end(self, cause: str) -> None:
        """Writes this rank's stacks; the first rank here also the report, for which the others wait. Then exits."""
        print(f"watchdog, rank {self.world.rank}: {cause}", file=sys.__stderr__, flush=True)
        self._report.add_stacks(all_stacks())
        if self._report.claim():
            if self.world.size > 1:
                self._silent(self._others())
                time.sleep(self._silent_s)  # the others notice the claim, and who does not publish is silent
            with contextlib.suppress(OSError):
                self._publish()
            self._write_report(cause)
        else:
            deadline = time.monotonic() + 3 * self._silent_s
            while not self._report.path.exists() and time.monotonic() < deadline:
                with contextlib.suppress(OSError):
                    self._publish()
                time.sleep(min(self.config.interval_s, 0.5))
        os._exit(EXIT_NO_PROGRESS)

    def _report_failure(self) -> None:
        """This rank raised, perhaps because another one was killed: says who."""
        self._report.add_stacks(traceback.format_exc())
        if self._report.claim():
            time.sleep(_SETTLE_S)
            self._write_report(f"rank {self.world.rank} failed")

    def _write_report(self, cause: str) -> None:
        heartbeats = read_heartbeats(self.folder, self.world.size, self.attempt)
        silent = self._silent(heartbeats) - {self.world.rank}
        factor = self.config.slow_factor
        self._report.write(
            cause, verdicts_on(heartbeats, self.world.size, host=self._host, silent=silent, slow_factor=factor)
        )
