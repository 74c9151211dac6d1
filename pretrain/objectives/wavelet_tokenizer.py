"""Training of LiteVAE (arXiv 2405.14477), whose encoder works on wavelet coefficients, by `TokenizerObjective`."""

from __future__ import annotations

from dataclasses import dataclass, field

from pretrain.models.lite_vae import LiteVAE, LiteVAEConfig
from pretrain.objectives.tokenizer import TokenizerConfig, TokenizerObjective


@dataclass(frozen=True)
class WaveletTokenizerConfig(TokenizerConfig):
    """As `TokenizerConfig`, with a wavelet encoder."""

    model: LiteVAEConfig = field(default_factory=LiteVAEConfig)  # type: ignore[assignment]
    """The autoencoder."""


def wavelet_tokenizer_objective(config: WaveletTokenizerConfig, seed: int) -> TokenizerObjective:
    return TokenizerObjective(config, seed, build=LiteVAE)
