"""Statistics of latents, per channel, over any number of pictures of any size.

Enters: latents as they are stored. Leaves: mean, standard deviation, and the scaling factor that a diffusion model
multiplies latents with. Why it exists: sums in float64 can be kept per shard and added in the shards' order, so that
neither an interruption nor the number of processes changes a digit.
Legend: L latent channels, n latent pixels over all pictures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class LatentSums:
    """What is kept of n latent pixels."""

    count: int
    """n"""
    total: tuple[float, ...]
    """[L], sum over the pixels"""
    square_total: tuple[float, ...]
    """[L], sum of the squares"""

    @staticmethod
    def of(latent: Tensor) -> LatentSums:
        """The sums of one latent [L, h, w] on the CPU, of any float type."""
        values = latent.to(torch.float64).flatten(1).numpy()
        # numpy's sums do not depend on the number of threads, torch's may
        return LatentSums(
            values.shape[1], tuple(values.sum(axis=1).tolist()), tuple(np.square(values).sum(axis=1).tolist())
        )

    def __add__(self, other: LatentSums) -> LatentSums:
        return LatentSums(
            self.count + other.count,
            tuple(a + b for a, b in zip(self.total, other.total, strict=True)),
            tuple(a + b for a, b in zip(self.square_total, other.square_total, strict=True)),
        )

    @property
    def mean(self) -> NDArray[np.float64]:
        """Of each channel, [L]."""
        return np.asarray(self.total) / self.count

    @property
    def std(self) -> NDArray[np.float64]:
        """Standard deviation of each channel around its own mean, [L]; divided by n."""
        return np.sqrt(np.maximum(np.asarray(self.square_total) / self.count - self.mean**2, 0.0))

    @property
    def rms(self) -> float:
        """Root mean square of all values of all channels."""
        return math.sqrt(sum(self.square_total) / (self.count * len(self.square_total)))

    @property
    def scaling_factor(self) -> float:
        """1 / RMS, as DC-AE's authors scale latents (no shift). 1 where all latents are 0."""
        return 1.0 / self.rms if self.rms > 0.0 else 1.0

    def describe(self) -> dict[str, Any]:
        """What a manifest says of the latents, ready for JSON."""
        return {
            "num_latent_pixels": self.count,
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "rms": self.rms,
            "scaling_factor": self.scaling_factor,
        }


def zero_sums(channels: int) -> LatentSums:
    """The sums over no pictures."""
    return LatentSums(0, (0.0,) * channels, (0.0,) * channels)


def effective_rank(covariance: NDArray[np.float64]) -> float:
    """exp(entropy of the normalised singular values) of centred latents (Roy and Vetterli 2007), from 1 to L.

    Args:
        covariance: [L, L] of the channels; its eigenvalues are the squares of those singular values, up to a factor.
    """
    singular = np.sqrt(np.maximum(np.linalg.eigvalsh(covariance), 0.0))
    share = singular / max(float(singular.sum()), np.finfo(np.float64).tiny)
    return float(np.exp(-(share * np.log(np.maximum(share, np.finfo(np.float64).tiny))).sum()))
