"""Reading checkpoints from outside of a run: which there are, which can be trusted, and what they hold.

Enters: a run's folder, a checkpoint's folder, or a URL of either. Leaves: `COMPLETE` records, reasons for distrust,
weights. A folder without `COMPLETE` is torn: never loaded, never counted. Nothing here needs a process group.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from torch import Tensor

from data_pipes.store.urls import join_url
from pretrain.checkpoint.dcp import read_tensors
from pretrain.checkpoint.errors import CheckpointError
from pretrain.checkpoint.store import Place, RemoteFolder, place_of, store_of

if TYPE_CHECKING:
    pass

_BLOCK_BYTES = 1 << 22


def folder_of_run(run_dir: Path, folder: str | None) -> Place:
    """Where a run's checkpoints lie: in the run's folder, or below `checkpoint.folder` under the run's name, so that
    runs that share a configuration file do not share checkpoints.
    """
    return run_dir / "checkpoints" if folder is None else place_of(join_url(folder, run_dir.name))


def step_of(checkpoint: Place) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def list_checkpoints(run: Place | str) -> list[Place]:
    """A run's checkpoint folders, complete or not, oldest first.

    run: the run's folder; what its config.yaml names as `checkpoint.folder` is looked at. Or the URL of the folder
    that holds the checkpoints.
    """
    place = place_of(run)
    return list_folder(place if isinstance(place, RemoteFolder) else folder_of_run(place, _configured_folder(place)))


def list_folder(folder: Place) -> list[Place]:
    """The checkpoint folders in a folder, complete or not, oldest first. Raises OSError when it cannot be read."""
    names = [name for name in store_of(folder).subfolders(folder) if name.startswith("step-")]
    return sorted((folder / name for name in names if name.removeprefix("step-").isdigit()), key=step_of)


def read_complete(checkpoint: Place | str) -> dict[str, Any]:
    """What `COMPLETE` says. Raises CheckpointError where it is missing or unreadable: the checkpoint is torn."""
    place = place_of(checkpoint)
    try:
        complete = json.loads(store_of(place).read(place, "COMPLETE"))
        if not isinstance(complete, dict) or complete.get("format") != 1 or not isinstance(complete.get("files"), dict):
            raise CheckpointError(f"{place}/COMPLETE has another format than 1; it was written by another version")
        return complete
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{place} is no complete checkpoint: it has no COMPLETE file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{place}/COMPLETE is not readable: {error}") from error


def find_damage(checkpoint: Place | str, *, hashes: bool = True) -> str | None:
    """Why a checkpoint cannot be trusted, or None: COMPLETE, then every file's size, then (if asked) its sha256."""
    place = place_of(checkpoint)
    try:
        complete = read_complete(place)
        sizes = store_of(place).files(place)
        for name, (size, digest) in complete["files"].items():
            if name not in sizes:
                return f"{name} is missing"
            if sizes[name] != size:
                return f"{name} has {sizes[name]} bytes, COMPLETE says {size}"
            if hashes and sha256_of(place, name) != digest:
                return f"{name} has another sha256 than COMPLETE says"
    except (CheckpointError, OSError) as error:  # a disk that cannot be read is as bad as one that lies
        return str(error)
    return None


def newest_complete(run: Place | str) -> Place | None:
    """The newest checkpoint of a run (see `list_checkpoints`) whose files are all there with the right sizes."""
    for place in reversed(list_checkpoints(run)):
        if find_damage(place, hashes=False) is None:
            return place
    return None


def checkpoint_of(place: Place) -> Place | None:
    """The checkpoint that a place is, or the newest complete one of the run that it is; None: it is neither."""
    if isinstance(place, Path) and not place.is_dir():
        return None
    return place if "COMPLETE" in store_of(place).files(place) else newest_complete(place)


def load_weights(checkpoint: Place | str, player: str, *, ema: bool = False) -> dict[str, Tensor]:
    """A player's full fp32 weights on the CPU, under canonical names; needs no process group. From an object store only
    these tensors are fetched.
    """
    prefix = f"{'ema' if ema else 'model'}.{player}."
    weights = read_tensors(place_of(checkpoint), prefix)
    if not weights:
        kind = "moving average" if ema else "weights"
        raise CheckpointError(f"{checkpoint} holds no {kind} of player {player!r}")
    return weights


def sha256_of(place: Place, name: str) -> str:
    digest = hashlib.sha256()
    with store_of(place).open(place, name) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _configured_folder(run_dir: Path) -> str | None:
    """`checkpoint.folder` of a run's resolved configuration."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        return None
    folder = OmegaConf.select(OmegaConf.load(path), "checkpoint.folder")
    return None if folder is None else str(folder)
