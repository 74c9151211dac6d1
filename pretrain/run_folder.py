"""A run's folder: who the run is (`run.json`), what it was told (`config.yaml`), and whether a start may continue it.

Enters: the resolved configuration and the command line. Leaves: the run's identity, the same after every restart.
"""

from __future__ import annotations

import difflib
import json
import shlex
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from data_pipes.store.files import write_atomically
from pretrain.checkpoint.errors import CheckpointError
from pretrain.checkpoint.folder import Folder
from pretrain.checkpoint.open_folder import open_folder
from pretrain.checkpoint.read import folder_of_run, list_checkpoints, list_folder
from pretrain.config import ConfigError, RunConfig
from pretrain.parallel.world import World
from pretrain.tracking.environment import environment, redact_argument
from pretrain.tracking.journal import now_ms


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

    Args:
        config: resolved.
        config_path: the YAML file that was given.
        overrides: the `key=value` arguments that were given.
        world_size: number of processes over all nodes.

    Returns:
        The run's identity, the content of its `run.json`.

    Raises:
        ConfigError: the folder holds checkpoints of another objective or seed, or `checkpoint.resume` is never and
            there are checkpoints.
        CheckpointError: `run.json` is not readable.
    """
    run_dir = config.run_dir
    run_file = run_dir / "run.json"
    # where they go now, and where they went before: checkpoint.folder may have changed since
    found = [*list_checkpoints(open_folder(run_dir)), *list_folder(folder_of_run(run_dir, config.checkpoint.folder))]
    if found:
        _check_may_continue(config, found)
    identity: dict[str, Any] = {}
    if run_file.is_file():
        try:
            identity = json.loads(run_file.read_text())
        except ValueError as error:
            raise CheckpointError(f"{run_file} is not readable ({error}); restore it or choose another name") from error
    command = launch_command(config_path, overrides, world_size)
    arguments = [redact_argument(argument) for argument in sys.argv]
    start = {"time_ms": now_ms(), "command": arguments, "world_size": world_size}
    identity = {
        "run_uid": identity.get("run_uid") or uuid.uuid4().hex,
        "name": config.name,
        "created_ms": identity.get("created_ms") or now_ms(),
        "starts": [*identity.get("starts", []), start],
        "command": arguments,
        "config_path": str(config_path),
        "resume_command": command,
        "reproduce_command": launch_command(run_dir / "config.yaml", ["name=NEW_NAME"], world_size),
        "world_size": world_size,
        "environment": environment(),
    }
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(run_file, (json.dumps(identity, indent=1) + "\n").encode())
    write_atomically(run_dir / "config.yaml", config.to_yaml().encode())
    return identity


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
    saved = OmegaConf.to_container(OmegaConf.create(text))
    assert isinstance(saved, dict)
    wanted = config.as_dict()
    for key in ("objective", "seed"):
        if saved.get(key) != wanted[key]:
            before = OmegaConf.to_yaml(OmegaConf.create({key: saved.get(key)})).splitlines()
            after = OmegaConf.to_yaml(OmegaConf.create({key: wanted[key]})).splitlines()
            change = "\n".join(difflib.unified_diff(before, after, str(saved_path), "this start", lineterm="", n=0))
            raise ConfigError(
                f"{config.run_dir} holds checkpoints of another {key}; a run keeps its objective and seed. Choose "
                f"another name, or undo this change:\n{change}"
            )
