"""MAE-ST (Feichtenhofer et al., arXiv 2205.09113): tokens hidden anywhere in space and time, half of the frames
predicted, normalised as in the image MAE.
"""

from __future__ import annotations

from torch import Tensor

from pretrain.models.video_masking import ClipMask, spacetime_masks
from pretrain.objectives.clip_mae import ClipMAEObjective
from pretrain.objectives.clip_target import joint_target
from pretrain.objectives.mae_config import MAESTConfig


def mae_st_objective(config: MAESTConfig, seed: int) -> ClipMAEObjective:
    """The objective of a configuration; `seed` is that of the training masks."""
    grid_size = config.model.encoder.grid_size

    def make_masks(positions: Tensor, repeats: int, seed: int) -> ClipMask:
        return spacetime_masks(positions, repeats, grid_size, config.mask_ratio, seed)

    return ClipMAEObjective(
        config,
        seed,
        make_masks=make_masks,
        target=joint_target(config.mean, config.std, config.norm_pixels),
        num_kept=config.num_kept,
        num_predicted=config.model.encoder.num_tokens - config.num_kept,
    )
