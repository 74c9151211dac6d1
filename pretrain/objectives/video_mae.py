"""VideoMAE (Tong et al., arXiv 2203.12602): places hidden at all times (tubes), predicted as z-scores per channel."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pretrain.models.video_masking import ClipMask, num_tube_tokens_kept, tube_masks
from pretrain.objectives.clip_mae import ClipMAEConfig, ClipMAEObjective, check_family, check_some_hidden
from pretrain.objectives.clip_target import channel_target


@dataclass(frozen=True)
class VideoMAEObjectiveConfig(ClipMAEConfig):
    """VideoMAE; the defaults are those of the paper's ViT-B/16 on 16 frames of 224 x 224."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_family(self.model, "video_mae", "video_mae")
        check_some_hidden(self.num_kept, self.model.encoder.num_tokens, self.mask_ratio)

    @property
    def num_kept(self) -> int:
        """Tokens of a clip that the encoder sees."""
        return num_tube_tokens_kept(self.model.encoder.grid_size, self.mask_ratio)


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
