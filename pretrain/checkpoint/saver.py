"""When a save runs and what its failure means: the policy between the loop and the thread that writes.

Enters: the live state at a save point. Leaves: a copy of it on its way to disk, or a reason why not, the same on every
rank: each decision (still running? hung? failed?) is a vote, because threads of different ranks end at different times.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from pretrain.checkpoint.config import CheckpointConfig
from pretrain.checkpoint.errors import CheckpointError
from pretrain.checkpoint.staging import RankPlan, StagingBuffer, flatten, make_plan, structure_of
from pretrain.checkpoint.store import Place
from pretrain.checkpoint.write import Job, Peers, PeersLostError, Retention, write_checkpoint
from pretrain.parallel.world import World

_RETRY_S = 2.0
# before the second attempt at the last save; doubles

State = Mapping[str, Mapping[str, Any]]

logger = logging.getLogger(__name__)


class _Saving:
    """A save on its thread. A daemon: a disk that hangs must not keep the process from ending."""

    def __init__(self, step: int, attempts: int) -> None:
        self.step, self.attempts = step, attempts
        self.begin_s = time.monotonic()
        self.seconds, self.size_bytes = 0.0, 0
        self.error: BaseException | None = None
        self.ended = threading.Event()

    def start(self, *work: Any) -> None:
        threading.Thread(target=self._run, args=work, name="checkpoint", daemon=True).start()

    @property
    def age_s(self) -> float:
        return time.monotonic() - self.begin_s

    def _run(self, job: Job, peers: Peers, retention: Retention, damaged: set[str]) -> None:
        try:
            for attempt in range(self.attempts):
                try:
                    self.size_bytes = write_checkpoint(job, peers, retention, damaged)
                    return
                except PeersLostError:
                    raise
                except CheckpointError as error:
                    if self.attempts == 1:
                        raise
                    if attempt == self.attempts - 1:
                        raise CheckpointError(f"{error} ({self.attempts} attempts)") from error
                    logger.warning("%s; attempt %d of %d follows", error, attempt + 2, self.attempts)
                    time.sleep(_RETRY_S * 2**attempt)
        except BaseException as error:  # the loop's thread looks at it
            self.error = error
        finally:
            self.seconds = self.age_s
            self.ended.set()


class Saver:
    """Starts saves and takes note of their ends. Its methods are collectives of the main threads, but for `stats`,
    `note`, `take_events` and `close`.
    """

    def __init__(self, folder: Place, config: CheckpointConfig, world: World) -> None:
        self.folder, self.config, self.world = folder, config, world
        self.blocked_s = 0.0
        self.trusted: set[int] = set()
        """Steps that this start saved or resumed from; a folder of another step that is in the way is set aside."""
        self.damaged: set[str] = set()
        """Names of folders that do not count as kept; rank 0's."""
        self._retention = Retention(config.keep_last, config.keep_every, config.free_before)
        self._peers = Peers(world.rank, world.size, world.saving)
        self._buffer = StagingBuffer(world.device)
        self._plan: RankPlan | None = None
        self._running: _Saving | None = None
        self._hung = False
        self._num_failed = self._failed_in_a_row = self._num_skipped = 0
        self._last: dict[str, float] = {}
        self._events: list[dict[str, Any]] = []

    def reserve(self, state: State) -> None:
        """Plans and allocates what `save` needs."""
        self._reserve(flatten(state))

    def save(self, step: int, state: State, loop: dict[str, Any], config_yaml: str, *, last: bool) -> bool:
        """Starts to save; returns when the tensors are copied. False: skipped, because another save runs."""
        begin_s = time.perf_counter()
        try:
            still_runs = self._make_room(last)
            self._check(step, last, still_runs)
            if still_runs is not None:
                self._pass_over(step, still_runs)
                return False
            if step not in self.trusted:
                self._start(step, flatten(state), json.dumps({**loop, "step": step}, indent=1), config_yaml, last)
            return True
        finally:
            self.blocked_s += time.perf_counter() - begin_s

    def wait(self) -> CheckpointError | None:
        """Waits until the running save has ended or counts as hung; returns what it failed with."""
        begin_s = time.perf_counter()
        try:
            if self._running is None:
                return None
            patience_s = 0.0 if self._hung else self.config.hung_after_s - self._running.age_s
            if not self._ended_within(patience_s):
                return self._call_hung(self._running)
            return self._take_note()
        finally:
            self.blocked_s += time.perf_counter() - begin_s

    def close(self) -> None:
        """Frees the copy, unless something may still be written from it."""
        if self._running is None:
            self._buffer.close()

    def stats(self) -> dict[str, float]:
        blocked_ms, self.blocked_s = 1e3 * self.blocked_s, 0.0
        return {
            "checkpoint/blocked_ms": blocked_ms,
            "checkpoint/failed": float(self._num_failed),
            "checkpoint/failed_in_a_row": float(self._failed_in_a_row),
            "checkpoint/skipped": float(self._num_skipped),
            **self._last,
        }

    def note(self, event: str, step: int, **more: Any) -> None:
        self._events.append({"event": event, "step": step, "time_ms": int(time.time() * 1000), **more})

    def take_events(self) -> list[dict[str, Any]]:
        events, self._events = self._events, []
        return events

    # -- the beginning of a save -----------------------------------------------------------------------------------

    def _make_room(self, last: bool) -> _Saving | None:
        """Waits for a running save as long as the policy says; returns it if it still runs on some rank."""
        running = self._running
        if running is None:
            return None
        if self._hung:
            patience_s, may_hang = 0.0, False
        elif last or self.world.any(running.age_s > self.config.wait_after_s):
            patience_s, may_hang = self.config.hung_after_s - running.age_s, True
        else:
            patience_s, may_hang = self.config.busy_wait_s, False
        if self._ended_within(patience_s):
            self._take_note()
            return None
        if may_hang:
            self._call_hung(running)
        return running

    def _check(self, step: int, last: bool, still_runs: _Saving | None) -> None:
        if last and still_runs is not None:
            raise CheckpointError(
                f"step {step}, the last of this run, cannot be saved: the save of step {still_runs.step} to "
                f"{self.folder} has hung for {still_runs.age_s:.0f} s; check that disk or store, then resume"
            )
        limit = self.config.max_failures
        if limit is not None and self._failed_in_a_row >= limit and not last:
            raise CheckpointError(
                f"{self._failed_in_a_row} saves in a row failed and checkpoint.max_failures is {limit}; the log says "
                f"why. Check the disk or store behind {self.folder}, then resume"
            )

    def _pass_over(self, step: int, running: _Saving) -> None:
        if self._hung:
            self._fail(step, f"the save of step {running.step} still hangs")
            return
        self._num_skipped += 1
        self.note("skipped", step, running_step=running.step, running_s=round(running.age_s, 1))
        logger.warning(
            "The save of step %d is skipped: that of step %d still runs after %.0f s; save less often "
            "(checkpoint.every_steps) or to faster storage",
            step,
            running.step,
            running.age_s,
        )

    def _reserve(self, values: dict[str, Any]) -> RankPlan:
        if self._plan is None or self.world.any(self._plan.structure != structure_of(values)):
            self._plan = make_plan(values, self.world)
        self._buffer.lay_out(self._plan)
        return self._plan

    def _start(self, step: int, values: dict[str, Any], loop_json: str, config_yaml: str, last: bool) -> None:
        plan = self._reserve(values)
        self._buffer.take(values)
        job = Job(self.folder / f"step-{step:08d}", plan, self._buffer.wait, loop_json, config_yaml)
        self._running = _Saving(step, self.config.last_attempts if last else 1)
        self._running.start(job, self._peers, self._retention, self.damaged)
        self.trusted.add(step)

    # -- its end ---------------------------------------------------------------------------------------------------

    def _ended_within(self, seconds: float) -> bool:
        """Whether the running save ended on every rank; waits for it for so long."""
        assert self._running is not None
        return not self.world.any(not self._running.ended.wait(max(0.0, seconds)))

    def _take_note(self) -> CheckpointError | None:
        """Of a save that ended on every rank: what it failed with, or None."""
        saving, was_hung = self._running, self._hung
        assert saving is not None
        self._running, self._hung = None, False
        if self.world.any(isinstance(saving.error, PeersLostError)):
            self._regroup()
        if not self.world.any(saving.error is not None):
            self._failed_in_a_row = 0
            self._last = {"checkpoint/save_s": saving.seconds, "checkpoint/bytes": float(saving.size_bytes)}
            self.note("saved", saving.step, seconds=round(saving.seconds, 3), size_bytes=saving.size_bytes)
            return None
        self.trusted.discard(saving.step)
        error = saving.error
        if not isinstance(error, CheckpointError):
            error = CheckpointError(f"{type(error).__name__}: {error}" if error else "it failed on another rank")
        if not was_hung:  # that counted already
            self._fail(saving.step, str(error), cause=saving.error)
        return error

    def _call_hung(self, saving: _Saving) -> CheckpointError:
        error = CheckpointError(
            f"the save of step {saving.step} to {self.folder} has not ended in {saving.age_s:.0f} s: the disk or store "
            "hangs. No other save begins before it returns; the last complete checkpoint is untouched"
        )
        if not self._hung:
            self._hung = True
            self.note("hung", saving.step)
            self._fail(saving.step, str(error))
        return error

    def _fail(self, step: int, reason: str, cause: BaseException | None = None) -> None:
        self._num_failed += 1
        self._failed_in_a_row += 1
        self.note("failed", step, reason=reason, in_a_row=self._failed_in_a_row)
        logger.error(
            "A checkpoint was not saved (step %d, %d failed in a row): %s. The last complete one is untouched",
            step,
            self._failed_in_a_row,
            reason,
            exc_info=cause,
        )

    def _regroup(self) -> None:
        """After a time-out a gloo group is of no use: all ranks make another."""
        if self.world.control is not None:
            group = dist.new_group(backend="gloo")
            assert isinstance(group, dist.ProcessGroup)
            self._peers = Peers(self.world.rank, self.world.size, group)
