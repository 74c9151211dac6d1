"""The phases of a recipe, as a YAML file lists them: several runs one after the other. Read and checked without torch.

Enters: a YAML file with `phases`, a list of run configurations beside it. Leaves: a `Phase` for each. Overrides:
`key=value` counts for every phase, `<phase>.key=value` for the one whose file is `<phase>.yaml`; `name` and
`output_dir` are the pipeline's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from pretrain.config import ConfigError, RunConfig, load_config, load_typed
from pretrain.recipes import find_recipe
from pretrain.yaml_values import parse_yaml


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
        return "phases" in parse_yaml(find_recipe(path).read_text())
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
    path = find_recipe(path)
    names = [Path(name).stem for name in parse_yaml(path.read_text())["phases"]]
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
