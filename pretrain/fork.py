"""A run of its own that begins at a checkpoint of another one: `tessera fork`.

Enters: a run's folder and a step. Leaves: a new folder with the run's configuration, its checkpoint of that step and an
identity that names the parent. Copying a run's folder by hand leads to the same at the copy's first start.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from data_pipes.store.files import write_atomically
from pretrain.checkpoint.errors import CheckpointError
from pretrain.checkpoint.folder import Folder
from pretrain.checkpoint.open_folder import LocalFolder, open_folder
from pretrain.checkpoint.read import RUN_FILE, find_damage, is_torn, list_checkpoints, read_identity, step_of
from pretrain.config import load_run_config
from pretrain.run_folder import RUN_FORMAT, forked
from pretrain.tracking.journal import now_ms


def fork_run(run: Path, new: Path, at: int | None = None) -> dict[str, Any]:
    """Makes the folder of a new run, which `tessera train NEW/config.yaml` continues.

    Args:
        run: the folder of the run to begin from.
        new: the new run's folder; its name becomes the run's.
        at: step of the checkpoint; None: the newest complete one.

    Returns:
        The new run's folder, the step, and its configuration file.

    Raises:
        ValueError: there is no such run or checkpoint, or the new folder exists.
    """
    source = open_folder(run)
    identity = read_identity(source)
    if not identity:
        raise ValueError(f"{run} is no run: it has no {RUN_FILE}; give the folder of a run, <output_dir>/<name>")
    if new.exists():
        raise ValueError(f"{new} exists; a new run needs a folder of its own")
    checkpoint = _checkpoint_at(source, at)
    config = dataclasses.replace(load_run_config(source), name=new.resolve().name, output_dir=str(new.parent))
    draft = new.with_name(f".{new.name}.fork")
    shutil.rmtree(draft, ignore_errors=True)
    _copy(checkpoint, draft / "checkpoints" / checkpoint.name)
    write_atomically(draft / "config.yaml", config.to_yaml().encode())
    step = step_of(checkpoint)
    made = {"format": RUN_FORMAT, "name": config.name, "folder": str(new.resolve()), "created_ms": now_ms()}
    made |= {**forked(identity, step), "checkpoint_folders": []}
    write_atomically(draft / RUN_FILE, (json.dumps(made, indent=1) + "\n").encode())
    draft.rename(new)
    return {"run": str(new), "step": step, "config": str(new / "config.yaml"), "parent_run": made["parent_run"]}


def _checkpoint_at(run: Folder, at: int | None) -> Folder:
    complete = [checkpoint for checkpoint in list_checkpoints(run) if not is_torn(checkpoint)]
    chosen = [checkpoint for checkpoint in complete if at is None or step_of(checkpoint) == at]
    if not chosen:
        steps = ", ".join(str(step_of(checkpoint)) for checkpoint in complete) or "none"
        wanted = "complete checkpoint" if at is None else f"complete checkpoint of step {at}"
        raise CheckpointError(f"{run} has no {wanted}; it has those of steps: {steps}")
    damage = find_damage(chosen[-1])
    if damage is not None:
        raise CheckpointError(f"{chosen[-1]} is damaged ({damage}); choose another step by --at")
    return chosen[-1]


def _copy(checkpoint: Folder, target: Path) -> None:
    """Copies a checkpoint's files to this machine, `COMPLETE` last."""
    target.mkdir(parents=True)
    for name in sorted(checkpoint.files(), key=lambda name: name == "COMPLETE"):
        with checkpoint.open(name) as source, LocalFolder(target).create(name) as copy:
            shutil.copyfileobj(source, copy)
