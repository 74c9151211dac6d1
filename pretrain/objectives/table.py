"""The objectives that a config can name. Adding one: its file, a line here, a YAML, a test.

The configurations are imported at once, the objectives when they are made: a configuration is checked without torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from pretrain.objectives.mae_config import ImageMAEConfig, MAESTConfig, VideoMAEObjectiveConfig, VideoMAEv2Config
from pretrain.objectives.tokenizer_config import (
    QuantisedTokenizerConfig,
    TokenizerConfig,
    ViTTokenizerConfig,
    WaveletTokenizerConfig,
)

if TYPE_CHECKING:
    from pretrain.objectives.base import Objective


def _make(module: str, name: str, config: Any, seed: int) -> Objective:
    """Imports `name` from the module of pretrain/objectives, and calls it."""
    made: Objective = getattr(importlib.import_module(f"pretrain.objectives.{module}"), name)(config, seed)
    return made


OBJECTIVES: dict[str, tuple[type[Any], Callable[[Any, int], Objective]]] = {
    "image_mae": (ImageMAEConfig, partial(_make, "image_mae", "ImageMAEObjective")),
    "mae_st": (MAESTConfig, partial(_make, "mae_st", "mae_st_objective")),
    "tokenizer": (TokenizerConfig, partial(_make, "tokenizer", "TokenizerObjective")),
    "quantised_tokenizer": (
        QuantisedTokenizerConfig,
        partial(_make, "tokenizer_variants", "quantised_tokenizer_objective"),
    ),
    "vit_tokenizer": (ViTTokenizerConfig, partial(_make, "tokenizer_variants", "vit_tokenizer_objective")),
    "wavelet_tokenizer": (WaveletTokenizerConfig, partial(_make, "tokenizer_variants", "wavelet_tokenizer_objective")),
    "video_mae": (VideoMAEObjectiveConfig, partial(_make, "video_mae", "video_mae_objective")),
    "video_mae_v2": (VideoMAEv2Config, partial(_make, "video_mae_v2", "video_mae_v2_objective")),
}
"""By `objective.name`: the dataclass of the configuration, and what makes the objective as `make(config, seed)`."""
