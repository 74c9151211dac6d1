"""Several runs one after the other, each starting from what the one before it ended with: the phases of a recipe.

Enters: the phases of a YAML file (pretrain/phases.py). Leaves: one run per phase, with its own folder, checkpoints and
journal, and one summary. Started again, it passes over the phases that are done and resumes inside the one that was
not.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from pretrain.checkpoint.open_folder import open_folder
from pretrain.checkpoint.read import newest_complete
from pretrain.config import RunConfig
from pretrain.memory.dry_run import dry_run
from pretrain.parallel.launch import Launch
from pretrain.parallel.world import World, join_world, leave_world
from pretrain.phases import Phase
from pretrain.preflight import check, total_samples
from pretrain.run_state import RunState
from pretrain.train import train


def run_pipeline(phases: Sequence[Phase], world: World | None = None) -> dict[str, Any]:
    """Runs all phases on this process, or on those that torchrun started, until the end or a stop signal.

    Everything that can be wrong with any phase is looked at before the first begins.

    Args:
        phases: of `load_pipeline`.
        world: from `join_world`, where the processes have joined already and stay joined; None: they join here.
    Returns:
        The last phase's summary, with the summaries of all phases under `phases`.
    Raises:
        ValueError: a mistake of the user's (ConfigError, ShardError, CheckpointError).
    """
    launch = Launch.from_environment()
    finished = []
    for phase in phases:
        _, data = check(without_start(phase.config), launch)
        finished.append(is_finished(phase.config, data.num_samples))
    finished[-1] = False  # so that there is a summary to return
    first = phases[0].config
    joined = world or join_world(first.device, first.parallel.timeout_s)
    summaries: list[dict[str, Any]] = []
    for phase, is_done in zip(phases, finished, strict=True):
        if is_done:
            summaries.append({"run": str(phase.config.run_dir), "status": "finished", "steps_this_start": 0})
            continue
        summary = train(phase.config, config_path=phase.path, overrides=phase.overrides, world=joined)
        summaries.append(summary)
        if summary["status"] != "finished":
            break
    if world is None:
        leave_world()
    return summaries[-1] | {"phases": summaries}


def dry_run_pipeline(phases: Sequence[Phase], processes: int, ranks_per_node: int | None) -> list[dict[str, Any]]:
    """Checks each phase and estimates its memory.

    Args:
        phases: of `load_pipeline`.
        processes: ranks in all.
        ranks_per_node: ranks of a node; None: all of them.
    Returns:
        The result of `dry_run` for each phase.
    """
    return [dry_run(without_start(phase.config), processes, ranks_per_node) for phase in phases]


def without_start(config: RunConfig) -> RunConfig:
    """The same without `objective.init_from`: what an earlier phase has yet to write cannot be looked at."""
    if config.init_from is None:
        return config
    return dataclasses.replace(config, objective=dataclasses.replace(config.objective, init_from=None))


def is_finished(config: RunConfig, num_samples: int) -> bool:
    """Whether a run's newest complete checkpoint is that of its last step."""
    checkpoint = newest_complete(open_folder(config.run_dir))
    if checkpoint is None:
        return False
    state = RunState.from_dict(json.loads(checkpoint.read("state.json")))
    return state.steps_left(total_samples(config, num_samples), config.train.global_batch) == 0
