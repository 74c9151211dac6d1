"""ViTok (arXiv 2501.09755): an autoencoder of two vision transformers over patches, with a few latent values each.

Enters: normalised images of any size. Leaves: reconstructions of the same size, and latents whose pixels are patches.
The number of latent values, (H / p) (W / p) L, governs how well it reconstructs; a larger decoder helps, a larger
encoder does not. Positions are fixed sines and cosines of the grid at hand, so no size is special.
Legend: B batch, C image channels, L latent channels, H/W pixels, h/w latent pixels (patches), p pixels of a patch's
side, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretrain.losses.pixels import split_patches
from pretrain.models.encoder import LAYER_NORM_EPS, PatchProjection, init_layer, transformer_blocks
from pretrain.models.positions import sincos_position_embedding
from pretrain.models.tokenizers.autoencoder import Autoencoder, EncoderOrDecoder
from pretrain.models.tokenizers.bottlenecks import direct_or_gaussian
from pretrain.models.tokenizers.config import ViTAutoencoderConfig


class ViTAutoencoder(Autoencoder):
    """ViTok."""

    config: ViTAutoencoderConfig

    def __init__(self, config: ViTAutoencoderConfig) -> None:
        encoder_in = PatchesIn(config.in_channels, config.patch_size, config.encoder_width)
        encoder_out = LatentOut(config.encoder_width, config.latent_channels * (2 if config.gaussian else 1))
        decoder_in = LatentIn(config.latent_channels, config.decoder_width)
        decoder_out = PixelsOut(config.decoder_width, config.in_channels, config.patch_size)
        width, depth, heads = config.encoder_width, config.encoder_depth, config.encoder_heads
        encoder = Transformer(encoder_in, grid_blocks(width, depth, heads, config.mlp_ratio), encoder_out)
        width, depth, heads = config.decoder_width, config.decoder_depth, config.decoder_heads
        decoder = Transformer(decoder_in, grid_blocks(width, depth, heads, config.mlp_ratio), decoder_out)
        super().__init__(config, encoder, direct_or_gaussian(config.gaussian), decoder)


class Transformer(EncoderOrDecoder):
    """An encoder or a decoder: from a map to tokens [B, h, w, D], through blocks, to another map."""

    def __init__(self, project_in: nn.Module, blocks: nn.ModuleList, project_out: nn.Module) -> None:
        super().__init__()
        self.project_in = project_in
        self.layers = blocks
        self.project_out = project_out

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def steps(self) -> list[nn.Module]:
        return [self.project_in, *self.blocks(), self.project_out]

    def init_weights(self) -> None:
        self.apply(init_layer)


class GridBlock(nn.Module):
    """A transformer block on tokens that keep their grid: [B, h, w, D] to [B, h, w, D]."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, tokens: Tensor) -> Tensor:
        mixed: Tensor = self.block(tokens.flatten(1, 2))
        grid: Tensor = mixed.unflatten(1, tokens.shape[1:3])
        return grid


def grid_blocks(width: int, depth: int, heads: int, mlp_ratio: float) -> nn.ModuleList:
    """`transformer_blocks`, each as a `GridBlock`."""
    return nn.ModuleList(GridBlock(block) for block in transformer_blocks(width, depth, heads, mlp_ratio))


class Positions:
    """The fixed embedding of a grid's places, kept per grid and device; no part of any state dict."""

    def __init__(self, width: int) -> None:
        self.width = width
        self._cache: dict[tuple[int, int, torch.device], Tensor] = {}

    def add_to(self, tokens: Tensor) -> Tensor:
        """Adds to tokens [B, h, w, D] the embedding of their places."""
        rows, columns = tokens.shape[1:3]
        key = rows, columns, tokens.device
        if key not in self._cache:
            places = sincos_position_embedding((rows, columns), self.width)[0, 1:]
            self._cache[key] = places.unflatten(0, (rows, columns)).to(tokens.device)
        return tokens + self._cache[key].to(tokens.dtype)


class PatchesIn(nn.Module):
    """Images [B, C, H, W] to tokens [B, h, w, D]."""

    def __init__(self, in_channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = PatchProjection(in_channels, (patch_size, patch_size), width)
        self.positions = Positions(width)

    def forward(self, images: Tensor) -> Tensor:
        patches = split_patches(images, (self.patch_size, self.patch_size)).flatten(3)  # [B, h, w, C p p]
        return self.positions.add_to(self.proj(patches))


class LatentIn(nn.Module):
    """Latents [B, L, h, w] to tokens [B, h, w, D]."""

    def __init__(self, latent_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(latent_channels, width)
        self.positions = Positions(width)

    def forward(self, latent: Tensor) -> Tensor:
        return self.positions.add_to(self.proj(latent.permute(0, 2, 3, 1)))


class LatentOut(nn.Module):
    """Tokens [B, h, w, D] to latents [B, channels, h, w], or to their means and log-variances."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.proj = nn.Linear(width, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        values: Tensor = self.proj(self.norm(tokens))
        return values.permute(0, 3, 1, 2)


class PixelsOut(nn.Module):
    """Tokens [B, h, w, D] to images [B, C, H, W]."""

    def __init__(self, width: int, out_channels: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.proj = nn.Linear(width, out_channels * patch_size**2)

    def forward(self, tokens: Tensor) -> Tensor:
        patches: Tensor = self.proj(self.norm(tokens)).unflatten(3, (-1, self.patch_size, self.patch_size))
        return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)  # from [B, h, w, C, p, p]
