"""Several runs one after the other, each starting from what the one before it ended with: the phases of a recipe.

Enters: a YAML file with `phases`, a list of run configurations beside it. Leaves: one run per phase, with its own
folder, checkpoints and journal, and one summary. Started again, it passes over the phases that are done and resumes
inside the one that was not.
Overrides: `key=value` counts for every phase, `<phase>.key=value` for the one whose file is `<phase>.yaml`; `name` and
`output_dir` are the pipeline's own.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf

from pretrain.checkpoint.open_folder import open_folder
from pretrain.checkpoint.read import newest_complete
from pretrain.config import ConfigError, RunConfig, load_config, load_typed
from pretrain.memory.dry_run import dry_run
from pretrain.parallel.world import Launch, World, join_world, leave_world
from pretrain.preflight import check, total_samples
from pretrain.run_state import RunState
from pretrain.train import train


@dataclass(frozen=True)
class PipelineConfig:
    """A list of phases."""

    name: str = MISSING
    """The runs are called `<name>-<phase>`."""
    output_dir: str = "runs"
    """Folder of all runs."""
    phases: list[str] = field(default_factory=list)
    """Run configurations in their order, as paths from this file's folder."""


@dataclass(frozen=True)
class Phase:
    """One run of a pipeline."""

    name: str
    """Its file's name without `.yaml`."""
    path: Path
    """Its YAML file."""
    overrides: list[str]
    """What is changed of it, as `key=value`."""
    config: RunConfig
    """The file with these overrides."""


def is_pipeline(path: Path) -> bool:
    """Whether a YAML file lists phases."""
    try:
        return path.is_file() and "phases" in OmegaConf.load(path)
    except Exception:  # whatever is wrong with the file is said by whoever reads it in earnest
        return False


def load_pipeline(path: Path, overrides: Sequence[str] = ()) -> list[Phase]:
    """The phases of a pipeline, each starting from the run before it.

    Args:
        path: the pipeline's YAML file.
        overrides: `key=value` for every phase, `<phase>.key=value` for one.
    Raises:
        ConfigError: the pipeline or one of its phases is not valid.
    """
    names = [Path(name).stem for name in OmegaConf.to_container(OmegaConf.load(path))["phases"]]  # type: ignore[index, call-overload]
    own = [text for text in overrides if text.split("=")[0] in ("name", "output_dir")]
    shared = [text for text in overrides if text not in own and text.split(".")[0] not in names]
    pipeline = load_typed(PipelineConfig, path, own)
    if not pipeline.phases or len(set(names)) < len(names):
        raise ConfigError(f"{path}: phases is {pipeline.phases}; expected one or more files, each of another name")
    phases: list[Phase] = []
    for name, file in zip(names, pipeline.phases, strict=True):
        given = [*shared, *(text.removeprefix(f"{name}.") for text in overrides if text.startswith(f"{name}."))]
        given += [f"name={pipeline.name}-{name}", f"output_dir={pipeline.output_dir}"]
        if phases:
            given.append(f"objective.init_from={phases[-1].config.run_dir}")
        phases.append(Phase(name, path.parent / file, given, load_config(path.parent / file, given)))
    return phases


def run_pipeline(path: Path, overrides: Sequence[str] = (), world: World | None = None) -> dict[str, Any]:
    """Runs all phases on this process, or on those that torchrun started, until the end or a stop signal.

    Everything that can be wrong with any phase is looked at before the first begins.

    Args:
        path: the pipeline's YAML file.
        overrides: see `load_pipeline`.
        world: from `join_world`, where the processes have joined already and stay joined; None: they join here.
    Returns:
        The last phase's summary, with the summaries of all phases under `phases`.
    Raises:
        ValueError: a mistake of the user's (ConfigError, ShardError, CheckpointError).
    """
    phases = load_pipeline(path, overrides)
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


def dry_run_pipeline(
    path: Path, overrides: Sequence[str], processes: int, ranks_per_node: int | None
) -> list[dict[str, Any]]:
    """Checks each phase and estimates its memory.

    Args:
        path: the pipeline's YAML file.
        overrides: see `load_pipeline`.
        processes: ranks in all.
        ranks_per_node: ranks of a node; None: all of them.
    Returns:
        The result of `dry_run` for each phase.
    """
    phases = load_pipeline(path, overrides)
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
