"""What can be said of latents themselves: their statistics, and how much of the labels is linearly readable from them.

In: latents of an evaluation set; for the probe, a labelled training set too. Out: figures for the suite. It exists
because two tokenizers of equal PSNR can differ in how well a generative model learns on their latents: dead channels,
a low effective rank and latents without any content are seen here first.

Legend: B batch, L latent channels, h/w latent pixels, G side of the pooling grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipes.bounds import bounded
from pretrain.evaluation.encoder.linear import LEARNING_RATES, LinearConfig
from pretrain.evaluation.tokenizer.reconstruction_metrics import ReconstructionMeter
from pretrain.latents.statistics import LatentSums, effective_rank
from pretrain.models.tokenizers.autoencoder import Autoencoder


@dataclass(frozen=True)
class LatentStatisticsConfig:
    """Settings of `latent_statistics`, over all latent pixels of all pictures."""

    dead_below: float = bounded(0.01, least=0)
    """a channel is dead when its standard deviation is below this share of the largest channel's"""


class LatentMeter(ReconstructionMeter):
    """Adds up the latents and their products in float64.

    Its metrics are `latent_rms`, `scaling_factor` (1 / RMS), `dead_channels` (a count), `effective_rank` (1 to L) and
    `effective_rank_share` (of L).
    """

    def __init__(self, config: LatentStatisticsConfig, channels: int, device: torch.device) -> None:
        self.config = config
        self._count = 0
        self._total = torch.zeros(channels, dtype=torch.float64, device=device)
        self._products = torch.zeros(channels, channels, dtype=torch.float64, device=device)
        self._details: dict[str, object] = {}

    def update(self, pictures: Tensor, reconstructions: Tensor, latents: Tensor) -> None:
        values = latents.double().movedim(1, 0).flatten(1)  # [L, B * h * w]
        self._count += values.shape[1]
        self._total += values.sum(dim=1)
        self._products += values @ values.T

    def finish(self, gather: Callable[[Any], list[Any]]) -> dict[str, float]:
        parts = gather((self._count, self._total.cpu().numpy(), self._products.cpu().numpy()))
        count = sum(part[0] for part in parts)
        total, products = sum(part[1] for part in parts), sum(part[2] for part in parts)
        sums = LatentSums(count, tuple(total.tolist()), tuple(np.diag(products).tolist()))
        dead = sums.std < self.config.dead_below * sums.std.max()
        rank = effective_rank(products / count - np.outer(sums.mean, sums.mean))
        self._details = {
            **sums.describe(),
            "dead_channels": np.flatnonzero(dead).tolist(),
            "effective_rank_is": "exp of the entropy of the normalised singular values of the centred latents",
        }
        return {
            "latent_rms": sums.rms,
            "scaling_factor": sums.scaling_factor,
            "dead_channels": float(dead.sum()),
            "effective_rank": rank,
            "effective_rank_share": rank / len(total),
        }

    @property
    def details(self) -> dict[str, object]:
        return self._details


@dataclass(frozen=True)
class LatentProbeConfig:
    """Settings of `latent_linear`: the protocol of `encoder/linear.py` on latents averaged over a grid."""

    grid: int = bounded(4, least=1)
    """G: latents are averaged over G x G areas, whose values are joined"""
    learning_rates: tuple[float, ...] = bounded(LEARNING_RATES, above=0)
    """per 256 images: the step size is rate * batch / 256; held-out training images choose one"""
    iterations: int = bounded(12_500, least=1)
    """optimizer steps"""
    batch: int = bounded(1024, least=1)
    """training images per step"""
    standardize: bool = True
    """shift and scale every input to zero mean and unit variance over the training images"""
    held_out_fraction: float = bounded(0.1, least=0, below=1)
    """share of the training images that chooses the learning rate, in (0, 1)"""
    refit: bool = True
    """train again on all training images once the choice is made"""
    seed: int = bounded(0, least=0, most=2**53)
    """of the initial weights, the order of the images and the held-out choice"""

    def __post_init__(self) -> None:
        if self.grid < 1:
            raise ValueError(f"grid is {self.grid}; expected at least 1")

    def linear(self) -> LinearConfig:
        """The settings for `evaluate_linear`, with one input, the pooled latent."""
        shared = {name: getattr(self, name) for name in LatentProbeConfig.__dataclass_fields__ if name != "grid"}
        return LinearConfig(blocks=(1,), average_pool=(False,), **shared)


class PooledLatents(nn.Module):
    """A tokenizer as `features.extract` sees a backbone: its pooled latent stands for the only block's class token."""

    def __init__(self, model: Autoencoder, grid: int) -> None:
        super().__init__()
        self.model, self.grid = model, grid

    def features(self, images: Tensor, num_blocks: int) -> list[tuple[Tensor, Tensor]]:
        """The pooled latents of pictures.

        Args:
            images: normalised [B, C, H, W].
            num_blocks: always 1.

        Returns:
            One pair ([B, L * G * G], [B, 1, L * G * G]), which holds the same numbers twice.
        """
        pooled = F.adaptive_avg_pool2d(self.model.encode(images).float(), self.grid).flatten(1)
        return [(pooled, pooled[:, None])]
