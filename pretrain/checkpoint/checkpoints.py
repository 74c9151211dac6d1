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
| all are damaged, or they are gone | the run does not start, until `checkpoint.restart` says that it may begin anew |
| one cannot be read (EIO) | the run does not start: that says nothing of what it holds |
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint.config import CheckpointConfig
from pretrain.checkpoint.dcp import read_into, tensor_shapes
from pretrain.checkpoint.errors import CheckpointError
from pretrain.checkpoint.folder import Folder
from pretrain.checkpoint.open_folder import open_folder
from pretrain.checkpoint.read import (
    checkpoints_of,
    find_damage,
    folder_of_run,
    is_torn,
    list_folder,
    place_of,
    read_identity,
    step_of,
)
from pretrain.checkpoint.retention import set_aside
from pretrain.checkpoint.staging import flatten
from pretrain.parallel.world import World
from pretrain.tracking.journal import JOURNAL_NAME, read_journal

logger = logging.getLogger(__name__)


class Checkpoints:
    """A run's checkpoints as one start sees them: which to go on from, and what was learnt about them.

    Every rank makes one. `find`, `load` and `discard_after` are collectives of the main threads, called in the same
    order on all of them. `Saver` adds checkpoints.
    """

    def __init__(self, run_dir: Path, config: CheckpointConfig, world: World) -> None:
        self.run = open_folder(run_dir)
        """The run's own folder."""
        self.folder = folder_of_run(run_dir, config.folder)
        """Where this start saves."""
        self.config = config
        """When and where to save, what to keep."""
        self.world = world
        """This process among its peers."""
        self.trusted: set[int] = set()
        """Steps that this start saved or resumed from; a folder of another step that is in the way is set aside."""
        self.damaged: set[str] = set()
        """Names of folders that do not count as kept, on rank 0."""
        self._folders = [folder_of_run(run_dir, None), self.folder]
        """Where checkpoints may lie, beside what `run.json` says: `checkpoint.folder` may have changed."""
        self._events: list[dict[str, Any]] = []

    def find(self, *, up_to_step: int | None = None) -> Folder | None:
        """The newest complete and verified checkpoint, as rank 0 sees it, on every rank; None: there never was one.

        The run finds its checkpoints by what its `run.json` says, also where its name or `checkpoint.folder` has
        changed since.

        Args:
            up_to_step: newer ones are not looked at (for a rollback).
        Raises:
            CheckpointError: there were checkpoints and none can be used, or a folder cannot be read, which is no
                reason to begin anew.
        """
        name, failure = "", None
        if self.world.is_main:
            try:
                name = str(self._newest_verified(up_to_step) or "")
            except CheckpointError as error:
                failure = str(error)
            except (OSError, ValueError) as error:
                failure = (
                    f"the checkpoints in {self.folder} cannot be listed or read ({type(error).__name__}: {error}), so "
                    "nobody knows whether there are any; nothing was started anew. Repair the access, or choose "
                    "another name for a new run"
                )
        name, failure = self.world.broadcast((name, failure))
        if failure is not None:
            raise CheckpointError(failure)
        if not name:
            return None
        checkpoint = open_folder(name)
        if place_of(checkpoint.parent) == place_of(self.folder):
            self.trusted.add(step_of(checkpoint))
        return checkpoint

    def load(self, checkpoint: Folder, state: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Reads a checkpoint into the tensors of `state`, resharding as needed.

        Args:
            checkpoint: from `find`.
            state: {group: {name: tensor}}, to be filled. Groups named `rng` are read where the checkpoint has them (the
                same rank of the same world size).
        Returns:
            The loop's state.
        Raises:
            CheckpointError: a tensor is missing or has another shape; nothing was read then.
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
        loop: dict[str, Any] = json.loads(checkpoint.read("state.json"))
        return loop

    def discard_after(self, step: int) -> None:
        """Sets aside all checkpoints of later steps, as `dropped-...`: after a rollback these steps come again.

        No save may be running: call `Saver.settle` first.

        Args:
            step: the newest step that stays.
        Raises:
            CheckpointError: they could not be renamed.
        """
        failure = None
        if self.world.is_main:
            try:
                for checkpoint in list_folder(self.folder):
                    if step_of(checkpoint) > step:
                        set_aside(checkpoint, "dropped")
                        self.note("dropped", step_of(checkpoint))
            except OSError as error:
                failure = f"{type(error).__name__}: {error}"
        if failure := self.world.broadcast(failure):
            raise CheckpointError(f"checkpoints after step {step} could not be set aside: {failure}")
        self.trusted -= {saved for saved in self.trusted if saved > step}

    def note(self, event: str, step: int, **more: Any) -> None:
        """Adds an event for `take_events`.

        Args:
            event: saved, failed, skipped, hung, damaged or dropped.
            step: of the checkpoint.
            more: JSON-able fields that belong to the event.
        """
        self._events.append({"event": event, "step": step, "time_ms": int(time.time() * 1000), **more})

    def take_events(self) -> list[dict[str, Any]]:
        """What happened to checkpoints since the last call, as JSON-able records for the journal: `event` (see `note`),
        `step`, `time_ms`, and the fields that belong to the event.
        """
        events, self._events = self._events, []
        return events

    def _newest_verified(self, up_to_step: int | None) -> Folder | None:
        listed = checkpoints_of(read_identity(self.run), self._folders)
        unusable = []
        for checkpoint in reversed(listed):
            if up_to_step is not None and step_of(checkpoint) > up_to_step:
                continue
            problem = find_damage(checkpoint, hashes=self.config.verify)
            if problem is None:
                return checkpoint
            self.damaged.add(checkpoint.name)
            self.note("damaged", step_of(checkpoint), reason=problem)
            logger.warning("Checkpoint %s is not used: %s; it stays where it is", checkpoint, problem)
            if not is_torn(checkpoint):
                unusable.append(f"{checkpoint}: {problem}")
        if up_to_step is None:
            self._begin_anew(listed, unusable)
        return None

    def _begin_anew(self, listed: list[Folder], unusable: list[str]) -> None:
        """Lets a run begin at step 0 that never had a checkpoint, or that `checkpoint.restart` allows it.

        Raises:
            CheckpointError: it had one.
        """
        saved = last_saved_step(self.run)
        if not unusable and saved is None:
            return
        if not unusable:
            unusable = [f"the journal says that step {saved} was saved, and no checkpoint is there"]
        if not self.config.restart:
            reasons = "\n  ".join(unusable)
            raise CheckpointError(
                f"{self.run} had checkpoints and none can be used, so nothing was started anew:\n  {reasons}\n"
                f"Looked at: {', '.join(place_of(folder) for folder in self._folders)}, and what run.json names. "
                "Restore one of them, choose another name for a new run, or begin this one at step 0 on purpose: "
                "checkpoint.restart=true"
            )
        for checkpoint in listed:
            set_aside(checkpoint, "dropped")
            self.note("dropped", step_of(checkpoint), reason="checkpoint.restart")


def last_saved_step(run: Folder) -> int | None:
    """The step of the newest checkpoint that a run's journal says was saved; None: none was, or there is no journal."""
    path = run.local_path
    if path is None or not (path / JOURNAL_NAME).is_file():
        return None
    saved = None
    for record in read_journal(path):
        if record["type"] == "event" and record.get("name") == "checkpoint_saved":
            saved = int(record["step"])
        elif record["type"] == "event" and record.get("reason") == "checkpoint.restart":
            saved = None
    return saved


def rng_state(world: World) -> dict[str, Tensor]:
    """This rank's generator states, under names that only the same rank of the same world size reads."""
    name = f"rank{world.rank}_of_{world.size}"
    states = {f"cpu_{name}": torch.get_rng_state()}
    if world.device.type == "cuda":
        states[f"cuda_{name}"] = torch.cuda.get_rng_state(world.device)
    return states


def set_rng_state(states: Mapping[str, Tensor], world: World) -> None:
    """Puts this rank's generators into the states that `rng_state` gave."""
    name = f"rank{world.rank}_of_{world.size}"
    torch.set_rng_state(states[f"cpu_{name}"].cpu())
    if world.device.type == "cuda":
        torch.cuda.set_rng_state(states[f"cuda_{name}"].cpu(), world.device)
