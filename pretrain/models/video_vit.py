"""Vision transformer encoder for clips that can skip hidden tubelets.

Enters: normalised clips and, for masked training, the ids of the tokens to look at. Leaves: tokens. The blocks are the
image encoder's; a token is a tubelet, a patch over a few frames.
Legend: N tokens (time-major, then row by row), C channels, T frames, H/W pixels, t/p/q a tubelet's frames and its
height/width in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pretrain.losses.clips import split_tubelets
from pretrain.models.encoder import TOKEN_STD, Encoder, init_layer
from pretrain.models.positions import SeparablePositions, SinusoidPositions
from pretrain.models.vit import check_pixels

Family = Literal["video_mae", "mae_st"]
"""How an encoder knows where its tokens lie; see `VideoViTConfig.family`."""

VIDEO_VIT_SIZES: dict[str, tuple[int, int, int, float]] = {
    "small": (384, 12, 6, 4.0),
    "base": (768, 12, 12, 4.0),
    "large": (1024, 24, 16, 4.0),
    "huge": (1280, 32, 16, 4.0),
    "giant": (1408, 40, 16, 48 / 11),
}
"""Width, depth, heads and mlp_ratio by name. The giant one has patches of 14 x 14, and MAE-ST's huge one too."""


@dataclass(frozen=True)
class VideoViTConfig:
    """Shape of a video transformer. The defaults are VideoMAE's ViT-B/16 on 16 frames of 224 x 224."""

    num_frames: int = 16
    """Frames of a clip."""
    image_size: tuple[int, int] = (224, 224)
    """Height and width of a frame, in pixels."""
    tubelet_size: int = 2
    """Frames of a tubelet; divides num_frames."""
    patch_size: tuple[int, int] = (16, 16)
    """Height and width of a tubelet, in pixels; divides image_size."""
    in_channels: int = 3
    """Channels of a frame."""
    width: int = 768
    """Features per token; even, divisible by heads."""
    depth: int = 12
    """Number of transformer blocks."""
    heads: int = 12
    """Attention heads per block."""
    mlp_ratio: float = 4.0
    """Hidden features of a block's MLP / width."""
    family: Family = "video_mae"
    """video_mae: a fixed sinusoid over all tokens, no class token. mae_st: learned positions, space plus time, and a
    class token."""
    positions_start: Literal["normal", "sincos"] = "normal"
    """What mae_st's positions start as: N(0, 0.02) as in the paper, or sines and cosines, with which short runs learn
    sooner where to look."""

    def __post_init__(self) -> None:
        # A YAML file gives lists.
        object.__setattr__(self, "image_size", tuple(self.image_size))
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        check_pixels(image_size=self.image_size, patch_size=self.patch_size)
        if min(self.num_frames, self.tubelet_size, self.in_channels, self.depth) < 1:
            raise ValueError(
                f"num_frames is {self.num_frames}, tubelet_size {self.tubelet_size}, in_channels {self.in_channels} "
                f"and depth {self.depth}; expected at least 1 of each."
            )
        sides = zip(("num_frames", "height", "width"), self.clip_size, self.token_size, strict=True)
        for side, whole, part in sides:
            if whole % part:
                raise ValueError(
                    f"The clip's {side} of {whole} is no multiple of a tubelet's {part}. Set it to "
                    f"{whole // part * part or part} or {(whole // part + 1) * part}, or choose other tubelets."
                )
        check_width("width", self.width, "heads", self.heads)
        if self.family not in ("video_mae", "mae_st"):
            raise ValueError(f"family is {self.family!r}; expected 'video_mae' or 'mae_st'.")
        if self.positions_start == "sincos" and self.family != "mae_st":
            raise ValueError("positions_start is sincos and family video_mae, whose positions are fixed. Leave it out.")

    @property
    def clip_size(self) -> tuple[int, int, int]:
        """T, H, W."""
        return (self.num_frames, *self.image_size)

    @property
    def token_size(self) -> tuple[int, int, int]:
        """t, p, q."""
        return (self.tubelet_size, *self.patch_size)

    @property
    def grid_size(self) -> tuple[int, int, int]:
        """Tokens along time, height and width."""
        steps, rows, columns = (whole // part for whole, part in zip(self.clip_size, self.token_size, strict=True))
        return steps, rows, columns

    @property
    def num_tokens(self) -> int:
        """Tokens of a clip, N."""
        return self.grid_size[0] * self.tokens_per_step

    @property
    def tokens_per_step(self) -> int:
        """Tokens that share their time."""
        return self.grid_size[1] * self.grid_size[2]

    @property
    def token_values(self) -> int:
        """Numbers in one tubelet: t * p * q * C."""
        return self.tubelet_size * self.patch_size[0] * self.patch_size[1] * self.in_channels

    @property
    def has_class_token(self) -> bool:
        """Whether the family has a class token."""
        return self.family == "mae_st"


def check_width(width_name: str, width: int, heads_name: str, heads: int) -> None:
    """Checks the width of a video transformer.

    Raises:
        ValueError: the width does not split evenly into heads, and into sines and cosines.
    """
    if heads < 1 or width < 1 or width % heads or width % 2:
        raise ValueError(
            f"{width_name} is {width} and {heads_name} is {heads}; expected an even {width_name} that is a multiple of "
            f"{heads_name}."
        )


class VideoViT(Encoder):
    """Encoder of VideoMAE (arXiv 2203.12602) or MAE-ST (2205.09113): pre-norm blocks and a final norm."""

    positions: SinusoidPositions | SeparablePositions
    """By the family; see `make_positions`."""

    def __init__(self, config: VideoViTConfig) -> None:
        super().__init__(
            config,
            config.clip_size,
            config.token_size,
            has_class_token=config.has_class_token,
            positions=make_positions(config, config.width),
        )
        self.config = config
        self.init_weights()

    def split(self, inputs: Tensor) -> Tensor:
        return split_tubelets(inputs, self.config.token_size).flatten(1, 3).flatten(2)

    def position_embedding(self, keep_ids: Tensor | None) -> Tensor:
        embedding: Tensor = self.positions(keep_ids)
        return embedding

    def class_position(self) -> Tensor:
        assert isinstance(self.positions, SeparablePositions)
        return self.positions.cls

    @torch.no_grad()
    def init_weights(self) -> None:
        """Starting values: xavier-uniform as in the image MAE, positions by their kind, class token N(0, 0.02)."""
        self.apply(init_layer)
        self.positions.init_weights()
        if self.config.has_class_token:
            nn.init.normal_(self.cls_token, std=TOKEN_STD)


def make_positions(encoder: VideoViTConfig, width: int) -> SinusoidPositions | SeparablePositions:
    """The family's position embedding, for the encoder or for a decoder of another width.

    Raises:
        ValueError: the embedding starts as sines and cosines, and the width is no multiple of 4.
    """
    if encoder.family == "video_mae":
        return SinusoidPositions(encoder.grid_size, width)
    if encoder.positions_start == "sincos" and width % 4:
        raise ValueError(f"positions_start is sincos and a width is {width}; expected a multiple of 4.")
    return SeparablePositions(encoder.grid_size, width, encoder.positions_start == "sincos")
