"""Reading checkpoints from outside of a run: which there are, which can be trusted, and what they hold.

Enters: a run's folder, or a checkpoint's. Leaves: `COMPLETE` records, reasons for distrust, weights. A folder without
`COMPLETE` is torn: never loaded, never counted. A run knows its checkpoints by what its `run.json` says (who it is, and
where it has saved), not by its name, which may change. Nothing here needs a process group.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import Tensor

from data_pipes.store.urls import join_url
from pretrain.checkpoint.dcp import read_tensors
from pretrain.checkpoint.errors import CheckpointError
from pretrain.checkpoint.folder import Folder
from pretrain.checkpoint.open_folder import open_folder

RUN_FILE = "run.json"
"""Who a run is, in its folder."""
_BLOCK_BYTES = 1 << 22
"""Bytes per read while a file is hashed."""


def folder_of_run(run_dir: Path, folder: str | None) -> Folder:
    """Where a run saves its checkpoints.

    Args:
        run_dir: the run's folder.
        folder: `checkpoint.folder` of its configuration. The checkpoints lie below it under the run's name, so that
            runs that share a configuration file do not share checkpoints; None: they lie in the run's folder.
    """
    return open_folder(run_dir) / "checkpoints" if folder is None else open_folder(join_url(folder, run_dir.name))


def step_of(checkpoint: Folder) -> int:
    """The optimizer step that a checkpoint's folder is named after."""
    return int(checkpoint.name.removeprefix("step-"))


def list_checkpoints(run: Folder) -> list[Folder]:
    """A run's checkpoints, complete or not, oldest first.

    Args:
        run: the folder that holds the checkpoints; or the run's own folder, where its config.yaml says by
            `checkpoint.folder` if they lie elsewhere.
    Raises:
        OSError: the folder cannot be read, so nobody knows what it holds.
    """
    listed = list_folder(run)
    if listed:
        return listed
    elsewhere = _configured_folder(run)
    folders = [run / "checkpoints"] if elsewhere is None else [open_folder(join_url(elsewhere, run.name))]
    return checkpoints_of(read_identity(run), folders)


def read_identity(run: Folder) -> dict[str, Any]:
    """What a run's `run.json` says; empty where there is none.

    Raises:
        CheckpointError: it is not readable.
    """
    try:
        identity = json.loads(run.read(RUN_FILE))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError as error:
        raise CheckpointError(
            f"{run}/{RUN_FILE} is not readable ({error}); restore it or choose another name"
        ) from error
    if not isinstance(identity, dict):
        raise CheckpointError(f"{run}/{RUN_FILE} holds {type(identity).__name__}; expected the run's identity")
    return identity


def checkpoints_of(identity: Mapping[str, Any], folders: Iterable[Folder]) -> list[Folder]:
    """The checkpoints of one run, complete or not, oldest first, wherever the run has saved.

    Args:
        identity: of `read_identity`: the run's uid, that of the run that it was copied from, and where it has saved.
        folders: where to look beside that.

    Returns:
        Those that the run wrote, and those of a run that it was copied from, up to the step of the copy. Checkpoints
        that do not say whose they are belong to the run.

    Raises:
        OSError: a folder cannot be read, so nobody knows what it holds.
    """
    by_place = {place_of(folder): folder for folder in folders}
    for where in identity.get("checkpoint_folders", ()):
        by_place.setdefault(place_of(open_folder(where)), open_folder(where))
    listed = [checkpoint for folder in by_place.values() for checkpoint in list_folder(folder)]
    parent = identity.get("parent_run") or {}
    uids = {identity.get("run_uid"), *identity.get("ancestors", ())}

    def belongs(checkpoint: Folder) -> bool:
        if identity.get("run_uid") is None:
            return True
        uid = _uid_of(checkpoint)
        return uid in (None, identity["run_uid"]) or (uid in uids and step_of(checkpoint) <= parent.get("step", 0))

    return sorted((checkpoint for checkpoint in listed if belongs(checkpoint)), key=step_of)


def place_of(folder: Folder) -> str:
    """A folder's absolute path or URL, by which it is found from everywhere."""
    return str(folder) if folder.local_path is None else str(folder.local_path.resolve())


def is_torn(checkpoint: Folder) -> bool:
    """Whether a checkpoint was never completed: it has no `COMPLETE`.

    Raises:
        OSError: the folder cannot be read.
    """
    return "COMPLETE" not in checkpoint.files()


def _uid_of(checkpoint: Folder) -> str | None:
    """The run that wrote a checkpoint; None: it does not say."""
    try:
        uid = read_complete(checkpoint).get("run_uid")
    except CheckpointError:
        return None
    return None if uid is None else str(uid)


def list_folder(folder: Folder) -> list[Folder]:
    """The checkpoints that lie directly in a folder, complete or not, oldest first.

    Raises:
        OSError: the folder cannot be read.
    """
    found = [inside for inside in folder.subfolders() if inside.name.startswith("step-")]
    return sorted((inside for inside in found if inside.name.removeprefix("step-").isdigit()), key=step_of)


def read_complete(checkpoint: Folder) -> dict[str, Any]:
    """What `COMPLETE` says.

    Raises:
        CheckpointError: it is missing or unreadable: the checkpoint is torn.
    """
    try:
        complete = json.loads(checkpoint.read("COMPLETE"))
        if not isinstance(complete, dict) or complete.get("format") != 1 or not isinstance(complete.get("files"), dict):
            raise CheckpointError(f"{checkpoint}/COMPLETE has another format than 1; it was written by another version")
        return complete
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{checkpoint} is no complete checkpoint: it has no COMPLETE file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{checkpoint}/COMPLETE is not readable: {error}") from error


def find_damage(checkpoint: Folder, *, hashes: bool = True) -> str | None:
    """Why a checkpoint cannot be trusted, or None. `COMPLETE` is looked at first, then the size of every file.

    Args:
        checkpoint: the checkpoint's folder.
        hashes: whether to read every file and to compare its sha256 too.

    Raises:
        OSError: it cannot be read, which says nothing of what it holds.
    """
    try:
        complete = read_complete(checkpoint)
        sizes = checkpoint.files()
        for name, (size, digest) in complete["files"].items():
            if name not in sizes:
                return f"{name} is missing"
            if sizes[name] != size:
                return f"{name} has {sizes[name]} bytes, COMPLETE says {size}"
            if hashes and sha256_of(checkpoint, name) != digest:
                return f"{name} has another sha256 than COMPLETE says"
    except CheckpointError as error:
        return str(error)
    except (FileNotFoundError, NotADirectoryError) as error:  # between listing and reading
        return f"{error.filename or error} is missing"
    return None


def newest_complete(run: Folder) -> Folder | None:
    """The newest checkpoint of a run (see `list_checkpoints`) whose files are all there with the right sizes.

    Raises:
        CheckpointError: the run has complete checkpoints, and all of them are damaged.
        OSError: one cannot be read, so nobody knows whether it is the newest.
    """
    damaged = []
    for checkpoint in reversed(list_checkpoints(run)):
        damage = find_damage(checkpoint, hashes=False)
        if damage is None:
            return checkpoint
        if not is_torn(checkpoint):
            damaged.append(f"{checkpoint}: {damage}")
    if damaged:
        listed = "\n  ".join(damaged)
        raise CheckpointError(f"{run} has checkpoints, and none of them can be used:\n  {listed}\nRestore one of them")
    return None


def checkpoint_of(folder: Folder) -> Folder | None:
    """The checkpoint that a folder is, or the newest complete one of the run that it is; None: it is neither."""
    return folder if "COMPLETE" in folder.files() else newest_complete(folder)


def load_weights(checkpoint: Folder, player: str, *, ema: bool = False) -> dict[str, Tensor]:
    """A player's full fp32 weights on the CPU, under canonical names; only these tensors are read.

    Args:
        checkpoint: the checkpoint's folder.
        player: the player's name in the objective.
        ema: the moving average of the weights instead.
    Raises:
        CheckpointError: the checkpoint holds no such weights, or is no checkpoint.
    """
    prefix = f"{'ema' if ema else 'model'}.{player}."
    weights = read_tensors(checkpoint, prefix)
    if not weights:
        kind = "moving average" if ema else "weights"
        raise CheckpointError(f"{checkpoint} holds no {kind} of player {player!r}")
    return weights


def sha256_of(folder: Folder, name: str) -> str:
    """The sha256 of a file, in hex."""
    digest = hashlib.sha256()
    with folder.open(name) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _configured_folder(run: Folder) -> str | None:
    """`checkpoint.folder` of a run's resolved configuration, where it has one."""
    if "config.yaml" not in run.files():
        return None
    folder = OmegaConf.select(OmegaConf.load(io.StringIO(run.read("config.yaml").decode())), "checkpoint.folder")
    return None if folder is None else str(folder)
