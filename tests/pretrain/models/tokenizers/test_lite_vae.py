"""LiteVAE: the Haar transform against its definition, levels, impossible shapes; more in test_autoencoders."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pretrain.models.tokenizers.config import LiteVAEConfig
from pretrain.models.tokenizers.lite_vae import LiteVAE, haar

TINY = {
    "latent_channels": 4,
    "level_width": 6,
    "level_depth": 1,
    "width": 8,
    "depth": 1,
    "decoder_widths": (8, 16, 16, 32),
    "decoder_depths": (0, 1, 1, 1),
    "decoder_blocks": ("res", "res", "res", "attention"),
}


def make(**changes: object) -> LiteVAE:
    torch.manual_seed(0)
    return LiteVAE(LiteVAEConfig(**{**TINY, **changes}))


def test_haar_is_a_product_with_its_matrix() -> None:
    """Averages and differences of neighbours, over sqrt(2), along both axes."""
    x = torch.randn(2, 3, 4, 6)
    low, high = ([np.kron(np.eye(size // 2), [[1, sign]]) / 2**0.5 for size in (4, 6)] for sign in (1, -1))
    bands = [(low[0], low[1]), (low[0], high[1]), (high[0], low[1]), (high[0], high[1])]
    expected = [torch.from_numpy(rows).float() @ x @ torch.from_numpy(columns).float().T for rows, columns in bands]
    actual = haar(x)
    torch.testing.assert_close(actual, torch.cat(expected, dim=1))
    torch.testing.assert_close(actual.square().sum(), x.square().sum())


def test_networks_see_every_level_on_the_scale_of_the_image() -> None:
    model = make()
    seen: list[torch.Tensor] = []
    for network in model.encoder.project_in.levels:
        network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.randn(1, 3, 32, 24)
    joined = model.encoder.project_in(images)
    assert [x.shape[2:] for x in seen] == [(16, 12), (8, 6), (4, 3)]
    assert joined.shape == (1, 8, 4, 3)
    for level, coefficients in enumerate(seen, 1):
        means = torch.nn.functional.avg_pool2d(images, 2**level)
        torch.testing.assert_close(coefficients[:, :3], means)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"level_width": 0}, "level_width is 0"),
        ({"depth": 0}, "depth 0"),
        ({"decoder_depths": (1, 1)}, "decoder of this LiteVAE cannot be built: decoder_depths has 2 values"),
    ],
)
def test_impossible_shapes_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LiteVAEConfig(**{**TINY, **fields})
