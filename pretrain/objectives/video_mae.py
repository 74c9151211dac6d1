"""VideoMAE (Tong et al., arXiv 2203.12602): places hidden at all times (tubes), predicted as z-scores per channel."""

from __future__ import annotations

from torch import Tensor

from pretrain.models.video_masking import ClipMask, tube_masks
from pretrain.objectives.clip_mae import ClipMAEObjective
from pretrain.objectives.clip_target import channel_target
from pretrain.objectives.mae_config import VideoMAEObjectiveConfig


def video_mae_objective(config: VideoMAEObjectiveConfig, seed: int) -> ClipMAEObjective:
    """The objective of a configuration; `seed` is that of the training masks."""
    grid_size = config.model.encoder.grid_size

    def make_masks(positions: Tensor, repeats: int, seed: int) -> ClipMask:
        return tube_masks(positions, repeats, grid_size, config.mask_ratio, seed)

    return ClipMAEObjective(
        config,
        seed,
        make_masks=make_masks,
        target=channel_target(config.model.encoder.in_channels, config.norm_pixels),
        num_kept=config.num_kept,
        num_predicted=config.model.encoder.num_tokens - config.num_kept,
    )
