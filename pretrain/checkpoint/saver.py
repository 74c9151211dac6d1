"""When a save runs and what its failure means: the policy between the loop and the thread that writes.

Enters: the live state at a save point. Leaves: a copy of it on its way to disk, or a reason why not, the same on every
rank: each decision (does it still run? does it hang? did it fail?) is taken by all ranks together, because threads of
different ranks end at different times. The outcomes are listed in the head of pretrain/checkpoint/checkpoints.py.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from pretrain.checkpoint.checkpoints import Checkpoints
from pretrain.checkpoint.errors import CheckpointError
from pretrain.checkpoint.peers import Peers, PeersLostError
from pretrain.checkpoint.retention import Retention
from pretrain.checkpoint.staging import RankPlan, StagingBuffer, flatten, make_plan, structure_of

if TYPE_CHECKING:
    from pretrain.checkpoint.write import SaveJob

_RETRY_S = 2.0
"""Seconds before the second attempt at the last save of a run; they double with each further attempt."""
State = Mapping[str, Mapping[str, Any]]
"""{group: {name: tensor}}; groups are `model.<player>`, `optimizer.<player>`, `ema.<player>`, `rng` and the like."""

logger = logging.getLogger(__name__)


class _RunningSave:
    """A save on its thread. A daemon: a disk that hangs must not keep the process from ending."""

    def __init__(self, step: int, attempts: int) -> None:
        self.step, self.attempts = step, attempts
        self.begin_s = time.monotonic()
        self.seconds, self.size_bytes = 0.0, 0
        self.error: BaseException | None = None
        self.ended = threading.Event()

    def start(self, *work: Any) -> None:
        """Starts the thread with the arguments of `write_checkpoint`."""
        threading.Thread(target=self._run, args=work, name="checkpoint", daemon=True).start()

    @property
    def age_s(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.begin_s

    def _run(self, job: SaveJob, peers: Peers, retention: Retention, damaged: set[str]) -> None:
        from pretrain.checkpoint.write import write_checkpoint

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
    """Saves a run's checkpoints beside training. The loop makes one on every rank and calls it in the same order there:
    all methods but `stats` and `close` are collectives of the main threads. What happened to each save is an event of
    the run's `Checkpoints`.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        """Where it saves, and who is told what happened to each save."""
        self.blocked_s = 0.0
        """Seconds that the loop was blocked since the last `stats`; the loop adds its own share."""
        self._config, self._world = checkpoints.config, checkpoints.world
        self._retention = Retention(self._config.keep_last, self._config.keep_every, self._config.free_before)
        self._peers = Peers(self._world.rank, self._world.size, self._world.saving)
        self._buffer = StagingBuffer(self._world.device)
        self._plan: RankPlan | None = None
        self._running: _RunningSave | None = None
        self._hung = False
        self._num_failed = self._failed_in_a_row = self._num_skipped = 0
        self._last_good: dict[str, float] = {}

    def reserve(self, state: State) -> None:
        """Plans and allocates what `save` needs, so that not even the first save blocks training for longer."""
        self._reserve(flatten(state))

    def save(self, step: int, state: State, loop: dict[str, Any], config_yaml: str, *, last: bool = False) -> bool:
        """Starts to save; returns when the tensors are copied.

        Args:
            step: the optimizer step that the state is of.
            state: tensors by group and name.
            loop: the JSON-able state of the loop; its `run_uid`, `mlflow_run_id` and `position` are put in `COMPLETE`.
            config_yaml: the run's resolved configuration.
            last: whether this is the run's last save: it is never skipped, and tried `last_attempts` times; call `wait`
                after it.
        Returns:
            False where it was skipped, because another save runs.
        Raises:
            CheckpointError: `max_failures` saves in a row failed, or a last save cannot begin.
        """
        begin_s = time.perf_counter()
        try:
            still_runs = self._wait_for_running(last)
            self._check_may_begin(step, last, still_runs)
            if still_runs is not None:
                self._skip(step, still_runs)
                return False
            if step not in self.checkpoints.trusted:
                self._start(step, flatten(state), json.dumps({**loop, "step": step}, indent=1), config_yaml, last)
            return True
        finally:
            self.blocked_s += time.perf_counter() - begin_s

    def settle(self) -> CheckpointError | None:
        """Waits until the running save has ended or counts as hung. A failed one is reported loudly; the run goes on.

        Returns:
            What it failed with; None where it is saved, or none was running.
        """
        begin_s = time.perf_counter()
        try:
            if self._running is None:
                return None
            patience_s = 0.0 if self._hung else self._config.hung_after_s - self._running.age_s
            if not self._ended_within(patience_s):
                return self._count_as_hung(self._running)
            return self._finish()
        finally:
            self.blocked_s += time.perf_counter() - begin_s

    def wait(self) -> None:
        """Waits for the running save.

        Raises:
            CheckpointError: it failed or hangs.
        """
        error = self.settle()
        if error is not None:
            raise error

    def close(self) -> None:
        """Frees the copy, unless something may still be written from it."""
        if self._running is None:
            self._buffer.close()

    def stats(self) -> dict[str, float]:
        """Metrics: ms that the loop was blocked since the last call; seconds and bytes of the newest good save (bytes
        are of all ranks on rank 0); counts of failed and skipped saves of this start.
        """
        blocked_ms, self.blocked_s = 1e3 * self.blocked_s, 0.0
        return {
            "checkpoint/blocked_ms": blocked_ms,
            "checkpoint/failed": float(self._num_failed),
            "checkpoint/failed_in_a_row": float(self._failed_in_a_row),
            "checkpoint/skipped": float(self._num_skipped),
            **self._last_good,
        }

    # -- the beginning of a save -----------------------------------------------------------------------------------

    def _wait_for_running(self, last: bool) -> _RunningSave | None:
        """Waits for a running save as long as the policy says; returns it if it still runs on some rank."""
        running = self._running
        if running is None:
            return None
        if self._hung:
            patience_s, may_hang = 0.0, False
        elif last or self._world.any(running.age_s > self._config.wait_after_s):
            patience_s, may_hang = self._config.hung_after_s - running.age_s, True
        else:
            patience_s, may_hang = self._config.busy_wait_s, False
        if self._ended_within(patience_s):
            self._finish()
            return None
        if may_hang:
            self._count_as_hung(running)
        return running

    def _check_may_begin(self, step: int, last: bool, still_runs: _RunningSave | None) -> None:
        """Checks whether the run may go on.

        Raises:
            CheckpointError: too many saves failed, or the last one cannot begin.
        """
        if last and still_runs is not None:
            raise CheckpointError(
                f"step {step}, the last of this run, cannot be saved: the save of step {still_runs.step} to "
                f"{self.checkpoints.folder} has hung for {still_runs.age_s:.0f} s; check that disk or store, then "
                "resume"
            )
        limit = self._config.max_failures
        if limit is not None and self._failed_in_a_row >= limit and not last:
            raise CheckpointError(
                f"{self._failed_in_a_row} saves in a row failed and checkpoint.max_failures is {limit}; the log says "
                f"why. Check the disk or store behind {self.checkpoints.folder}, then resume"
            )

    def _skip(self, step: int, running: _RunningSave) -> None:
        """Records that a step is not saved because another save runs; where that hangs, it is a failure."""
        if self._hung:
            self._fail(step, f"the save of step {running.step} still hangs")
            return
        self._num_skipped += 1
        self.checkpoints.note("skipped", step, running_step=running.step, running_s=round(running.age_s, 1))
        logger.warning(
            "The save of step %d is skipped: that of step %d still runs after %.0f s; save less often "
            "(checkpoint.every_steps) or to faster storage",
            step,
            running.step,
            running.age_s,
        )

    def _reserve(self, values: dict[str, Any]) -> RankPlan:
        """The plan for these values, made again only where their structure changed, with the buffer laid out for it."""
        if self._plan is None or self._world.any(self._plan.structure != structure_of(values)):
            self._plan = make_plan(values, self._world)
        self._buffer.lay_out(self._plan)
        return self._plan

    def _start(self, step: int, values: dict[str, Any], loop_json: str, config_yaml: str, last: bool) -> None:
        from pretrain.checkpoint.write import SaveJob

        plan = self._reserve(values)
        self._buffer.copy_from(values)
        target = self.checkpoints.folder / f"step-{step:08d}"
        job = SaveJob(target, plan, self._buffer.wait, loop_json, config_yaml)
        self._running = _RunningSave(step, self._config.last_attempts if last else 1)
        self._running.start(job, self._peers, self._retention, self.checkpoints.damaged)
        self.checkpoints.trusted.add(step)

    # -- its end ---------------------------------------------------------------------------------------------------

    def _ended_within(self, seconds: float) -> bool:
        """Whether the running save ended on every rank; waits for it for so long."""
        assert self._running is not None
        return not self._world.any(not self._running.ended.wait(max(0.0, seconds)))

    def _finish(self) -> CheckpointError | None:
        """Records the outcome of a save that ended on every rank; returns what it failed with, or None."""
        saving, was_hung = self._running, self._hung
        assert saving is not None
        self._running, self._hung = None, False
        if self._world.any(isinstance(saving.error, PeersLostError)):
            self._make_new_group()
        if not self._world.any(saving.error is not None):
            self._failed_in_a_row = 0
            self._last_good = {"checkpoint/save_s": saving.seconds, "checkpoint/bytes": float(saving.size_bytes)}
            seconds = round(saving.seconds, 3)
            self.checkpoints.note("saved", saving.step, seconds=seconds, size_bytes=saving.size_bytes)
            return None
        self.checkpoints.trusted.discard(saving.step)
        error = saving.error
        if not isinstance(error, CheckpointError):
            error = CheckpointError(f"{type(error).__name__}: {error}" if error else "it failed on another rank")
        if not was_hung:  # that counted already
            self._fail(saving.step, str(error), cause=saving.error)
        return error

    def _count_as_hung(self, saving: _RunningSave) -> CheckpointError:
        """Records once that the running save hangs; returns the error for it."""
        error = CheckpointError(
            f"the save of step {saving.step} to {self.checkpoints.folder} has not ended in {saving.age_s:.0f} s: the "
            "disk or store hangs. No other save begins before it returns; the last complete checkpoint is untouched"
        )
        if not self._hung:
            self._hung = True
            self.checkpoints.note("hung", saving.step)
            self._fail(saving.step, str(error))
        return error

    def _fail(self, step: int, reason: str, cause: BaseException | None = None) -> None:
        """Counts, records and logs a save that failed."""
        self._num_failed += 1
        self._failed_in_a_row += 1
        self.checkpoints.note("failed", step, reason=reason, in_a_row=self._failed_in_a_row)
        logger.error(
            "A checkpoint was not saved (step %d, %d failed in a row): %s. The last complete one is untouched",
            step,
            self._failed_in_a_row,
            reason,
            exc_info=cause,
        )

    def _make_new_group(self) -> None:
        """A gloo group is of no use after a time-out: all ranks make another."""
        if self._world.control is not None:
            group = dist.new_group(backend="gloo")
            assert isinstance(group, dist.ProcessGroup)
            self._peers = Peers(self._world.rank, self._world.size, group)
