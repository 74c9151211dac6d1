"""Masked autoencoder for video: MAE-ST (arXiv 2205.09113), VideoMAE (2203.12602) and VideoMAE v2 (2303.16727).

Enters: normalised clips, which tokens are seen and which predicted, and what they should be. Leaves: the loss and the
predictions. The three methods are one model here: they differ in positions and class token (`family`), in masks
(video_masking) and in targets (the objectives).
Legend: B batch, N tokens, K kept tokens, M predicted tokens, D encoder width, E decoder width, V predicted values of a
token, C channels, T frames, H/W pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pretrain.losses.clips import clip_loss
from pretrain.models.encoder import LAYER_NORM_EPS, TOKEN_STD, init_layer, transformer_blocks
from pretrain.models.mae import blocks_flops
from pretrain.models.positions import SeparablePositions
from pretrain.models.video_config import VideoMAEConfig
from pretrain.models.video_masking import ClipMask
from pretrain.models.video_vit import VideoViT, make_positions


class VideoMAEOutput(NamedTuple):
    """What a forward pass gives."""

    loss: Tensor
    """0-d float32: mean over the clips of the squared error over the tokens that count."""
    prediction: Tensor
    """[B, M, V] for the predicted tokens, values in the order (t, p, q, c)."""


class VideoMAE(nn.Module):
    """Encoder on the visible tokens, decoder on these and the ones to predict, loss on the predictions that count."""

    def __init__(self, config: VideoMAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = VideoViT(config.encoder)
        self.decoder = VideoMAEDecoder(config)

    def forward(self, clips: Tensor, mask: ClipMask, target: Tensor) -> VideoMAEOutput:
        """Predicts tokens of each clip from those that the encoder sees.

        Args:
            clips: float32 [B, C, T, H, W], normalised.
            mask: which tokens are seen, and which predicted.
            target: float32 [B, M, V], of the tokens `mask.predict_ids`.

        Returns:
            The loss and the predictions.

        Raises:
            ValueError: other shapes, or inputs of lower precision.
        """
        check_inputs(clips, mask, target, self.config)
        tokens = self.encoder(clips, mask.keep_ids)  # [B, K, D], and the class token first in MAE-ST
        prediction = self.decoder(tokens, mask.keep_ids, mask.predict_ids)  # [B, M, V]
        return VideoMAEOutput(clip_loss(prediction, target, mask.counted), prediction)

    def init_weights(self) -> None:
        """Fills all parameters and buffers with their starting values (encoder first, then decoder)."""
        self.encoder.init_weights()
        self.decoder.init_weights()


class VideoMAEDecoder(nn.Module):
    """Narrow transformer over the visible tokens and mask tokens at the places to predict.

    Its sequence is [visible, to predict] and not in the order of the tokens: positions are added, attention has no
    order, and the last layers then run on the tokens to predict alone.
    """

    def __init__(self, config: VideoMAEConfig) -> None:
        super().__init__()
        encoder, width = config.encoder, config.decoder_width
        self.is_mae_st = encoder.family == "mae_st"
        self.embed = nn.Linear(encoder.width, width, bias=self.is_mae_st)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        if self.is_mae_st:  # the encoder's class token stays behind; the decoder has its own
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = make_positions(encoder, width)
        self.blocks = transformer_blocks(width, config.decoder_depth, config.decoder_heads, encoder.mlp_ratio)
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.pred = nn.Linear(width, config.target_values)
        self.init_weights()

    def forward(self, tokens: Tensor, keep_ids: Tensor, predict_ids: Tensor) -> Tensor:
        """Predicts tokens.

        Args:
            tokens: [B, K, D] of the encoder, or [B, 1 + K, D] with a class token.
            keep_ids: int64 [B, K], the tokens that the encoder saw.
            predict_ids: int64 [B, M], the tokens to predict.

        Returns:
            [B, M, V].
        """
        visible = self.embed(tokens[:, -keep_ids.shape[1] :]) + self.positions(keep_ids)
        parts = [visible, self.mask_token + self.positions(predict_ids)]
        if self.is_mae_st:
            assert isinstance(self.positions, SeparablePositions)
            parts.insert(0, (self.cls_token + self.positions.cls).expand(len(tokens), -1, -1))
        sequence = torch.cat(parts, dim=1)
        for block in self.blocks:
            sequence = block(sequence)
        prediction: Tensor = self.pred(self.norm(sequence[:, -predict_ids.shape[1] :]))
        return prediction

    @torch.no_grad()
    def init_weights(self) -> None:
        """Starting values: xavier-uniform, mask token N(0, 0.02), class token 0, positions by their kind."""
        for part in (self.blocks, self.norm, self.pred):
            part.apply(init_layer)
        nn.init.xavier_uniform_(self.embed.weight)
        if self.embed.bias is not None:
            nn.init.zeros_(self.embed.bias)
        nn.init.normal_(self.mask_token, std=TOKEN_STD)
        if self.is_mae_st:
            nn.init.zeros_(self.cls_token)
        self.positions.init_weights()


def check_inputs(clips: Tensor, mask: ClipMask, target: Tensor, config: VideoMAEConfig) -> None:
    """Checks what `VideoMAE.forward` is given.

    Raises:
        ValueError: clips or targets are not full precision, or the targets do not fit the tokens to predict.
    """
    for name, tensor in (("clips", clips), ("targets", target)):
        if tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"The {name} are {tensor.dtype}; expected float32. Normalise integer clips first, and keep mixed "
                "precision from casting the inputs of forward (FSDP2: cast_forward_inputs=False on the root)."
            )
    expected = (*mask.predict_ids.shape, config.target_values)
    if target.shape != expected or len(clips) != len(target):
        raise ValueError(
            f"The targets have shape {list(target.shape)} for {len(clips)} clips; expected {list(expected)}, the "
            "values of each token to predict."
        )


def video_mae_flops(config: VideoMAEConfig, num_kept: int, num_predicted: int) -> float:
    """Model FLOPs of forward and backward for one clip.

    Counts matrix products, as `mae_flops` does; the decoder counts the tokens of its sequence.

    Args:
        config: the autoencoder.
        num_kept: tokens of the clip that the encoder sees, K.
        num_predicted: tokens of the clip that the decoder predicts, M.
    """
    encoder = config.encoder
    first = int(encoder.has_class_token)
    linear = (
        encoder.token_values * encoder.width * num_kept
        + encoder.width * config.decoder_width * num_kept
        + config.decoder_width * config.target_values * num_predicted
    )
    return (
        6.0 * linear
        + blocks_flops(encoder.width, encoder.depth, encoder.mlp_ratio, first + num_kept)
        + blocks_flops(config.decoder_width, config.decoder_depth, encoder.mlp_ratio, first + num_kept + num_predicted)
    )
