"""What all ranks agree on after a step, and the way back to before a fault.

Enters: the result of each step. Leaves: a `Verdict` that is the same on every rank; after a rollback a `RunState` of
before the fault, with the samples that led to it left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from data_pipes.batch import BatchPlan
from data_pipes.loader import Loader
from data_pipes.loading.unindexed_loader import UnindexedLoader
from pretrain.checkpoint.folder import Folder
from pretrain.config import RunConfig
from pretrain.guard.evidence import Evidence
from pretrain.guard.guard import Guard, Rollback
from pretrain.guard.step_observer import StepObserver
from pretrain.parallel.world import World
from pretrain.run_state import Due, RunState
from pretrain.snapshots import Snapshots

if TYPE_CHECKING:
    from pretrain.metrics import StepResult
    from pretrain.run_log import RunLog


@dataclass(frozen=True)
class Verdict:
    """What every rank knows after a step."""

    stopping: bool
    """A rank was asked to stop."""
    rollback: Rollback | None = None
    """Where the run went wrong; None: it goes on."""
    trusted: bool = True
    """What the weights are worth is known: they may be saved."""


class Recovery:
    """Settles steps, and goes back. Every rank makes one and calls it in the same order."""

    def __init__(
        self,
        config: RunConfig,
        plan: BatchPlan,
        world: World,
        loader: Loader | UnindexedLoader,
        snapshots: Snapshots,
        log: RunLog,
    ) -> None:
        """Starts with nothing observed.

        Args:
            config: of the run; its `guard` says what counts as spoiled.
            plan: how a step's samples are divided.
            world: the processes.
            loader: of the training data, to write down what a bad step held.
            snapshots: where to go back to.
            log: what is told of bad steps.
        """
        self.config, self.plan, self.snapshots, self.log = config, plan, snapshots, log
        self.guard, self.observer = Guard(config.guard), StepObserver(world)
        dataset = loader.dataset if isinstance(loader, Loader) else None
        self.evidence = Evidence(config.run_dir / "guard", world, plan, dataset, config.guard.dump)
        self._went_back_to = -config.guard.window
        """The step of the last rollback's checkpoint; far in the past where there was none."""

    def settle(self, result: StepResult, state: RunState, due: Due, stop: bool) -> Verdict:
        """What all ranks know of the steps by now; of all steps where something is about to be kept. A collective.

        It is the step's one collective beside those of the engine.

        Args:
            result: of the step that was just done.
            state: after that step.
            due: what follows it.
            stop: whether this rank was asked to stop.
        """
        position = state.position - self.plan.global_batch
        self.observer.add(state.step, position, result.losses, list(result.grad_norms.values()))
        keeping = due.save or due.log
        stopping, observed = self.observer.settle(stop, everything=keeping)
        if stopping and not keeping:
            observed += self.observer.settle(True, everything=True)[1]
        rollback: Rollback | None = None
        for seen in observed:
            rollback = rollback or self.guard.observe(seen)
            if not seen.is_finite:
                self.log.say(f"step {seen.step}: the gradient or loss is not finite; every rank skipped the update")
                self.log.event("skipped_step", self.evidence.collect(seen, self.observer.local_losses[seen.step]))
        if due.end and rollback is None:
            rollback = self.guard.give_up()
        return Verdict(stopping, rollback, trusted=not self.guard.is_suspicious)

    def go_back(self, rollback: Rollback, state: RunState) -> None:
        """Restores the newest checkpoint of before the fault, and leaves out the samples that led to it. A collective.

        Args:
            rollback: what `settle` found.
            state: becomes that of the checkpoint, with the samples added to `skipped`.

        Raises:
            FloatingPointError: there is no such checkpoint, or the run has gone back too often.
        """
        state.rollbacks += 1
        losses = self.observer.local_losses.get(rollback.suspect.step, [])
        self.log.event("rollback", {"reason": rollback.reason, **self.evidence.collect(rollback.suspect, losses)})
        restored = self.snapshots.restore(self._find_good(rollback, state))
        self.snapshots.discard_after(restored.step)
        state.step, state.position, self._went_back_to = restored.step, restored.position, restored.step
        state.skipped = state.skipped.with_range(*rollback.skipped(self.plan.global_batch))
        self.log.say(
            f"{rollback.reason}; going back to step {state.step}, without the samples {state.skipped.ranges[-1]}"
        )
        self.log.went_back(state.step)
        self.guard.restart()
        self.observer.restart()

    def _find_good(self, rollback: Rollback, state: RunState) -> Folder:
        newest, most = rollback.newest_good_step, self.config.guard.max_rollbacks
        if state.step - self._went_back_to < self.config.guard.window:  # that checkpoint was spoiled too
            newest = min(newest, self._went_back_to - 1)
        good = self.snapshots.newest(up_to_step=newest) if state.rollbacks <= most else None
        if good is None:
            raise FloatingPointError(
                f"{rollback.reason}, and the run cannot go back: this would be rollback {state.rollbacks} of at "
                f"most guard.max_rollbacks={most}, to a complete checkpoint of step {newest} or before "
                f"(checkpoint.every_steps={self.config.checkpoint.every_steps}). Checkpoints are untouched. Lower "
                "optim.base_lr, set optim.clip_norm, or use fp32"
            )
        return good
