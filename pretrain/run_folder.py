"""A run's folder: who the run is (`run.json`), what it was told (`config.yaml`), and whether a start may continue it.

Enters: the resolved configuration and the command line. Leaves: the run's identity, the same after every restart.
"""

from __future__ import annotations

import difflib
import json
import shlex
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from data_pipes.store.files import write_atomically
from pretrain.checkpoint.folder import Folder
from pretrain.checkpoint.open_folder import open_folder
from pretrain.checkpoint.read import (
    RUN_FILE,
    checkpoints_of,
    folder_of_run,
    is_torn,
    list_folder,
    place_of,
    read_complete,
    read_identity,
    step_of,
)
from pretrain.config import ConfigError, RunConfig, read_saved_config
from pretrain.parallel.world import World
from pretrain.tracking.environment import environment, redact_argument
from pretrain.tracking.journal import now_ms

RUN_FORMAT = 1
"""Of `run.json` and of the run's folder; it counts up when an older version could not read them."""


def enter_run_folder(config: RunConfig, *, config_path: Path, overrides: Sequence[str], world: World) -> dict[str, Any]:
    """`open_run_folder` on the main rank, and what it gave on all of them. A collective.

    Raises:
        ValueError: what the main rank raised, on every rank; likewise OSError, of a disk that refuses.
    """
    identity: dict[str, Any] | None = None
    refusal: ValueError | OSError | None = None
    if world.is_main:
        try:
            identity = open_run_folder(config, config_path=config_path, overrides=overrides, world_size=world.size)
        except (ValueError, OSError) as error:  # the others would wait for ever
            refusal = error
    identity, refusal = world.broadcast((identity, refusal))
    if refusal is not None:
        raise refusal
    assert identity is not None
    return identity


def open_run_folder(
    config: RunConfig, *, config_path: Path, overrides: Sequence[str], world_size: int
) -> dict[str, Any]:
    """Makes the run's folder, or checks that the one there may be continued. Main rank only.

    A folder that was moved or renamed is the same run. One that was copied, while the original is still there, becomes
    a run of its own, which begins where the original was then.

    Args:
        config: resolved.
        config_path: the YAML file that was given.
        overrides: the `key=value` arguments that were given.
        world_size: number of processes over all nodes.

    Returns:
        The run's identity, the content of its `run.json`, and what people should know of it, as `notices`.

    Raises:
        ConfigError: the folder holds checkpoints of another run, objective or seed, or `checkpoint.resume` is never and
            there are checkpoints.
        CheckpointError: `run.json` is not readable.
    """
    run_dir = config.run_dir
    known, notices = _recognise(read_identity(open_folder(run_dir)), run_dir)
    # where they go now, and where they went before: checkpoint.folder may have changed since
    folders = [folder_of_run(run_dir, None), folder_of_run(run_dir, config.checkpoint.folder)]
    found = checkpoints_of(known, folders)
    if found:
        _check_may_continue(config, found)
    if not known and (known := _identity_of(found)):
        notices = [f"the folder {run_dir} is new here: it goes on with the run whose newest checkpoint is {found[-1]}"]
    if config.checkpoint.folder is not None:
        _check_whose(known, folders[-1])
    command = launch_command(config_path, overrides, world_size)
    arguments = [redact_argument(argument) for argument in sys.argv]
    start = {"time_ms": now_ms(), "command": arguments, "world_size": world_size}
    places = [*known.get("checkpoint_folders", []), place_of(folders[-1])]
    identity = {
        "format": RUN_FORMAT,
        "run_uid": known.get("run_uid") or uuid.uuid4().hex,
        "name": config.name,
        "folder": str(run_dir.resolve()),
        "checkpoint_folders": list(dict.fromkeys(places)),
        "parent_run": known.get("parent_run"),
        "ancestors": known.get("ancestors", []),
        "created_ms": known.get("created_ms") or now_ms(),
        "starts": [*known.get("starts", []), start],
        "command": arguments,
        "config_path": str(config_path),
        "resume_command": command,
        "reproduce_command": launch_command(run_dir / "config.yaml", ["name=NEW_NAME"], world_size),
        "world_size": world_size,
        "environment": environment(),
    }
    run_dir.mkdir(parents=True, exist_ok=True)
    if not known.get("run_uid"):
        for state in run_dir.glob("mlflow*.json"):  # of the run that the folder was copied from
            state.unlink()
    write_atomically(run_dir / RUN_FILE, (json.dumps(identity, indent=1) + "\n").encode())
    write_atomically(run_dir / "config.yaml", config.to_yaml().encode())
    return {**identity, "notices": notices}


def forked(identity: Mapping[str, Any], step: int) -> dict[str, Any]:
    """The identity of a run that goes its own way from a step of another one; it has no uid yet.

    Args:
        identity: of the other run, the content of its `run.json`.
        step: of the checkpoint where it begins.
    """
    return {
        "parent_run": {name: identity.get(name) for name in ("run_uid", "name", "folder")} | {"step": step},
        "ancestors": [*identity.get("ancestors", []), identity.get("run_uid")],
        "checkpoint_folders": identity.get("checkpoint_folders", []),
    }


def _recognise(known: dict[str, Any], run_dir: Path) -> tuple[dict[str, Any], list[str]]:
    """Who a folder with a `run.json` is now, and what people should know of that."""
    here, before = run_dir.resolve(), known.get("folder")
    if before is None or str(here) == before or _is_same_folder(here, Path(before)):
        return known, []
    if read_identity(open_folder(before)).get("run_uid") != known.get("run_uid"):
        return known, [f"this run was {before} and goes on as {here}"]
    saved = checkpoints_of(known, [folder_of_run(here, None)])
    step = max((step_of(checkpoint) for checkpoint in saved if not is_torn(checkpoint)), default=0)
    notice = f"{here} is a copy of {before}: it becomes a run of its own, which begins at step {step}"
    return forked(known, step), [notice]


def _is_same_folder(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)


def _identity_of(checkpoints: Sequence[Folder]) -> dict[str, Any]:
    """Who a run is whose folder is new here, as its checkpoints elsewhere say: it comes from another machine."""
    complete = [checkpoint for checkpoint in checkpoints if not is_torn(checkpoint)]
    return {"run_uid": read_complete(complete[-1]).get("run_uid")} if complete else {}


def _check_whose(known: Mapping[str, Any], folder: Folder) -> None:
    """Refuses to save among another run's checkpoints.

    Raises:
        ConfigError: another run has checkpoints in the folder.
    """
    own = checkpoints_of(known, [folder])
    others = [checkpoint for checkpoint in list_folder(folder) if checkpoint not in own]
    if others:
        raise ConfigError(
            f"{others[-1]} belongs to another run ({read_complete(others[-1]).get('run_uid')}), and two runs cannot "
            "save to one folder. Choose another name, or another checkpoint.folder"
        )


def launch_command(config_path: Path, overrides: Sequence[str], world_size: int) -> str:
    """The shell line that starts this configuration on as many processes."""
    arguments = shlex.join([str(config_path), *(redact_argument(override) for override in overrides)])
    if world_size == 1:
        return f"tessera train {arguments}"
    return f"torchrun --nproc-per-node {world_size} -m pretrain {arguments}"


def _check_may_continue(config: RunConfig, checkpoints: Sequence[Folder]) -> None:
    if config.checkpoint.resume == "never":
        raise ConfigError(
            f"{config.run_dir} already holds checkpoints and checkpoint.resume is never; choose another name, or set "
            "checkpoint.resume=auto to continue it"
        )
    saved_path = config.run_dir / "config.yaml"
    if saved_path.is_file():
        text = saved_path.read_text()
    else:  # another machine than before: what was saved with the newest checkpoint that is not torn
        complete = [checkpoint for checkpoint in checkpoints if "config.yaml" in checkpoint.files()]
        if not complete or complete[-1].parent == folder_of_run(config.run_dir, None):
            raise ConfigError(
                f"{config.run_dir} holds checkpoints but no config.yaml; restore it or choose another name"
            )
        text = complete[-1].read("config.yaml").decode()
    # Both complete: a key that the file's version did not have yet has its default.
    saved, wanted = read_saved_config(text, saved_path).as_dict(), config.as_dict()
    for key in ("objective", "seed"):
        if saved.get(key) != wanted[key]:
            before = OmegaConf.to_yaml(OmegaConf.create({key: saved.get(key)})).splitlines()
            after = OmegaConf.to_yaml(OmegaConf.create({key: wanted[key]})).splitlines()
            change = "\n".join(difflib.unified_diff(before, after, str(saved_path), "this start", lineterm="", n=0))
            raise ConfigError(
                f"{config.run_dir} holds checkpoints of another {key}; a run keeps its objective and seed. Choose "
                f"another name, or undo this change:\n{change}"
            )
