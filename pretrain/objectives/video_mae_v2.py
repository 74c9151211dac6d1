"""VideoMAE v2 (Wang et al., arXiv 2303.16727): VideoMAE whose decoder predicts only what running cells leave."""

from __future__ import annotations

from torch import Tensor

from pretrain.models.mask_sizes import num_decoded
from pretrain.models.video_masking import ClipMask, dual_masks
from pretrain.objectives.clip_mae import ClipMAEObjective
from pretrain.objectives.clip_target import channel_target
from pretrain.objectives.mae_config import VideoMAEv2Config


def video_mae_v2_objective(config: VideoMAEv2Config, seed: int) -> ClipMAEObjective:
    """The objective of a configuration; `seed` is that of the training masks."""
    grid_size = config.model.encoder.grid_size

    def make_masks(positions: Tensor, repeats: int, seed: int) -> ClipMask:
        return dual_masks(positions, repeats, grid_size, config.mask_ratio, config.decoder_mask_ratio, seed)

    return ClipMAEObjective(
        config,
        seed,
        make_masks=make_masks,
        target=channel_target(config.model.encoder.in_channels, config.norm_pixels),
        num_kept=config.num_kept,
        num_predicted=num_decoded(grid_size, config.decoder_mask_ratio),
    )
