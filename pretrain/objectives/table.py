"""The objectives that a config can name. Adding one: its file, a line here, a YAML, a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pretrain.objectives.base import Objective
from pretrain.objectives.image_mae import ImageMAEConfig, ImageMAEObjective
from pretrain.objectives.mae_st import MAESTConfig, mae_st_objective
from pretrain.objectives.tokenizer import TokenizerObjective
from pretrain.objectives.tokenizer_config import TokenizerConfig
from pretrain.objectives.tokenizer_variants import (
    QuantisedTokenizerConfig,
    ViTTokenizerConfig,
    WaveletTokenizerConfig,
    quantised_tokenizer_objective,
    vit_tokenizer_objective,
    wavelet_tokenizer_objective,
)
from pretrain.objectives.video_mae import VideoMAEObjectiveConfig, video_mae_objective
from pretrain.objectives.video_mae_v2 import VideoMAEv2Config, video_mae_v2_objective

OBJECTIVES: dict[str, tuple[type[Any], Callable[[Any, int], Objective]]] = {
    "image_mae": (ImageMAEConfig, ImageMAEObjective),
    "mae_st": (MAESTConfig, mae_st_objective),
    "tokenizer": (TokenizerConfig, TokenizerObjective),
    "quantised_tokenizer": (QuantisedTokenizerConfig, quantised_tokenizer_objective),
    "vit_tokenizer": (ViTTokenizerConfig, vit_tokenizer_objective),
    "wavelet_tokenizer": (WaveletTokenizerConfig, wavelet_tokenizer_objective),
    "video_mae": (VideoMAEObjectiveConfig, video_mae_objective),
    "video_mae_v2": (VideoMAEv2Config, video_mae_v2_objective),
}
"""By `objective.name`: the dataclass of the configuration, and what makes the objective as `make(config, seed)`."""
