"""ViTok: patches there and back, positions, one half against a literal loop; more in test_autoencoders."""

from __future__ import annotations

import pytest
import torch

from pretrain.models.positions import sincos_position_embedding
from pretrain.models.tokenizers.config import ViTAutoencoderConfig
from pretrain.models.tokenizers.vit_autoencoder import ViTAutoencoder

SIZES = {"encoder_width": 16, "encoder_depth": 1, "encoder_heads": 2}
TINY = {**SIZES, "patch_size": 4, "latent_channels": 6, "decoder_width": 24, "decoder_depth": 2, "decoder_heads": 2}


def make(**changes: object) -> ViTAutoencoder:
    torch.manual_seed(0)
    model = ViTAutoencoder(ViTAutoencoderConfig(**{**TINY, **changes}))
    model.init_weights()
    return model


def test_the_encoder_is_a_loop_over_patches() -> None:
    model, images = make(), torch.randn(1, 3, 8, 12)
    encoder = model.encoder
    weight = encoder.project_in.proj.weight
    tokens = torch.stack(
        [
            (weight * images[0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]).sum(dim=(1, 2, 3))
            for row in range(2)
            for column in range(3)
        ]
    )
    tokens = (tokens + encoder.project_in.proj.bias + sincos_position_embedding((2, 3), 16)[0, 1:])[None]
    tokens = encoder.layers[0].block(tokens)
    values = encoder.project_out.proj(encoder.project_out.norm(tokens))  # [1, 6, L]
    latent = model.encode(images)
    for place in range(6):
        torch.testing.assert_close(latent[0, :, place // 3, place % 3], values[0, place])


def test_the_decoder_lays_each_patch_where_its_latent_is() -> None:
    """Neither blocks nor positions: a patch's pixels depend on its own latent alone, channel by channel, row by row."""
    model = make(decoder_depth=1)
    head = model.decoder.project_out
    tokens = torch.randn(1, 2, 3, 24)
    picture = head(tokens)
    assert picture.shape == (1, 3, 8, 12)
    for row, column in ((0, 0), (1, 2)):
        patch = head.proj(head.norm(tokens[0, row, column])).view(3, 4, 4)
        torch.testing.assert_close(picture[0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4], patch)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_size": 0}, "patch_size 0"),
        ({"encoder_width": 18}, "encoder_width is 18 and encoder_heads is 2"),
        ({"decoder_heads": 5}, "decoder_width is 24 and decoder_heads is 5"),
    ],
)
def test_impossible_shapes_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViTAutoencoderConfig(**{**TINY, **fields})
