"""Configurations of runs: a file or a dictionary in, a checked `RunConfig` out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.config import RunConfig


def load_config(config: str | Path | Mapping[str, Any], overrides: Sequence[str] | Mapping[str, Any] = ()) -> RunConfig:
    """Reads and checks a run's configuration; nothing is started.

    Args:
        config: a YAML file, the name of a shipped recipe, such as "mae/vit_base", or the content of such a file as a
            dictionary.
        overrides: changes, as `["train.steps=100"]` or `{"train.steps": 100}`.

    Raises:
        ValueError: there is no such file, an unknown key (the message has the nearest known one), a value of another
            type, or a missing one.
    """
    from pretrain.config import load_config as load

    given = [overrides] if isinstance(overrides, str) else overrides
    return load(config, given)
