"""Configurations of runs: a file or a dictionary in, a checked `RunConfig` out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pretrain

if TYPE_CHECKING:
    from pretrain.config import RunConfig


def load_config(config: str | Path | Mapping[str, Any], overrides: Sequence[str] | Mapping[str, Any] = ()) -> RunConfig:
    """Reads and checks a run's configuration; nothing is started.

    Args:
        config: a YAML file; in a checkout also the name of a recipe below `configs/`, such as "mae/vit_base"; or the
            content of such a file as a dictionary.
        overrides: changes, as `["train.steps=100"]` or `{"train.steps": 100}`.

    Raises:
        ValueError: there is no such file, an unknown key (the message has the nearest known one), a value of another
            type, or a missing one.
    """
    from pretrain.config import load_config as load

    given = [overrides] if isinstance(overrides, str) else overrides
    return load(config if isinstance(config, Mapping) else _file(config), given)


def _file(name: str | Path) -> Path:
    """The file that a path or a recipe's name stands for; where there is none, the path itself."""
    recipe = Path(pretrain.__file__).parent.parent / "configs" / f"{name}.yaml"
    return recipe if not Path(name).is_file() and recipe.is_file() else Path(name)
