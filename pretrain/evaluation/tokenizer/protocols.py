"""The protocols that a tokenizer's suite can name. Adding one: its meter, a line in the table here, a YAML, a test.

Outside of this package, a `TokenizerProtocol` in any module does: a suite names it by its import path,
`my_package.my_module:PROTOCOL`, or by an entry point of the group `tessera.protocols`.

In: settings, and what is measured. Out: a meter that sees every picture beside its reconstruction and its latents.
Legend: B batch, C channels, H/W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain.evaluation.tokenizer.latent_metrics import LatentMeter, LatentProbeConfig, LatentStatisticsConfig
from pretrain.evaluation.tokenizer.reconstruction_metrics import (
    FrechetMeter,
    LPIPSConfig,
    PSNRConfig,
    ReconstructionMeter,
    RFIDConfig,
    SSIMConfig,
    load_inception,
    make_lpips,
    make_psnr,
    make_ssim,
)
from pretrain.weights.tokenizer import LoadedTokenizer


@dataclass(frozen=True)
class Measured:
    """What a meter will be shown."""

    tokenizer: LoadedTokenizer
    """what encodes and decodes"""
    size: tuple[int, int]
    """height and width of the pictures, in pixels"""
    show: Callable[[Tensor], Tensor]
    """pictures [B, C, H, W] -> red, green and blue [B, 3, H, W]"""
    device: torch.device
    """where the pictures are"""


@dataclass(frozen=True)
class TokenizerProtocol:
    """One entry of the table, or somebody's own."""

    config: type[Any]
    """dataclass of its settings"""
    make: Callable[[Any, Measured], ReconstructionMeter] | None
    """(settings, what is measured) -> meter; None: the probe on the latents of labelled pictures"""


PROTOCOLS: dict[str, TokenizerProtocol] = {
    "psnr_uint8": TokenizerProtocol(PSNRConfig, lambda settings, on: make_psnr()),
    "ssim_uint8": TokenizerProtocol(SSIMConfig, lambda settings, on: make_ssim(on.size)),
    "lpips": TokenizerProtocol(LPIPSConfig, lambda settings, on: make_lpips(settings, on.size, on.show, on.device)),
    "rfid_inception": TokenizerProtocol(
        RFIDConfig, lambda settings, on: FrechetMeter(load_inception(settings), on.show, on.device)
    ),
    "latent_statistics": TokenizerProtocol(
        LatentStatisticsConfig,
        lambda settings, on: LatentMeter(settings, on.tokenizer.model.config.latent_channels, on.device),
    ),
    "latent_linear": TokenizerProtocol(LatentProbeConfig, None),
}
"""Name in `tasks.<task>.protocol` -> entry."""
