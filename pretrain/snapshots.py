"""What a run keeps in its checkpoints: tensors of the engine, states of generators, the state of the loop.

Enters: a `RunState` and an engine. Leaves: saves that were begun; the engine as a checkpoint left it. It stands between
the loop, which knows what belongs to a run, and `checkpoint/`, which knows how tensors and files are kept.
"""

from __future__ import annotations

import time
from typing import Any

from data_pipes.loader import Loader
from data_pipes.loading.unindexed_loader import UnindexedLoader
from pretrain.checkpoint.checkpoints import Checkpoints, rng_state, set_rng_state
from pretrain.checkpoint.folder import Folder
from pretrain.checkpoint.saver import Saver
from pretrain.config import RunConfig
from pretrain.parallel.finite import are_finite
from pretrain.parallel.strategy import Strategy, Tensors
from pretrain.parallel.world import World
from pretrain.run_log import RunLog
from pretrain.run_state import RunState
from pretrain.watchdog.watchdog import Watchdog


def restore(checkpoints: Checkpoints, checkpoint: Folder, strategy: Strategy, world: World) -> dict[str, Any]:
    """Reads a checkpoint into the engine and the generators. A collective.

    Args:
        checkpoints: reads it.
        checkpoint: of any strategy and number of processes.
        strategy: after `prepare`.
        world: the processes.

    Returns:
        What its `state.json` holds: that of `RunState.to_dict`, and what `Snapshots.save` adds.

    Raises:
        CheckpointError: it lacks something that this configuration trains, or has it in another shape.
    """
    tensors = _tensors(strategy, world)
    kept = checkpoints.load(checkpoint, tensors)
    strategy.load_state(tensors)
    set_rng_state(tensors["rng"], world)
    return kept


class Snapshots:
    """A run's checkpoints, as its loop sees them. The methods are collectives: every rank calls them in one order."""

    def __init__(
        self,
        config: RunConfig,
        checkpoints: Checkpoints,
        saver: Saver,
        strategy: Strategy,
        world: World,
        loader: Loader | UnindexedLoader,
        log: RunLog,
        watchdog: Watchdog,
        run_uid: str,
    ) -> None:
        """Allocates what a save needs, so that not even the first one blocks training for longer than the others.

        Args:
            config: resolved; each checkpoint holds it.
            checkpoints: finds and reads them.
            saver: writes them.
            strategy: after `prepare`.
            world: the processes.
            loader: whose order of the data each checkpoint describes.
            log: is flushed before each save.
            watchdog: is told of saves.
            run_uid: of `run.json`; each checkpoint holds it.
        """
        self.checkpoints, self.saver, self.strategy, self.world = checkpoints, saver, strategy, world
        self._config_yaml, self._run_uid = config.to_yaml(), run_uid
        self._loader, self._log, self._watchdog = loader, log, watchdog
        saver.reserve(_tensors(strategy, world))

    def save(self, state: RunState, *, trusted: bool = True, last: bool) -> None:
        """Begins to save; returns when the tensors are copied.

        Args:
            state: of the run.
            trusted: whether it is known what the weights are worth; if not, this is said, and nothing is saved.
            last: whether the run ends here: then the save is never skipped, and is tried again when it fails.

        Raises:
            FloatingPointError: a weight is not finite.
            CheckpointError: see `checkpoint.max_failures`.
        """
        if not trusted:
            self._log.say(f"step {state.step} is not saved: the newest losses are not to be trusted")
            return
        with self._watchdog.phase("save", state.step):
            begin_s = time.perf_counter()
            self._log.flush_to_disk()
            more = {
                "order": self._loader.state(state.position),
                "run_uid": self._run_uid,
                "mlflow_run_id": self._log.mlflow_run_id,
                "samples_per_epoch": self._log.data.num_samples,
            }
            tensors = _tensors(self.strategy, self.world)
            if not are_finite(tensors, self.world):
                raise FloatingPointError(
                    f"step {state.step} is not saved: a weight is not finite, although every gradient was. The last "
                    "complete checkpoint is untouched. Lower optim.base_lr, set optim.clip_norm, or use fp32"
                )
            self.saver.blocked_s += time.perf_counter() - begin_s
            self.saver.save(state.step, tensors, state.to_dict() | more, self._config_yaml, last=last)

    def newest(self, up_to_step: int) -> Folder | None:
        """The newest complete and verified checkpoint of `up_to_step` or before, once the running save has ended."""
        self.saver.settle()
        return self.checkpoints.find(up_to_step=up_to_step)

    def restore(self, checkpoint: Folder) -> RunState:
        """Takes the engine and the generators back to a checkpoint of this run; returns the run's state in it."""
        return RunState.from_dict(restore(self.checkpoints, checkpoint, self.strategy, self.world))

    def discard_after(self, step: int) -> None:
        """Sets the checkpoints of later steps aside: after a rollback these steps come again."""
        self.checkpoints.discard_after(step)


def _tensors(strategy: Strategy, world: World) -> dict[str, Tensors]:
    return strategy.state() | {"rng": rng_state(world)}
