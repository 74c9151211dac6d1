"""`TokenizerObjective` around other autoencoders: a DC-AE with codes (SimVQ, FSQ), ViTok, and LiteVAE."""

from __future__ import annotations

from dataclasses import dataclass, field

from pretrain.models.tokenizers.lite_vae import LiteVAE, LiteVAEConfig
from pretrain.models.tokenizers.quantised_dc_ae import QuantisedDCAE, QuantisedDCAEConfig
from pretrain.models.tokenizers.vit_autoencoder import ViTAutoencoder, ViTAutoencoderConfig
from pretrain.objectives.tokenizer import TokenizerObjective
from pretrain.objectives.tokenizer_config import TokenizerConfig


@dataclass(frozen=True)
class QuantisedTokenizerConfig(TokenizerConfig):
    """As `TokenizerConfig`, with a codebook. What phase 3 freezes keeps its codes: train "head" or "decoder" there."""

    model: QuantisedDCAEConfig = field(default_factory=QuantisedDCAEConfig)  # type: ignore[assignment]
    """The autoencoder and its codebook."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prefix.step or self.equivariance.probability:
            raise ValueError(
                f"prefix.step is {self.prefix.step} and equivariance.probability {self.equivariance.probability}; "
                "expected 0 for both, as neither a part of a code nor a mixture of codes is one."
            )


def quantised_tokenizer_objective(config: QuantisedTokenizerConfig, seed: int) -> TokenizerObjective:
    """The objective around a DC-AE with a codebook; arguments as for `TokenizerObjective`."""
    return TokenizerObjective(config, seed, build=QuantisedDCAE)


@dataclass(frozen=True)
class ViTTokenizerConfig(TokenizerConfig):
    """As `TokenizerConfig`; the paper's second stage trains "decoder", with a discriminator."""

    model: ViTAutoencoderConfig = field(default_factory=ViTAutoencoderConfig)  # type: ignore[assignment]
    """The autoencoder."""


def vit_tokenizer_objective(config: ViTTokenizerConfig, seed: int) -> TokenizerObjective:
    """The objective around ViTok (arXiv 2501.09755); arguments as for `TokenizerObjective`."""
    return TokenizerObjective(config, seed, build=ViTAutoencoder)


@dataclass(frozen=True)
class WaveletTokenizerConfig(TokenizerConfig):
    """As `TokenizerConfig`, with a wavelet encoder."""

    model: LiteVAEConfig = field(default_factory=LiteVAEConfig)  # type: ignore[assignment]
    """The autoencoder."""


def wavelet_tokenizer_objective(config: WaveletTokenizerConfig, seed: int) -> TokenizerObjective:
    """The objective around LiteVAE (arXiv 2405.14477); arguments as for `TokenizerObjective`."""
    return TokenizerObjective(config, seed, build=LiteVAE)
