"""The objectives that a config can name. Adding one: its file, a line here, a YAML, a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pretrain.objectives.base import Objective
from pretrain.objectives.image_mae import ImageMAEConfig, ImageMAEObjective

OBJECTIVES: dict[str, tuple[type[Any], Callable[[Any, int], Objective]]] = {
    "image_mae": (ImageMAEConfig, ImageMAEObjective),
}
"""Name in `objective.name` -> (config dataclass, class constructed as `Class(config, seed)`)."""
