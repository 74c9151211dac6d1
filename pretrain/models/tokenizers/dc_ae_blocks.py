"""The blocks of DC-AE (arXiv 2410.10733): residual ones, and the ones that halve and double a map with shortcuts.

Enters and leaves: feature maps [B, C, H, W]. Norms stand after the convolutions of a branch, just before it is added.
Legend: B batch, C channels, H/W pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.norms import BatchNorm, RMSNorm
from pretrain.models.tokenizers.linear_attention import LiteMLA

GLU_RATIO = 4
"""Hidden channels of a gated convolution / its width, as in DC-AE's code."""


class ResBlock(nn.Module):
    """x + norm(conv(act(conv(x)))): RMS norm with SiLU, or batch norm with ReLU."""

    def __init__(self, width: int, norm: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.act = nn.ReLU() if norm == "batch" else nn.SiLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = BatchNorm(width) if norm == "batch" else RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        branch: Tensor = self.norm(self.conv2(self.act(self.conv1(x))))
        return x + branch


class EfficientViTBlock(nn.Module):
    """x + attention(x), then x + gated convolution(x)."""

    def __init__(self, width: int, scales: tuple[int, ...]) -> None:
        super().__init__()
        self.attn = LiteMLA(width, scales)
        self.glu = GLUMBConv(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        mixed: Tensor = self.glu(x)
        return x + mixed


class GLUMBConv(nn.Module):
    """Inverted bottleneck with a gate: 1x1 to 8C, SiLU, depthwise 3x3, half times SiLU(other half), 1x1 to C, norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = GLU_RATIO * width
        self.expand = nn.Conv2d(width, 2 * hidden, 1)
        self.depthwise = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.contract = nn.Conv2d(hidden, width, 1, bias=False)
        self.norm = RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.depthwise(F.silu(self.expand(x))).chunk(2, dim=1)
        normed: Tensor = self.norm(self.contract(x * F.silu(gate)))
        return normed


class Downsample(nn.Module):
    """Halves a map: [B, C, H, W] to [B, C', H/2, W/2].

    With the resampling "shuffle" it is a convolution to C'/4 channels whose 2 x 2 pixels become channels, with
    "interpolate" a strided convolution. The shortcut turns the input's 2 x 2 pixels into channels and averages groups
    of them.
    """

    def __init__(self, width: int, out_width: int, resampling: str, shortcut: bool) -> None:
        super().__init__()
        self.shuffle, self.shortcut, self.out_width = resampling == "shuffle", shortcut, out_width
        if self.shuffle:
            self.conv = nn.Conv2d(width, out_width // 4, 3, padding=1)
        else:
            self.conv = nn.Conv2d(width, out_width, 3, padding=1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        if self.shuffle:
            out = F.pixel_unshuffle(out, 2)
        return out + average_channels(F.pixel_unshuffle(x, 2), self.out_width) if self.shortcut else out


class Upsample(nn.Module):
    """Doubles a map: [B, C, H, W] to [B, C', 2H, 2W].

    With the resampling "shuffle" it is a convolution to 4C' channels, which become 2 x 2 pixels, with "interpolate"
    nearest neighbours and then a convolution. The shortcut repeats the input's channels and turns them into 2 x 2
    pixels.
    """

    def __init__(self, width: int, out_width: int, resampling: str, shortcut: bool) -> None:
        super().__init__()
        self.shuffle, self.shortcut, self.out_width = resampling == "shuffle", shortcut, out_width
        self.conv = nn.Conv2d(width, 4 * out_width if self.shuffle else out_width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.shuffle:
            out: Tensor = self.conv(x)
            # Added before the shuffle, which moves values and adds nothing: one pass over the large map less.
            return F.pixel_shuffle(add_repeated(out, x) if self.shortcut else out, 2)
        larger: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return larger + F.pixel_shuffle(repeat_channels(x, 4 * self.out_width), 2) if self.shortcut else larger


class EncoderOut(nn.Module):
    """The last convolution of the encoder, to the latent's channels, with a shortcut of channel averages."""

    def __init__(self, width: int, latent_channels: int, shortcut: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, latent_channels, 3, padding=1)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out + average_channels(x, out.shape[1]) if self.shortcut else out


class DecoderIn(nn.Module):
    """The first convolution of the decoder, from the latent's channels, with a shortcut of repeated channels."""

    def __init__(self, latent_channels: int, width: int, shortcut: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(latent_channels, width, 3, padding=1)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return add_repeated(out, x) if self.shortcut else out


class EncoderIn(nn.Module):
    """The first convolution of an encoder that starts at full resolution."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


class DecoderOut(nn.Module):
    """Norm, activation, and the convolution to pixels; with `factor` 2 it doubles the map as `Upsample` does."""

    def __init__(self, width: int, out_channels: int, factor: int, resampling: str, act: str) -> None:
        super().__init__()
        self.doubles, self.shuffle = factor == 2, resampling == "shuffle"
        self.norm = RMSNorm(width)
        self.act = nn.ReLU() if act == "relu" else nn.SiLU()
        self.conv = nn.Conv2d(width, out_channels * (4 if self.doubles and self.shuffle else 1), 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(x))
        if self.doubles and not self.shuffle:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        out: Tensor = self.conv(x)
        return F.pixel_shuffle(out, 2) if self.doubles and self.shuffle else out


def average_channels(x: Tensor, out_channels: int) -> Tensor:
    """Means over groups of neighbouring channels: [B, C, H, W] to [B, out_channels, H, W]."""
    grouped: Tensor = x.unflatten(1, (out_channels, -1))
    return grouped.mean(dim=2)


def repeat_channels(x: Tensor, out_channels: int) -> Tensor:
    """Each channel several times in a row: [B, C, H, W] to [B, out_channels, H, W]."""
    return x[:, :, None].expand(-1, -1, out_channels // x.shape[1], -1, -1).flatten(1, 2)


def add_repeated(out: Tensor, x: Tensor) -> Tensor:
    """`out + repeat_channels(x, out's channels)`, without writing the repeated channels down."""
    grouped: Tensor = out.unflatten(1, (x.shape[1], -1))
    return (grouped + x[:, :, None]).flatten(1, 2)


@torch.no_grad()
def init_module(module: nn.Module) -> None:
    """Starting values of one layer, for `nn.Module.apply`: torch's own for convolutions, ones and zeros for norms."""
    if isinstance(module, (nn.Conv2d, RMSNorm, BatchNorm)):
        module.reset_parameters()
