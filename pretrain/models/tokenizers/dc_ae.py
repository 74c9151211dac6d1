"""Deep compression autoencoder (DC-AE, arXiv 2410.10733): images to latents of 1/32 to 1/128 of their side, and back.

Enters: normalised images of any size. Leaves: reconstructions of the same size, and latents.
Parameter names are stable: encoder.{project_in,stages.<stage>.<block>,project_out} and the decoder's likewise, both
with stages counted from full resolution; pretrain/weights/dc_ae_names.py maps them to other layouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import nn

from pretrain.models.tokenizers.autoencoder import Autoencoder, EncoderOrDecoder
from pretrain.models.tokenizers.autoencoder_flops import training_flops
from pretrain.models.tokenizers.bottlenecks import direct_or_gaussian
from pretrain.models.tokenizers.dc_ae_blocks import (
    DecoderIn,
    DecoderOut,
    Downsample,
    EfficientViTBlock,
    EncoderIn,
    EncoderOut,
    ResBlock,
    Upsample,
    init_module,
)
from pretrain.models.tokenizers.dc_ae_config import DCAEConfig

MULTISCALE_KERNELS = (5,)
"""Sizes of the depthwise branches of a "multiscale" block's attention, as in SANA's autoencoder."""


class DCAE(Autoencoder):
    """DC-AE, SANA's, or DC-AE 1.5."""

    config: DCAEConfig

    def __init__(self, config: DCAEConfig) -> None:
        super().__init__(config, Encoder(config), direct_or_gaussian(config.gaussian), Decoder(config))


class Encoder(EncoderOrDecoder):
    """Maps images [B, C, H, W] to latents [B, L, h, w], or to means and log-variances [B, 2 L, h, w]."""

    def __init__(self, config: DCAEConfig) -> None:
        super().__init__()
        widths, depths, shortcuts = config.widths, config.encoder_depths, config.shortcuts
        if depths[0] > 0:
            self.project_in: nn.Module = EncoderIn(config.in_channels, widths[0])
        else:
            self.project_in = Downsample(config.in_channels, widths[1], config.resampling, shortcut=False)
        stages: list[nn.Module] = []
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            layers = [make_block(config.blocks[stage], width, "rms") for _ in range(depth)]
            if depth > 0 and stage + 1 < len(widths):
                layers.append(Downsample(width, widths[stage + 1], config.resampling, shortcuts))
            stages.append(nn.Sequential(*layers))
        self.stages = nn.ModuleList(stages)
        latent_channels = config.latent_channels * (2 if config.gaussian else 1)
        self.project_out = EncoderOut(widths[-1], latent_channels, config.latent_shortcuts)

    def blocks(self) -> list[nn.Module]:
        return [layer for stage in self.stages for layer in stage.children()]

    def steps(self) -> list[nn.Module]:
        return [self.project_in, *self.blocks(), self.project_out]

    def init_weights(self) -> None:
        self.apply(init_module)


class Decoder(EncoderOrDecoder):
    """Maps latents [B, L, h, w] to images [B, C, H, W].

    `stages` are counted from full resolution, as in the official weights, and run backwards.
    """

    def __init__(self, config: DCAEConfig) -> None:
        super().__init__()
        widths, depths = config.widths, config.decoder_depths
        self.project_in = DecoderIn(config.latent_channels, widths[-1], config.latent_shortcuts)
        stages: list[nn.Module] = []
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            layers = [make_block(config.blocks[stage], width, config.decoder_norms[stage]) for _ in range(depth)]
            if depth > 0 and stage + 1 < len(widths):
                layers.insert(0, Upsample(widths[stage + 1], width, config.resampling, config.shortcuts))
            stages.append(nn.Sequential(*layers))
        self.stages = nn.ModuleList(stages)
        first = 0 if depths[0] > 0 else 1
        self.project_out = DecoderOut(
            widths[first], config.in_channels, 1 + first, config.resampling, config.output_act
        )

    def blocks(self) -> list[nn.Module]:
        return [layer for stage in reversed(self.stages) for layer in stage.children()]

    def steps(self) -> list[nn.Module]:
        return [self.project_in, *self.blocks(), self.project_out]

    def init_weights(self) -> None:
        self.apply(init_module)


def make_block(kind: str, width: int, norm: str) -> nn.Module:
    """One block of a stage of `width` channels; `kind` and `norm` are those of `DCAEConfig`."""
    if kind == "res":
        return ResBlock(width, norm)
    return EfficientViTBlock(width, MULTISCALE_KERNELS if kind == "multiscale" else ())


def dc_ae_flops(config: DCAEConfig, image_size: tuple[int, int], trained: Sequence[str]) -> float:
    """FLOPs of forward and backward for one image; see `training_flops`."""
    return training_flops(partial(DCAE, config), image_size, trained)
