"""Checkpoints: `step-00001200/` holds DCP shards, the resolved config, the loop's state, and `COMPLETE`.

`COMPLETE` (step, time, run ids, size and sha256 of every file) is written last, after every rank's bytes are on disk:
a folder without it is torn. The loop waits for a copy of the tensors only; a thread writes, with a process group of
its own. What happens when something goes wrong:

| what | outcome |
|---|---|
| a write fails (full disk, EIO, read-only, folder gone), on one rank or all | the save fails on all ranks: log, \
event, `checkpoint/failed`; what was written is removed; older checkpoints are untouched; the run goes on |
| that happens `max_failures` times in a row (default: never) | the run ends with a CheckpointError |
| the last save of a run fails | `last_attempts` attempts, then the run ends with a CheckpointError |
| a save falls due while another runs | the run waits `busy_wait_s`, then skips the new one: log, event, \
`checkpoint/skipped`; where the running one is older than `wait_after_s` the run waits for it |
| a save does not end in `hung_after_s` | it counts as failed; none is begun until it returns (one copy in memory) |
| killed while saving | the folder has no `COMPLETE`: never loaded or counted, set aside when its step is saved again |
| the newest checkpoint is damaged | the one before is used: log, event; the damaged one stays where it is |
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint.config import CheckpointConfig
from pretrain.checkpoint.dcp import read_into, tensor_shapes
from pretrain.checkpoint.errors import CheckpointError
from pretrain.checkpoint.read import (
    find_damage,
    folder_of_run,
    list_folder,
    step_of,
)
from pretrain.checkpoint.saver import Saver, State
from pretrain.checkpoint.staging import flatten
from pretrain.checkpoint.store import Place, place_of, store_of
from pretrain.checkpoint.write import set_aside
from pretrain.parallel.world import World

logger = logging.getLogger(__name__)


class Checkpointer:
    """Saves in the background and finds what to resume from. Every rank makes one and calls it in the same order: all
    methods but `stats`, `take_events` and `close` are collectives of the main threads.
    """

    def __init__(self, run_dir: Path, config: CheckpointConfig, world: World) -> None:
        self.folder: Place = folder_of_run(run_dir, config.folder)
        self.config = config
        self.world = world
        self._default_folder: Place = folder_of_run(run_dir, None)
        self._saver = Saver(self.folder, config, world)

    @property
    def blocked_s(self) -> float:
        """Seconds that the loop spent in `save` and `wait` since the last look; `stats` or the reader resets it."""
        return self._saver.blocked_s

    @blocked_s.setter
    def blocked_s(self, value: float) -> None:
        self._saver.blocked_s = value

    def reserve(self, state: State) -> None:
        """Plans and allocates what `save` needs, so that not even the first save blocks training for longer."""
        self._saver.reserve(state)

    def save(self, step: int, state: State, loop: dict[str, Any], config_yaml: str, *, last: bool = False) -> bool:
        """Starts to save; returns when the tensors are copied. False: it was skipped, because another save runs.

        loop: the JSON-able state of the loop; its `run_uid`, `mlflow_run_id` and `position` are put in `COMPLETE`.
        last: of the run: never skipped, tried `last_attempts` times; call `wait` after it.
        Raises CheckpointError after `max_failures` failed saves in a row, and for a last save that cannot begin.
        """
        return self._saver.save(step, state, loop, config_yaml, last=last)

    def settle(self) -> None:
        """Waits for the running save; a failed one is reported loudly and the run goes on."""
        self._saver.wait()

    def wait(self) -> None:
        """Waits for the running save. Raises CheckpointError if it failed or hangs."""
        error = self._saver.wait()
        if error is not None:
            raise error

    def close(self) -> None:
        """Frees the copy, unless something may still be written from it."""
        self._saver.close()

    def stats(self) -> dict[str, float]:
        """Metrics: ms that the loop was blocked since the last call; seconds and bytes of the newest good save (bytes
        are of all ranks on rank 0); counts of failed and skipped saves of this start.
        """
        return self._saver.stats()

    def take_events(self) -> list[dict[str, Any]]:
        """What happened since the last call, as JSON-able records for the journal: `event` (saved, failed, skipped,
        hung, damaged, dropped), `step`, `time_ms`, and what belongs to it.
        """
        return self._saver.take_events()

    def find(self, *, up_to_step: int | None = None) -> Place | None:
        """The newest complete and verified checkpoint, as rank 0 sees it, on every rank; None: there is none.

        up_to_step: newer ones are not looked at (for a rollback). Where `checkpoint.folder` was changed between two
        starts, the run's default folder is looked at too. Raises CheckpointError where the folder cannot be read:
        that is no reason to begin anew.
        """
        found: tuple[str, str | None] = ("", None)
        if self.world.is_main:
            try:
                found = (str(self._newest_verified(up_to_step) or ""), None)
            except (OSError, ValueError) as error:
                found = ("", f"{type(error).__name__}: {error}")
        name, failure = self.world.broadcast(found)
        assert isinstance(name, str)
        if failure is not None:
            raise CheckpointError(
                f"the checkpoints in {self.folder} cannot be listed ({failure}), so nobody knows whether there are "
                "any; nothing was started anew. Repair the access, or choose another name for a new run"
            )
        if not name:
            return None
        place: Place = self.folder / name.rpartition("/")[2]
        if str(place) != name:  # of the default folder
            return place_of(name)
        self._saver.trusted.add(step_of(place))
        return place

    def discard_after(self, step: int) -> None:
        """Sets aside all checkpoints of later steps, as `dropped-...`: after a rollback these steps come again."""
        self.settle()
        failure = None
        if self.world.is_main:
            try:
                for place in list_folder(self.folder):
                    if step_of(place) > step:
                        set_aside(place, "dropped")
                        self._saver.note("dropped", step_of(place))
            except OSError as error:
                failure = f"{type(error).__name__}: {error}"
        if failure := self.world.broadcast(failure):
            raise CheckpointError(f"checkpoints after step {step} could not be set aside: {failure}")
        self._saver.trusted -= {saved for saved in self._saver.trusted if saved > step}

    def load(self, checkpoint: Place, state: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Reads the checkpoint into the tensors of `state`, resharding as needed; returns the loop's state.

        Groups named `rng` are read where the checkpoint has them (the same rank of the same world size).
        """
        saved, wanted = tensor_shapes(checkpoint), flatten(state)
        optional = {name for name in wanted if name.startswith("rng.") and name not in saved}
        missing = sorted(name for name in wanted if name not in saved and name not in optional)
        if missing:
            raise CheckpointError(
                f"{checkpoint} lacks {len(missing)} tensors that this configuration trains, for example {missing[0]}; "
                "resume with the configuration that wrote it, or start a run under another name"
            )
        for name, tensor in wanted.items():
            if name in saved and tuple(saved[name].size) != tuple(tensor.shape):
                raise CheckpointError(
                    f"{checkpoint}: {name} has shape {tuple(saved[name].size)}, this configuration expects "
                    f"{tuple(tensor.shape)}; resume with the model that wrote it"
                )
        present = {name: tensor for name, tensor in wanted.items() if name not in optional}
        read_into(checkpoint, present, self.world.control)
        loop: dict[str, Any] = json.loads(store_of(checkpoint).read(checkpoint, "state.json"))
        return loop

    def _newest_verified(self, up_to_step: int | None) -> Place | None:
        folders = [self.folder] if self.folder == self._default_folder else [self._default_folder, self.folder]
        listed = sorted((place for folder in folders for place in list_folder(folder)), key=step_of)
        for place in reversed(listed):
            if up_to_step is not None and step_of(place) > up_to_step:
                continue
            problem = find_damage(place, hashes=self.config.verify)
            if problem is None:
                return place
            self._saver.damaged.add(place.name)
            self._saver.note("damaged", step_of(place), reason=problem)
            logger.warning("Checkpoint %s is not used: %s; it stays where it is", place, problem)
        return None


def rng_state(world: World) -> dict[str, Tensor]:
    """This rank's generator states, under names that only the same rank of the same world size reads."""
    name = f"rank{world.rank}_of_{world.size}"
    states = {f"cpu_{name}": torch.get_rng_state()}
    if world.device.type == "cuda":
        states[f"cuda_{name}"] = torch.cuda.get_rng_state(world.device)
    return states


def set_rng_state(states: Mapping[str, Tensor], world: World) -> None:
    name = f"rank{world.rank}_of_{world.size}"
    torch.set_rng_state(states[f"cpu_{name}"].cpu())
    if world.device.type == "cuda":
        torch.cuda.set_rng_state(states[f"cuda_{name}"].cpu(), world.device)
