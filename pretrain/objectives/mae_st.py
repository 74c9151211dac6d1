"""MAE-ST (Feichtenhofer et al., arXiv 2205.09113): tokens hidden anywhere in space and time, half of the frames
predicted, normalised as in the image MAE.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from pretrain.models.masking import num_kept
from pretrain.models.normalise import fill_statistics
from pretrain.models.video_mae import VideoMAEConfig, video_mae_config
from pretrain.models.video_masking import ClipMask, spacetime_masks
from pretrain.objectives.clip_mae import ClipMAEConfig, ClipMAEObjective, check_family, check_some_hidden
from pretrain.objectives.clip_target import joint_target

PAPER_MEAN = 0.45
"""Of red, green and blue alike, on the scale where the stored range is [0, 1]."""
PAPER_STD = 0.225
"""Of red, green and blue alike, on the scale where the stored range is [0, 1]."""


@dataclass(frozen=True)
class MAESTConfig(ClipMAEConfig):
    """MAE-ST; the defaults are those of the paper's ViT-L/16 on 16 frames of 224 x 224, with 4 clips of a video."""

    model: VideoMAEConfig = field(default_factory=lambda: video_mae_config("mae_st", "large"))
    """The autoencoder; its encoder's family is mae_st."""
    repeats: int = 4
    """Clips of each video in a batch (data.video.repeats). Batches, learning rates and epochs count videos."""

    def __post_init__(self) -> None:
        if self.model.encoder.in_channels == 3:  # the paper's statistics, not ImageNet's
            fill_statistics(self, (PAPER_MEAN,) * 3, (PAPER_STD,) * 3)
        super().__post_init__()
        check_family(self.model, "mae_st", "mae_st")
        check_some_hidden(self.num_kept, self.model.encoder.num_tokens, self.mask_ratio)

    @property
    def num_kept(self) -> int:
        """Tokens of a clip that the encoder sees."""
        return num_kept(self.model.encoder.num_tokens, self.mask_ratio)


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
