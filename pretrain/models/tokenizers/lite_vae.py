"""LiteVAE (arXiv 2405.14477): an encoder that starts from wavelet coefficients instead of pixels, and a usual decoder.

Enters: normalised images of any size. Leaves: reconstructions of the same size, and latents. A Haar transform halves
the picture as often as the latent needs; a small network looks at each level's coefficients, and one more at all of
them together at the latent's size. No convolution ever runs at full resolution, which is where other encoders spend
most of their time. The decoder is DC-AE's.
Legend: B batch, C image channels, L latent channels, H/W pixels, h/w latent pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.norms import RMSNorm
from pretrain.models.tokenizers.autoencoder import Autoencoder, EncoderOrDecoder
from pretrain.models.tokenizers.bottlenecks import direct_or_gaussian
from pretrain.models.tokenizers.config import LiteVAEConfig
from pretrain.models.tokenizers.dc_ae import Decoder
from pretrain.models.tokenizers.dc_ae_blocks import ResBlock, init_module


class LiteVAE(Autoencoder):
    """Wavelet encoder, DC-AE's decoder."""

    config: LiteVAEConfig

    def __init__(self, config: LiteVAEConfig) -> None:
        bottleneck = direct_or_gaussian(config.gaussian)
        super().__init__(config, WaveletEncoder(config), bottleneck, Decoder(config.decoder_shape()))


class WaveletEncoder(EncoderOrDecoder):
    """Maps images [B, C, H, W] to latents [B, L, h, w], or to means and log-variances [B, 2 L, h, w]."""

    def __init__(self, config: LiteVAEConfig) -> None:
        super().__init__()
        self.project_in = WaveletLevels(config)
        self.joined = nn.Sequential(*(ResBlock(config.width, "rms") for _ in range(config.depth)))
        self.project_out = NormedConv(config.width, config.latent_channels * (2 if config.gaussian else 1))

    def blocks(self) -> list[nn.Module]:
        levels = [block for level in self.project_in.levels for block in list(level.children())[1:]]
        return [*levels, *self.joined.children()]

    def steps(self) -> list[nn.Module]:
        return [self.project_in, *self.joined.children(), self.project_out]

    def init_weights(self) -> None:
        self.apply(init_module)


class WaveletLevels(nn.Module):
    """Sends each level's coefficients through a network of its own and joins them: [B, C, H, W] to [B, width, h, w].

    A level's features come to the latent's size by pixel unshuffle, which loses nothing, and a 1 x 1 convolution.
    """

    def __init__(self, config: LiteVAEConfig) -> None:
        super().__init__()
        inputs, width, levels = 4 * config.in_channels, config.level_width, config.levels
        self.levels = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(inputs, width, 3, padding=1), *(ResBlock(width, "rms") for _ in range(config.level_depth))
            )
            for _ in range(levels)
        )
        self.factors = [1 << (levels - level) for level in range(1, levels + 1)]
        """Of each level, its side / the latent's."""
        self.join = nn.Conv2d(sum(width * factor**2 for factor in self.factors), config.width, 1)

    def forward(self, images: Tensor) -> Tensor:
        features, average = [], images
        for level, (network, factor) in enumerate(zip(self.levels, self.factors, strict=True), 1):
            coefficients = haar(average)
            average = coefficients[:, : images.shape[1]]
            # An orthonormal transform doubles averages per level; a network sees them on the images' scale.
            features.append(F.pixel_unshuffle(network(coefficients * 0.5**level), factor))
        joined: Tensor = self.join(torch.cat(features, dim=1))
        return joined


class NormedConv(nn.Module):
    """Norm, SiLU, and the convolution to the latent."""

    def __init__(self, width: int, out_channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.conv = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.silu(self.norm(x)))
        return out


def haar(x: Tensor) -> Tensor:
    """One level of the orthonormal Haar transform, which keeps the sum of squares.

    Args:
        x: [B, C, H, W], both sides even.

    Returns:
        [B, 4 C, H / 2, W / 2]: first all channels' averages (doubled, as the transform is orthonormal), then their
        differences between columns, between rows, and diagonally.
    """
    top_left, top_right, bottom_left, bottom_right = (x[..., row::2, column::2] for row in (0, 1) for column in (0, 1))
    top, top_change = top_left + top_right, top_left - top_right
    bottom, bottom_change = bottom_left + bottom_right, bottom_left - bottom_right
    return 0.5 * torch.cat([top + bottom, top_change + bottom_change, top - bottom, top_change - bottom_change], dim=1)
