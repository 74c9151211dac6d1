"""Training of ViTok (arXiv 2501.09755), an autoencoder of vision transformers, by `TokenizerObjective`."""

from __future__ import annotations

from dataclasses import dataclass, field

from pretrain.models.vit_autoencoder import ViTAutoencoder, ViTAutoencoderConfig
from pretrain.objectives.tokenizer import TokenizerConfig, TokenizerObjective


@dataclass(frozen=True)
class ViTTokenizerConfig(TokenizerConfig):
    """As `TokenizerConfig`; the paper's second stage trains "decoder", with a discriminator."""

    model: ViTAutoencoderConfig = field(default_factory=ViTAutoencoderConfig)  # type: ignore[assignment]
    """The autoencoder."""


def vit_tokenizer_objective(config: ViTTokenizerConfig, seed: int) -> TokenizerObjective:
    return TokenizerObjective(config, seed, build=ViTAutoencoder)
