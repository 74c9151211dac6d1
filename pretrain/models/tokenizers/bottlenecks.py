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
"""To which a log-variance is clamped, as in latent diffusion's autoencoder (arXiv 2112.10752)."""


class Latent(NamedTuple):
    """A latent and its cost."""

    values: Tensor
    """[B, L, h, w], what the decoder gets."""
    kl: Tensor | None = None
    """float32 [B, L]: divergence from N(0, 1) in nats, summed over places; None where the latent is not gaussian."""
    commitment: Tensor | None = None
    """0-d float32: loss that pulls the encoder's values and their codes together, weighted; None without a codebook
    that learns."""
    code_counts: Tensor | None = None
    """float32 [K]: how often each code occurs in this batch; None where the latent is not quantised."""


class Bottleneck(nn.Module, ABC):
    """Maps what the encoder gives to the latent."""

    @abstractmethod
    def forward(self, encoded: Tensor, noise: Tensor | None) -> Latent:
        """Makes the latent.

        Args:
            encoded: the encoder's output, [B, L, h, w], or as many channels as the bottleneck asks for.
            noise: standard normal [B, L, h, w], where the latent is random in training; None takes its mean.
        """

    @abstractmethod
    def init_weights(self) -> None:
        """Fills all parameters and buffers with their starting values."""


class Direct(Bottleneck):
    """The encoder's output is the latent."""

    def forward(self, encoded: Tensor, noise: Tensor | None) -> Latent:
        return Latent(encoded)

    def init_weights(self) -> None:
        """There are none."""


class Gaussian(Bottleneck):
    """The encoder gives a mean and a log-variance for each latent value."""

    def forward(self, encoded: Tensor, noise: Tensor | None) -> Latent:
        """Draws the latent (Kingma and Welling, arXiv 1312.6114, section 2.4; the divergence is its appendix B).

        Args:
            encoded: [B, 2 L, h, w], the means first, then the log-variances.
            noise: standard normal [B, L, h, w]; None takes the means.
        """
        mean, log_variance = encoded.float().chunk(2, dim=1)
        log_variance = log_variance.clamp(*LOG_VARIANCE_RANGE)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).flatten(2).sum(dim=2)
        latent = mean if noise is None else mean + (0.5 * log_variance).exp() * noise
        return Latent(latent.to(encoded.dtype), kl)

    def init_weights(self) -> None:
        """There are none."""


def direct_or_gaussian(gaussian: bool) -> Bottleneck:
    """The bottleneck of an autoencoder without a codebook."""
    return Gaussian() if gaussian else Direct()
