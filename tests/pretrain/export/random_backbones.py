"""Backbones that no run has trained, with random numbers everywhere, also in the norms."""

from __future__ import annotations

from pathlib import Path

import torch

from pretrain.models.config import ViTConfig
from pretrain.models.video_config import VideoViTConfig
from pretrain.models.video_vit import VideoViT
from pretrain.models.vit import ViT
from pretrain.weights.backbone import Backbone, weights_digest


def backbone_of(config: ViTConfig | VideoViTConfig, folder: Path) -> Backbone:
    """The same backbone for the same configuration, as if it had been read from a file in `folder`."""
    torch.manual_seed(0)
    model = (VideoViT(config) if isinstance(config, VideoViTConfig) else ViT(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return Backbone(
        model=model,
        mean=(0.4,) * config.in_channels,
        std=(0.25,) * config.in_channels,
        weights="imported",
        label="random",
        source=str(folder / "random.pth"),
        digest=weights_digest(model.state_dict()),
    )
