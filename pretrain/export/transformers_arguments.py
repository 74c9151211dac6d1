"""What transformers' configurations need to build our video models, or why they cannot.

In: a model's configuration. Out: the arguments of `transformers.VideoMAEConfig`.
"""

from __future__ import annotations

from typing import Any

from pretrain.models.encoder import LAYER_NORM_EPS
from pretrain.models.video_config import VideoMAEConfig, VideoViTConfig
from pretrain.weights.video_names import LEARNED_POSITIONS

CANNOT = "This model cannot become a transformers VideoMAE"
"""How refusals to export to transformers begin; the reason follows."""


def transformers_encoder_arguments(config: VideoViTConfig) -> dict[str, Any]:
    """What `transformers.VideoMAEConfig` needs to build this encoder.

    Raises:
        ValueError: it is MAE-ST's.
    """
    if config.family != "video_mae":
        raise ValueError(f"{CANNOT}: {LEARNED_POSITIONS}")
    return {
        "image_size": side_or_sides(config.image_size),
        "patch_size": side_or_sides(config.patch_size),
        "num_channels": config.in_channels,
        "num_frames": config.num_frames,
        "tubelet_size": config.tubelet_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": int(config.width * config.mlp_ratio),
        "layer_norm_eps": LAYER_NORM_EPS,  # the default there is 1e-12
        "qv_bias": True,
        "use_mean_pooling": False,  # True leaves the encoder's norm out
    }


def transformers_arguments(config: VideoMAEConfig, norm_pixels: bool) -> dict[str, Any]:
    """What `transformers.VideoMAEConfig` needs to build this model, decoder and target included.

    One thing it cannot say: the norm after its decoder has an eps of 1e-5, ours and the original's 1e-6.

    Args:
        config: the model.
        norm_pixels: whether it predicts each patch's pixels normalised by their own mean and variance.
    Raises:
        ValueError: transformers does not have this model; the message gives the reason.
    """
    encoder = config.encoder
    arguments = transformers_encoder_arguments(encoder)
    reasons = {
        "it predicts a part of the frames; there all are predicted": (
            config.num_predicted_frames != encoder.num_frames
        ),
        f"its patches are {encoder.patch_size[0]} x {encoder.patch_size[1]}; there the decoder's are square": (
            len(set(encoder.patch_size)) != 1
        ),
        f"it predicts raw pixels of {encoder.in_channels} channels; there these must be 3": (
            encoder.in_channels != 3 and not norm_pixels
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"{CANNOT}: {reason}")
    return arguments | {
        "decoder_hidden_size": config.decoder_width,
        "decoder_num_hidden_layers": config.decoder_depth,
        "decoder_num_attention_heads": config.decoder_heads,
        "decoder_intermediate_size": int(config.decoder_width * encoder.mlp_ratio),
        "norm_pix_loss": norm_pixels,
    }


def side_or_sides(pair: tuple[int, int]) -> int | list[int]:
    """As transformers' configurations have sizes: one number for a square."""
    return pair[0] if pair[0] == pair[1] else list(pair)
