"""What lies where a user points: a weights file, a checkpoint, or a run with checkpoints.

Enters: a path or URL as it was given. Leaves: the file, or the checkpoint's and the run's folders. It exists so that
every command takes all of them alike.
"""

from __future__ import annotations

from pathlib import Path

from data_pipes.store.urls import is_remote, local_path
from pretrain.checkpoint.folder import Folder
from pretrain.checkpoint.read import checkpoint_of, find_damage, newest_complete, read_complete
from pretrain.weights.files import EXPORT_WEIGHTS, WeightsError

EXPORT_CONFIG = "config.json"
"""The file of an exported folder that describes the model."""


def named_file(where: str | Path) -> Path | None:
    """The file of this machine that a path or URL names; None: it names a folder, or nothing.

    Raises:
        ValueError: a `file:` URL of another machine.
    """
    if is_remote(str(where)):
        return None
    path = local_path(str(where))
    return path if path.is_file() else None


def find_checkpoint(folder: Folder) -> Folder:
    """The checkpoint that a folder is, or the newest complete one of the run that it is.

    Args:
        folder: a checkpoint's folder, a run's, or the one that holds a run's checkpoints.
    Raises:
        ValueError: it is none of these, a torn checkpoint, or a run without a complete one.
    """
    files, inside = folder.files(), [subfolder.name for subfolder in folder.subfolders()]
    if "run.json" in files or any(name == "checkpoints" or name.startswith("step-") for name in inside):
        newest = newest_complete(folder)
        if newest is None:
            raise ValueError(
                f"{folder} has no complete checkpoint yet: wait for the run's first save, or resume the run"
            )
        return newest
    if "COMPLETE" in files or (folder.name.startswith("step-") and folder.exists()):
        read_complete(folder)  # raises for a torn one
        return folder
    raise ValueError(
        f"{folder} is no model: expected a run folder (with checkpoints/), a checkpoint folder (step-...), "
        f"an export folder ({EXPORT_CONFIG} and {EXPORT_WEIGHTS}) or a weights file"
    )


def checkpoint_in(folder: Folder) -> Folder:
    """The checkpoint that a folder is, or the newest complete one of the run that it is; for starting weights.

    Raises:
        WeightsError: it is neither, or the checkpoint is damaged.
    """
    checkpoint = checkpoint_of(folder)
    if checkpoint is None:
        raise WeightsError(
            f"{folder} holds neither a complete checkpoint nor {EXPORT_WEIGHTS}: give a checkpoint (step-...), a run "
            "with a complete checkpoint, an export folder or a weights file"
        )
    damage = find_damage(checkpoint, hashes=False)
    if damage is not None:
        raise WeightsError(f"{checkpoint} is damaged ({damage}): use another checkpoint of the run")
    return checkpoint


def run_dir_of(checkpoint: Folder, named: Folder) -> Path | None:
    """The folder on this machine of the run that a checkpoint is of; None: it is not known.

    Args:
        checkpoint: what `find_checkpoint` found.
        named: where the user pointed.
    """
    holder = checkpoint.parent
    if named not in (checkpoint, holder, holder.parent):
        return named.local_path  # a run whose checkpoints lie elsewhere
    is_run = holder.name == "checkpoints" and "run.json" in holder.parent.files()
    return holder.parent.local_path if is_run else None
