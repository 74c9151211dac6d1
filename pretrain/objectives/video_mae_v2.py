"""VideoMAE v2 (Wang et al., arXiv 2303.16727): VideoMAE whose decoder predicts only what running cells leave."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from pretrain.models.video_mae import VideoMAEConfig, video_mae_config
from pretrain.models.video_masking import (
    ClipMask,
    dual_masks,
    num_decoded,
    num_tube_kept,
    num_tube_tokens_kept,
    running_cells,
)
from pretrain.objectives.clip_mae import ClipMAEConfig, ClipMAEObjective, check_family
from pretrain.objectives.clip_target import channel_target


@dataclass(frozen=True)
class VideoMAEv2Config(ClipMAEConfig):
    """VideoMAE v2; the defaults are those of the paper's ViT-g/14 on 16 frames of 224 x 224, with 4 crops of a clip."""

    model: VideoMAEConfig = field(default_factory=lambda: video_mae_config("video_mae_v2", "giant"))
    """The autoencoder; its encoder's family is video_mae."""
    repeats: int = 4
    """Clips of each video in a batch (data.video.repeats). Batches, learning rates and epochs count videos."""
    decoder_mask_ratio: float = 0.5
    """Share of the tokens that the decoder leaves out: 0.25, 0.5 or 0.75."""

    def __post_init__(self) -> None:
        super().__post_init__()
        encoder = self.model.encoder
        check_family(self.model, "video_mae", "video_mae_v2")
        running_cells(encoder.grid_size, self.decoder_mask_ratio)  # raises for what cells cannot do
        hidden = encoder.tokens_per_step - num_tube_kept(encoder.tokens_per_step, self.mask_ratio)
        left_out = self.decoder_mask_ratio * encoder.tokens_per_step
        if hidden <= left_out:  # else some clip's loss could be a mean over no token
            raise ValueError(
                f"mask_ratio {self.mask_ratio} hides {hidden} places and decoder_mask_ratio {self.decoder_mask_ratio} "
                f"leaves {left_out:.0f} out, which may be the same ones; expected mask_ratio to hide more."
            )

    @property
    def num_kept(self) -> int:
        """Tokens of a clip that the encoder sees."""
        return num_tube_tokens_kept(self.model.encoder.grid_size, self.mask_ratio)


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
