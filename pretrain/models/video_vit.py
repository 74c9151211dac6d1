"""Vision transformer encoder for clips that can skip hidden tubelets.

Enters: normalised clips and, for masked training, the ids of the tokens to look at. Leaves: tokens. The blocks are the
image encoder's; a token is a tubelet, a patch over a few frames.
Legend: N tokens (time-major, then row by row), C channels, T frames, H/W pixels, t/p/q a tubelet's frames and its
height/width in pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretrain.losses.clips import split_tubelets
from pretrain.models.encoder import TOKEN_STD, Encoder, init_layer
from pretrain.models.positions import SeparablePositions, SinusoidPositions
from pretrain.models.video_config import VideoViTConfig


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
