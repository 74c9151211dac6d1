"""ViTok: patches there and back, any size, positions, one half against a literal loop, cost."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain.models.positions import sincos_position_embedding
from pretrain.models.tokenizers.autoencoder_flops import training_flops
from pretrain.models.tokenizers.vit_autoencoder import ViTAutoencoder, ViTAutoencoderConfig

SIZES = {"encoder_width": 16, "encoder_depth": 1, "encoder_heads": 2}
TINY = {**SIZES, "patch_size": 4, "latent_channels": 6, "decoder_width": 24, "decoder_depth": 2, "decoder_heads": 2}


def make(**changes: object) -> ViTAutoencoder:
    torch.manual_seed(0)
    model = ViTAutoencoder(ViTAutoencoderConfig(**{**TINY, **changes}))
    model.init_weights()
    return model


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("size", [(1, 1), (12, 20), (13, 18)])
def test_any_size_and_number_of_channels(channels: int, size: tuple[int, int]) -> None:
    model, images = make(in_channels=channels), torch.randn(2, channels, *size)
    output = model(images)
    assert output.reconstruction.shape == images.shape
    assert output.latent.shape == (2, 6, -(-size[0] // 4), -(-size[1] // 4))
    torch.testing.assert_close(model.decode(model.encode(images), size), output.reconstruction)


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


def test_gradients_reach_every_parameter_and_stop_at_frozen_steps() -> None:
    model, images = make(gaussian=True), torch.randn(2, 3, 8, 8)
    output = model(images, torch.randn(2, 6, 2, 2))
    (output.reconstruction.square().mean() + output.kl.mean()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    model.zero_grad()
    model.train_only([r"decoder\..*"])
    assert model.num_frozen_steps == len(model.encoder.steps()) == 3
    output = model(images)
    assert not output.latent.requires_grad
    output.reconstruction.square().mean().backward()
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None} == {"decoder"}


def test_a_start_from_meta_follows_the_seed_alone() -> None:
    expected = make()
    with torch.device("meta"):
        other = ViTAutoencoder(ViTAutoencoderConfig(**TINY))
    other.to_empty(device="cpu")
    for parameter in other.parameters():
        parameter.detach().fill_(float("nan"))
    for model in (expected, other):
        torch.manual_seed(1)
        model.init_weights()
    images = torch.randn(1, 3, 8, 8)
    assert torch.equal(expected(images).reconstruction, other(images).reconstruction)
    assert len(other.blocks()) == 3


def test_flops_are_those_counted() -> None:
    model = make()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, 3, 12, 16))
    build = partial(ViTAutoencoder, model.config)
    assert training_flops(build, (12, 16), [".*"]) == 3 * counter.get_total_flops()


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
