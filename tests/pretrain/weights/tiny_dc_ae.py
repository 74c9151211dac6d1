"""DC-AEs of three small stages, one for everything that can differ between two of them."""

from __future__ import annotations

import torch

from pretrain.models.tokenizers.dc_ae import DCAE
from pretrain.models.tokenizers.dc_ae_config import DCAEConfig
from pretrain.weights.backbone import weights_digest
from pretrain.weights.tokenizer import LoadedTokenizer


def tiny(**changes: object) -> DCAEConfig:
    """One block per stage, factor 4, 8 latent channels."""
    fields: dict[str, object] = {
        "latent_channels": 8,
        "widths": (16, 32, 64),
        "encoder_depths": (1, 1, 2),
        "decoder_depths": (1, 2, 1),
        "blocks": ("res", "res", "res"),
        "decoder_norms": ("rms", "rms", "rms"),
    }
    return DCAEConfig(**{**fields, **changes})


KINDS = {
    "residual": tiny(),
    "batch-norm": tiny(decoder_norms=("batch", "batch", "rms")),
    "attention": tiny(blocks=("res", "attention", "attention")),
    "multiscale": tiny(blocks=("res", "res", "multiscale")),
    "no-first-stage": tiny(encoder_depths=(0, 1, 1), decoder_depths=(0, 1, 1)),
    "interpolate": tiny(resampling="interpolate", blocks=("res", "res", "attention")),
    "interpolate-no-first-stage": tiny(resampling="interpolate", encoder_depths=(0, 1, 1), decoder_depths=(0, 1, 1)),
    "no-latent-shortcuts": tiny(latent_shortcuts=False, output_act="silu"),
    "one-channel": tiny(in_channels=1),
}


def make_model(config: DCAEConfig, seed: int = 0) -> DCAE:
    """With random numbers everywhere, also where training starts at 0 or 1, so that a swapped tensor shows."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = DCAE(config)
        for name, tensor in model.state_dict().items():
            if tensor.ndim == 1:
                noise = 0.1 * torch.randn(tensor.shape)
                tensor.add_(noise.abs() if name.endswith("running_var") else noise)
    return model.eval()


def make_tokenizer(config: DCAEConfig) -> LoadedTokenizer:
    """For pixels in [-1, 1]."""
    model, half = make_model(config), (0.5,) * config.in_channels
    return LoadedTokenizer(model, half, half, "random", "random", weights_digest(model.state_dict()))
