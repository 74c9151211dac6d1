"""Which views of the latent a tokenizer is trained with: channel prefixes (DC-AE 1.5), scaled and turned (EQ-VAE).

Enters: the step and the samples' global positions. Leaves: a `LatentView` for the decoder. Everything is a hash of
(seed, step) or (seed, position), so that a resume, the number of ranks and micro-batches change nothing.
Legend: B batch, L latent channels, H/W pixels, h/w latent pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.models.masking import position_noise
from pretrain.models.tokenizers.latent_view import LatentView
from pretrain.objectives.tokenizer_config import ChannelPrefixConfig, EquivarianceConfig

_PREFIX_SEED = 0x51CE
"""Keeps the draws of prefixes apart from those of transforms and of a gaussian's noise, which uses the seed itself."""
_EQUIVARIANCE_SEED = 0xE9
"""Keeps the draws of transforms apart from those of prefixes and of a gaussian's noise."""


def draw_prefix(config: ChannelPrefixConfig, positions: Tensor, latent_channels: int, seed: int) -> Tensor | None:
    """How many channels each sample keeps in this step.

    Args:
        config: says which counts there are.
        positions: int64 [B], global sample positions.
        latent_channels: channels of the latent.
        seed: of the run.

    Returns:
        int64 [B], on the same device; None where all samples keep all channels.
    """
    num_counts = len(config.counts(latent_channels))
    if not num_counts:
        return None
    number = (position_noise(positions, 1, seed ^ _PREFIX_SEED)[:, 0] * num_counts).long()
    if config.always_min_max:
        place = positions % 4
        number = torch.where(place == 0, 0, torch.where(place == 1, num_counts - 1, number))
    return ((number + 1) * config.step).clamp(max=latent_channels)


def draw_transform(config: EquivarianceConfig, step: int, latent_size: tuple[int, int], seed: int) -> LatentView:
    """The transform of an optimizer step, drawn without reading from a device.

    Args:
        config: how often, and how far latents shrink.
        step: optimizer steps done so far.
        latent_size: h, w of the latent.
        seed: of the run.
    """
    if config.probability == 0.0:
        return LatentView()
    applies, size, turns = position_noise(torch.tensor([step]), 3, seed ^ _EQUIVARIANCE_SEED)[0].tolist()
    if applies >= config.probability:
        return LatentView()
    sizes = config.sizes(latent_size)
    drawn = sizes[int(size * len(sizes))]
    return LatentView(size=None if drawn == latent_size else drawn, quarter_turns=int(turns * 4))
