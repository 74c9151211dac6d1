"""`TokenizerObjective` around other autoencoders: a DC-AE with codes (SimVQ, FSQ), ViTok, and LiteVAE."""

from __future__ import annotations

from pretrain.models.tokenizers.lite_vae import LiteVAE
from pretrain.models.tokenizers.quantised_dc_ae import QuantisedDCAE
from pretrain.models.tokenizers.vit_autoencoder import ViTAutoencoder
from pretrain.objectives.tokenizer import TokenizerObjective
from pretrain.objectives.tokenizer_config import (
    QuantisedTokenizerConfig,
    ViTTokenizerConfig,
    WaveletTokenizerConfig,
)


def quantised_tokenizer_objective(config: QuantisedTokenizerConfig, seed: int) -> TokenizerObjective:
    """The objective around a DC-AE with a codebook; arguments as for `TokenizerObjective`."""
    return TokenizerObjective(config, seed, build=QuantisedDCAE)


def vit_tokenizer_objective(config: ViTTokenizerConfig, seed: int) -> TokenizerObjective:
    """The objective around ViTok (arXiv 2501.09755); arguments as for `TokenizerObjective`."""
    return TokenizerObjective(config, seed, build=ViTAutoencoder)


def wavelet_tokenizer_objective(config: WaveletTokenizerConfig, seed: int) -> TokenizerObjective:
    """The objective around LiteVAE (arXiv 2405.14477); arguments as for `TokenizerObjective`."""
    return TokenizerObjective(config, seed, build=LiteVAE)
