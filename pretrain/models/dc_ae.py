"""Deep compression autoencoder (DC-AE, arXiv 2410.10733): images to latents of 1/32 to 1/128 of their side, and back.

Enters: normalised images of any size. Leaves: reconstructions of the same size, and latents.
Parameter names are stable: encoder.{project_in,stages.<stage>.<block>,project_out} and the decoder's likewise, both
with stages counted from full resolution; pretrain/export/dc_ae_names.py maps them to other layouts.
Legend: B batch, C image channels, L latent channels, H/W pixels, h/w latent pixels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.dc_ae_blocks import (
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
from pretrain.models.dc_ae_config import DCAEConfig
from pretrain.models.linear_attention import LiteMLA, attention_flops
from pretrain.models.norms import BatchNorm, commit_statistics

MULTISCALE_KERNELS = (5,)
LOG_VARIANCE_RANGE = (-30.0, 20.0)


class DCAEOutput(NamedTuple):
    """What a forward pass gives."""

    reconstruction: Tensor
    """[B, C, H, W], on the scale of the images."""
    latent: Tensor
    """[B, L, h, w], as the decoder got it."""
    kl: Tensor | None
    """[B]: divergence from N(0, 1) in nats, summed over a sample's latent values; None where not gaussian."""


class DCAE(nn.Module):
    """Encoder and decoder. `forward` is what training calls; `encode` and `decode` are for using the result."""

    def __init__(self, config: DCAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.num_frozen_steps = 0
        """How many of `steps()` run without gradients; see `train_only`."""

    def forward(self, images: Tensor, noise: Tensor | None = None) -> DCAEOutput:
        """images: float [B, C, H, W]. noise: standard normal [B, L, h, w], for a gaussian latent; None takes its mean.

        The sides need not be multiples of the factor: images are padded on the right and at the bottom.
        """
        encoded = self._run(self.encoder.steps(), pad_to_multiple(images, self.config.factor), 0)
        latent, kl = self._sample(encoded, noise)
        decoded = self._run(self.decoder.steps(), latent, len(self.encoder.steps()))
        if self.training:
            commit_statistics(module for module in self.decoder.modules() if isinstance(module, BatchNorm))
        return DCAEOutput(decoded[..., : images.shape[2], : images.shape[3]], latent, kl)

    def encode(self, images: Tensor) -> Tensor:
        """images: float [B, C, H, W], any size. Returns unscaled latents [B, L, ceil(H / factor), ceil(W / factor)]."""
        encoded = self._run(self.encoder.steps(), pad_to_multiple(images, self.config.factor), 0)
        return self._sample(encoded, None)[0]

    def decode(self, latent: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """latent: [B, L, h, w], unscaled. size: height and width to crop to; None keeps h * factor, w * factor."""
        decoded = self._run(self.decoder.steps(), latent, len(self.encoder.steps()))
        return decoded if size is None else decoded[..., : size[0], : size[1]]

    def steps(self) -> list[nn.Module]:
        """Everything that a forward pass calls one after the other."""
        return [*self.encoder.steps(), *self.decoder.steps()]

    def blocks(self) -> list[nn.Module]:
        """The units that are compiled, checkpointed and sharded one by one, in forward order."""
        return [*self.encoder.blocks(), *self.decoder.blocks()]

    def train_only(self, patterns: Sequence[str]) -> None:
        """Trains the parameters whose full name matches one of the regular expressions, and freezes all others.

        Steps before the first trained one run without gradients from now on; batch norms that are not trained keep
        their statistics. Raises ValueError for a pattern that matches no parameter.
        """
        names = [name for name, _ in self.named_parameters()]
        for pattern in patterns:
            if not any(re.fullmatch(pattern, name) for name in names):
                raise ValueError(
                    f"No parameter of the autoencoder has a name that {pattern!r} matches from start to end; the names "
                    f"look like {names[0]!r} and {names[-1]!r}."
                )
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(any(re.fullmatch(pattern, name) for pattern in patterns))
        for module in self.modules():
            if isinstance(module, BatchNorm):
                module.frozen = not module.weight.requires_grad
        trained = [any(p.requires_grad for p in step.parameters()) for step in self.steps()]
        self.num_frozen_steps = trained.index(True) if any(trained) else len(trained)

    def init_weights(self) -> None:
        """Fill all parameters and buffers with their starting values."""
        self.apply(init_module)

    def _run(self, steps: list[nn.Module], x: Tensor, first: int) -> Tensor:
        """Calls the steps; `first` is the number of the first of them in `steps()`."""
        x = x.contiguous(memory_format=torch.channels_last)
        for number, step in enumerate(steps, first):
            if number < self.num_frozen_steps:
                with torch.no_grad():
                    x = step(x)
            else:
                x = step(x)
        return x

    def _sample(self, encoded: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Latent and divergence from what the encoder gave."""
        if not self.config.gaussian:
            return encoded, None
        mean, log_variance = encoded.float().chunk(2, dim=1)
        log_variance = log_variance.clamp(*LOG_VARIANCE_RANGE)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).flatten(1).sum(dim=1)
        latent = mean if noise is None else mean + (0.5 * log_variance).exp() * noise
        return latent.to(encoded.dtype), kl


class Encoder(nn.Module):
    """Image -> latent (or its mean and log-variance)."""

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


class Decoder(nn.Module):
    """Latent -> image. `stages` are counted from full resolution, as in the official weights, and run backwards."""

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


def make_block(kind: str, width: int, norm: str) -> nn.Module:
    """One block of a stage."""
    if kind == "res":
        return ResBlock(width, norm)
    return EfficientViTBlock(width, MULTISCALE_KERNELS if kind == "multiscale" else ())


def pad_to_multiple(images: Tensor, factor: int) -> Tensor:
    """Repeats the last row and column until both sides are multiples of `factor`."""
    down, right = -images.shape[2] % factor, -images.shape[3] % factor
    return F.pad(images, (0, right, 0, down), mode="replicate") if down or right else images


@torch.no_grad()
def dc_ae_flops(config: DCAEConfig, image_size: tuple[int, int], trained: Sequence[str]) -> float:
    """FLOPs of forward and backward for one image of which `trained` (see `train_only`) is trained.

    Counts convolutions and matrix products. The backward pass costs as much as the forward pass for the gradients of a
    step's input, from the first trained step on, and again for those of its weights, where they are trained.
    """
    with torch.device("meta"):
        model = DCAE(config).eval()
        x = torch.empty(1, config.in_channels, *image_size)
    model.train_only(trained)
    x = pad_to_multiple(x, config.factor)
    total = 0.0
    for number, step in enumerate(model.steps()):
        passes = 1 + (number >= model.num_frozen_steps) + any(p.requires_grad for p in step.parameters())
        counted: list[float] = []
        for module in step.modules():
            if isinstance(module, (nn.Conv2d, LiteMLA)):
                module.register_forward_hook(lambda layer, _, out, counts=counted: counts.append(_flops(layer, out)))
        x = step(x)
        total += passes * sum(counted)
        if step is model.encoder.project_out:
            x = x[:, : config.latent_channels]
    return total


def _flops(layer: nn.Module, out: Tensor) -> float:
    """Of one layer's own products; `out` is one sample."""
    tokens = out.shape[2] * out.shape[3]
    if isinstance(layer, LiteMLA):
        return attention_flops(layer.proj.in_channels, tokens)
    assert isinstance(layer, nn.Conv2d)
    return 2.0 * layer.weight.numel() * tokens
