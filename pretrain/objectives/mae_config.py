"""The settings of masked autoencoders' objectives. Read and checked without torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from data_pipes.bounds import bounded
from pretrain.models.config import MAEConfig
from pretrain.models.mask_sizes import check_running_cells, num_kept, num_tube_kept, num_tube_tokens_kept
from pretrain.models.statistics import default_mean, default_std, fill_statistics
from pretrain.models.video_config import VideoMAEConfig, video_mae_config


@dataclass(frozen=True)
class ImageMAEConfig:
    """A masked autoencoder and the statistics of its images."""

    model: MAEConfig = field(default_factory=MAEConfig)
    """The autoencoder; its encoder's image_size and in_channels are those of the data."""
    mean: tuple[float, ...] = bounded(())
    """Per channel, on the scale where the stored range is [0, 1]; empty: ImageNet's for 3 channels, else 0.5."""
    std: tuple[float, ...] = bounded((), above=0)
    """Per channel, on the same scale, > 0; empty: ImageNet's for 3 channels, else 0.5."""
    init_from: str | None = None
    """Weights to start from: a run, a checkpoint, or a weights file; null: the paper's initialisation."""

    def __post_init__(self) -> None:
        channels = self.model.encoder.in_channels
        fill_statistics(self, default_mean(channels), default_std(channels))


@dataclass(frozen=True)
class ClipMAEConfig:
    """A masked autoencoder for clips, its masks, and the statistics of its videos."""

    model: VideoMAEConfig = field(default_factory=VideoMAEConfig)
    """The autoencoder; its encoder's num_frames, image_size and in_channels are those of the data."""
    mask_ratio: float = bounded(0.9, least=0, below=1)
    """Share of the tokens that is hidden from the encoder."""
    norm_pixels: bool = True
    """Predict normalised tokens; False predicts the pixels themselves."""
    repeats: int = bounded(1, least=1)
    """Clips of each video in a batch (data.video.repeats). Batches, learning rates and epochs count videos."""
    mean: tuple[float, ...] = bounded(())
    """Per channel, on the scale where the stored range is [0, 1]; empty: the method's for 3 channels, else 0.5."""
    std: tuple[float, ...] = bounded((), above=0)
    """Per channel, on the same scale, > 0; empty: the method's for 3 channels, else 0.5."""
    init_from: str | None = None
    """Weights to start from: a run, a checkpoint, or a weights file (an image MAE's is inflated); null: the seed's."""

    def __post_init__(self) -> None:
        channels = self.model.encoder.in_channels
        fill_statistics(self, default_mean(channels), default_std(channels))
        if self.repeats < 1:
            raise ValueError(f"repeats is {self.repeats}; expected at least 1 clip of each video.")
        if self.norm_pixels and self.model.target_values < 2 * channels:
            raise ValueError("norm_pixels needs at least 2 values per token; enlarge patch_size or set it to false.")


def check_family(config: VideoMAEConfig, family: str, method: str) -> None:
    """Checks a method's encoder.

    Raises:
        ValueError: the encoder is of another family than the method's.
    """
    if config.encoder.family != family:
        raise ValueError(
            f"{method} has an encoder of the family {family!r}; model.encoder.family is {config.encoder.family!r}."
        )


def check_some_hidden(num_kept: int, num_tokens: int, mask_ratio: float) -> None:
    """Checks a method's mask.

    Raises:
        ValueError: it hides no token, so that there would be nothing to predict.
    """
    if num_kept == num_tokens:
        raise ValueError(
            f"mask_ratio {mask_ratio} hides none of {num_tokens} tokens, so there is nothing to predict. Raise it."
        )


PAPER_MEAN = 0.45
"""Of red, green and blue alike, on the scale where the stored range is [0, 1]."""


PAPER_STD = 0.225
"""Of red, green and blue alike, on the scale where the stored range is [0, 1]."""


@dataclass(frozen=True)
class MAESTConfig(ClipMAEConfig):
    """MAE-ST; the defaults are those of the paper's ViT-L/16 on 16 frames of 224 x 224, with 4 clips of a video."""

    model: VideoMAEConfig = field(default_factory=lambda: video_mae_config("mae_st", "large"))
    """The autoencoder; its encoder's family is mae_st."""
    repeats: int = bounded(4, least=1)
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


@dataclass(frozen=True)
class VideoMAEv2Config(ClipMAEConfig):
    """VideoMAE v2; the defaults are those of the paper's ViT-g/14 on 16 frames of 224 x 224, with 4 crops of a clip."""

    model: VideoMAEConfig = field(default_factory=lambda: video_mae_config("video_mae_v2", "giant"))
    """The autoencoder; its encoder's family is video_mae."""
    repeats: int = bounded(4, least=1)
    """Clips of each video in a batch (data.video.repeats). Batches, learning rates and epochs count videos."""
    decoder_mask_ratio: float = bounded(0.5, above=0, below=1)
    """Share of the tokens that the decoder leaves out: 0.25, 0.5 or 0.75."""

    def __post_init__(self) -> None:
        super().__post_init__()
        encoder = self.model.encoder
        check_family(self.model, "video_mae", "video_mae_v2")
        check_running_cells(encoder.grid_size, self.decoder_mask_ratio)
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
