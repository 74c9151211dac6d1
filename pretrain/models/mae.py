"""Masked autoencoder for images (He et al., arXiv 2111.06377).

Enters: normalised images and mask noise. Leaves: the loss, the predicted patches and the mask.
Legend: B batch, N patches, K kept patches, D encoder width, E decoder width, C channels, H/W pixels, p/q pixels of a
patch's height/width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pretrain.losses.pixels import masked_patch_loss, normalise_patches, patchify
from pretrain.models.config import MAEConfig, ViTConfig
from pretrain.models.encoder import LAYER_NORM_EPS, TOKEN_STD, init_layer, transformer_blocks
from pretrain.models.masking import random_masking
from pretrain.models.positions import sincos_position_embedding
from pretrain.models.vit import ViT


class MAEOutput(NamedTuple):
    """What a forward pass gives."""

    loss: Tensor
    """0-d float32: mean squared error over the hidden patches."""
    prediction: Tensor
    """[B, N, p*q*C] for all patches, values in the order (p, q, c); normalised per patch if `norm_pixels`."""
    mask: Tensor
    """bool [B, N]: True = hidden from the encoder."""


class MAE(nn.Module):
    """Encoder on the visible patches, decoder on all, loss on the hidden ones."""

    def __init__(self, config: MAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = ViT(config.encoder)
        self.decoder = MAEDecoder(config)

    def forward(self, images: Tensor, noise: Tensor) -> MAEOutput:
        """Predicts the hidden patches of each image from the others.

        Args:
            images: float32 [B, C, H, W], normalised.
            noise: float32 [B, N]; the patches with the least noise are kept.

        Returns:
            The loss, all predictions, and the mask.

        Raises:
            ValueError: other shapes, or inputs of lower precision, from which no exact target can be taken.
        """
        check_inputs(images, noise, self.config.encoder)
        keep_ids, _, mask = random_masking(noise, self.config.mask_ratio)
        tokens = self.encoder(images, keep_ids)  # [B, 1 + K, D]
        prediction = self.decoder(tokens, keep_ids)  # [B, N, p*q*C]
        loss = masked_patch_loss(prediction, self.target(images), mask)
        return MAEOutput(loss, prediction, mask)

    def target(self, images: Tensor) -> Tensor:
        """What the decoder should predict for each patch: float32 [B, N, p*q*C]."""
        patches = patchify(images, self.config.encoder.patch_size)
        return normalise_patches(patches) if self.config.norm_pixels else patches

    def init_weights(self) -> None:
        """Fills all parameters and buffers with the paper's starting values (encoder first, then decoder)."""
        self.encoder.init_weights()
        self.decoder.init_weights()


class MAEDecoder(nn.Module):
    """Narrow transformer that predicts every patch from the visible ones.

    Parameter names: the original's `decoder_<name>` is `<name>` here, and `mask_token` is `mask_token`.
    """

    pos_embed: Tensor
    """float32 [1, 1 + N, E], the class token's first; fixed."""

    def __init__(self, config: MAEConfig) -> None:
        super().__init__()
        self.grid_size = config.encoder.grid_size
        self.num_patches = config.encoder.num_patches
        width = config.decoder_width
        self.embed = nn.Linear(config.encoder.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("pos_embed", torch.zeros(1, 1 + self.num_patches, width))
        self.blocks = transformer_blocks(width, config.decoder_depth, config.decoder_heads, config.encoder.mlp_ratio)
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.pred = nn.Linear(width, config.encoder.patch_values)
        self.init_weights()

    def forward(self, tokens: Tensor, keep_ids: Tensor) -> Tensor:
        """Predicts all patches.

        Args:
            tokens: [B, 1 + K, D] of the encoder, the class token first.
            keep_ids: int64 [B, K], the patches that the encoder saw.

        Returns:
            [B, N, p*q*C].
        """
        tokens = self.place(self.embed(tokens), keep_ids) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens)
        prediction: Tensor = self.pred(self.norm(tokens[:, 1:]))
        return prediction

    def place(self, tokens: Tensor, keep_ids: Tensor) -> Tensor:
        """Puts the class token and the kept tokens at their places among mask tokens: [B, 1 + K, E] -> [B, 1 + N, E].

        A scatter with unique targets: one copy instead of a concatenation and a gather, and its gradient (a gather)
        adds nothing up in an order that a GPU could change.
        """
        ids = nn.functional.pad(keep_ids + 1, (1, 0))[..., None].expand(-1, -1, tokens.shape[-1])
        mask_tokens = self.mask_token.to(tokens.dtype).expand(len(tokens), 1 + self.num_patches, -1)
        return mask_tokens.scatter(1, ids, tokens)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Starting values as in He et al.: xavier-uniform, mask token N(0, 0.02), fixed positions."""
        self.apply(init_layer)
        nn.init.normal_(self.mask_token, std=TOKEN_STD)
        self.pos_embed.copy_(sincos_position_embedding(self.grid_size, self.embed.out_features))


def check_inputs(images: Tensor, noise: Tensor, config: ViTConfig) -> None:
    """Checks what `MAE.forward` is given.

    Raises:
        ValueError: the images are not full precision, or the noise has not one value for each patch of each image.
    """
    if images.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"The images are {images.dtype}; expected normalised float32, from which the targets are taken. Normalise "
            "integer images first, and keep mixed precision from casting the inputs of forward "
            "(FSDP2: cast_forward_inputs=False on the root)."
        )
    if noise.shape != (len(images), config.num_patches):
        raise ValueError(
            f"The mask noise has shape {list(noise.shape)}; expected [{len(images)}, {config.num_patches}], "
            "one value for each patch of each image."
        )


def mae_flops(config: MAEConfig) -> float:
    """Model FLOPs of forward and backward for one image.

    Counts matrix products: 6 * weights * tokens for the linear layers, and 12 * width * tokens**2 per block for
    attention (both directions). The encoder counts its visible tokens, the decoder all; nothing recomputed counts.
    """
    encoder = config.encoder
    visible, every = 1 + config.num_kept, 1 + encoder.num_patches
    linear = (
        encoder.patch_values * encoder.width * config.num_kept
        + encoder.width * config.decoder_width * visible
        + config.decoder_width * encoder.patch_values * encoder.num_patches
    )
    return (
        6.0 * linear
        + blocks_flops(encoder.width, encoder.depth, encoder.mlp_ratio, visible)
        + blocks_flops(config.decoder_width, config.decoder_depth, encoder.mlp_ratio, every)
    )


def blocks_flops(width: int, depth: int, mlp_ratio: float, num_tokens: int) -> float:
    """Forward and backward FLOPs of `depth` transformer blocks on one sequence of `num_tokens`."""
    weights = 4 * width**2 + 2 * width * int(width * mlp_ratio)
    return float(depth * (6 * weights * num_tokens + 12 * width * num_tokens**2))
