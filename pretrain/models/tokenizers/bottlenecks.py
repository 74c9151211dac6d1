"""What lies between an encoder and a decoder: the latent as it is, or drawn from a gaussian.

Enters: what an encoder gives. Leaves: the latent for the decoder, and what it costs in nats or in distance.
Quantised ones are in `pretrain/models/tokenizers/quantisers.py`.
Legend: B batch, L latent channels, h/w latent pixels, K codes of a codebook.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn

LOG_VARIANCE_RANGE = (-30.0, 20.0)


class Latent(NamedTuple):
    """A latent and its cost."""

    values: Tensor
    """[B, L, h, w]."""
    kl: Tensor | None = None
    """[B, L], float32: divergence from N(0, 1) in nats, summed over places; None where not gaussian."""
    commitment: Tensor | None = None
    """0-d, float32: loss that pulls the encoder's values and their codes together, weighted; None without a codebook
    that learns."""
    code_counts: Tensor | None = None
    """float32 [K]: how often each code occurs in this batch; None where not quantised."""


class Bottleneck(nn.Module, ABC):
    """Maps what the encoder gives to the latent."""

    @abstractmethod
    def forward(self, encoded: Tensor, noise: Tensor | None) -> Latent:
        """encoded: the encoder's output. noise: standard normal [B, L, h, w], where the latent is random in training;
        None takes its mean.
        """

    @abstractmethod
    def init_weights(self) -> None:
        """Fill all parameters and buffers with their starting values."""


class Direct(Bottleneck):
    """The encoder's output is the latent."""

    def forward(self, encoded: Tensor, noise: Tensor | None) -> Latent:
        return Latent(encoded)

    def init_weights(self) -> None:
        """There are none."""


class Gaussian(Bottleneck):
    """The encoder gives a mean and a log-variance for each latent value."""

    def forward(self, encoded: Tensor, noise: Tensor | None) -> Latent:
        """encoded: [B, 2 L, h, w], the means first."""
        mean, log_variance = encoded.float().chunk(2, dim=1)
        log_variance = log_variance.clamp(*LOG_VARIANCE_RANGE)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).flatten(2).sum(dim=2)
        latent = mean if noise is None else mean + (0.5 * log_variance).exp() * noise
        return Latent(latent.to(encoded.dtype), kl)

    def init_weights(self) -> None:
        """There are none."""


def direct_or_gaussian(gaussian: bool) -> Bottleneck:
    return Gaussian() if gaussian else Direct()
