"""The masked autoencoder: targets and loss against loops, placement of tokens, precision, compilation, FLOPs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from pretrain.losses.pixels import masked_patch_loss, normalise_patches, patchify, unpatchify
from pretrain.models.config import MAEConfig, ViTConfig, vit_config
from pretrain.models.mae import MAE, mae_flops
from pretrain.models.masking import position_noise, random_masking
from pretrain.models.positions import sincos_position_embedding

ENCODER = ViTConfig(image_size=(24, 40), patch_size=(8, 4), in_channels=2, width=48, depth=2, heads=4)
CONFIG = MAEConfig(ENCODER, decoder_width=32, decoder_depth=2, decoder_heads=4)


def make(batch_size: int = 3, **fields: object) -> tuple[MAE, Tensor, Tensor]:
    torch.manual_seed(0)
    model = MAE(MAEConfig(ENCODER, decoder_width=32, decoder_depth=2, decoder_heads=4, **fields))
    return model, torch.randn(batch_size, 2, 24, 40), position_noise(torch.arange(batch_size), 30, 0)


def literal_patches(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """[B, N, p*q*C], one value at a time."""
    height, width = images.shape[2] // patch_size[0], images.shape[3] // patch_size[1]
    patches = torch.empty(len(images), height * width, patch_size[0] * patch_size[1] * images.shape[1])
    for row in range(height):
        for column in range(width):
            values = [
                images[:, c, row * patch_size[0] + p, column * patch_size[1] + q]
                for p in range(patch_size[0])
                for q in range(patch_size[1])
                for c in range(images.shape[1])
            ]
            patches[:, row * width + column] = torch.stack(values, dim=1)
    return patches


def test_patchify_equals_a_loop_and_unpatchify_undoes_it() -> None:
    images = torch.randn(2, 2, 24, 40)
    patches = patchify(images, (8, 4))
    assert torch.equal(patches, literal_patches(images, (8, 4)))
    assert torch.equal(unpatchify(patches, (3, 10), (8, 4)), images)


@pytest.mark.parametrize("norm_pixels", [True, False])
def test_loss_equals_a_loop_over_hidden_patches(norm_pixels: bool) -> None:
    model, images, noise = make(norm_pixels=norm_pixels)
    loss, prediction, mask = model(images, noise)
    losses = []
    for sample in range(3):
        for token, target in enumerate(literal_patches(images, (8, 4))[sample]):
            if mask[sample, token]:
                if norm_pixels:
                    centred = target - target.sum() / len(target)
                    target = centred / (centred.square().sum() / (len(target) - 1) + 1e-6).sqrt()
                losses.append((prediction[sample, token] - target).square().sum() / len(target))
    assert len(losses) == 3 * 23
    torch.testing.assert_close(loss, torch.stack(losses).sum() / len(losses))


def test_prediction_depends_on_visible_patches_alone() -> None:
    model, images, noise = make()
    _, prediction, mask = model(images, noise)
    hidden = unpatchify(mask[..., None].expand(-1, -1, 64).float(), (3, 10), (8, 4)).bool()
    torch.testing.assert_close(model(images + hidden * 9.0, noise).prediction, prediction, rtol=0, atol=0)
    assert not torch.allclose(model(images + ~hidden * 1.0, noise).prediction, prediction)


def test_tokens_are_placed_where_they_came_from() -> None:
    model, _, noise = make()
    keep_ids, _, mask = random_masking(noise, 0.75)
    tokens = torch.randn(3, 8, 32, requires_grad=True)
    placed = model.decoder.place(tokens, keep_ids)
    for sample in range(3):
        assert torch.equal(placed[sample, 0], tokens[sample, 0])
        for rank, token in enumerate(keep_ids[sample].tolist()):
            assert torch.equal(placed[sample, 1 + token], tokens[sample, 1 + rank])
        assert (placed[sample, 1:][mask[sample]] == model.decoder.mask_token[0]).all()
    placed.sum().backward()
    assert (tokens.grad == 1).all()
    assert (model.decoder.mask_token.grad == mask.sum()).all()


def test_a_flat_patch_has_a_finite_target() -> None:
    target = normalise_patches(torch.full((1, 2, 8), 3.0))
    assert (target == 0).all()
    assert masked_patch_loss(torch.ones(1, 2, 8), target, torch.tensor([[True, False]])) == 1


def test_gradients_reach_every_parameter_and_nothing_else() -> None:
    model, images, noise = make()
    model(images, noise).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_autocast_keeps_the_loss_and_the_target_in_float32() -> None:
    model, images, noise = make()
    with torch.autocast("cpu", torch.bfloat16):
        loss, prediction, mask = model(images, noise)
        target = model.target(images)
    assert loss.dtype == target.dtype == torch.float32
    assert prediction.dtype == torch.bfloat16
    assert torch.equal(target, model.target(images))
    exact = masked_patch_loss(prediction.double(), target.double(), mask)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(loss, model(images, noise).loss, rtol=0.02, atol=0)


def test_weights_in_bfloat16_take_float32_images() -> None:
    model, images, noise = make()
    loss = model.bfloat16()(images, noise).loss
    assert loss.dtype == torch.float32
    assert loss.isfinite()


def test_inputs_of_low_precision_or_wrong_shape_are_refused() -> None:
    model, images, noise = make()
    with pytest.raises(ValueError, match=r"images are torch\.bfloat16.*cast_forward_inputs"):
        model(images.bfloat16(), noise)
    with pytest.raises(ValueError, match=r"noise is torch\.bfloat16.*cast_forward_inputs"):
        model(images, noise.bfloat16())
    with pytest.raises(ValueError, match=r"shape \[3, 29\]; expected \[3, 30\]"):
        model(images, noise[:, 1:])


@pytest.mark.slow
def test_compiled_blocks_and_checkpointing_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, noise = make()
    expected = torch.autograd.grad(model(images, noise).loss, list(model.parameters()))
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(whole(images, noise).loss, list(model.parameters()))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)
    for block in (*model.encoder.blocks, *model.decoder.blocks):
        forward = block.forward
        monkeypatch.setattr(block, "forward", lambda x, forward=forward: checkpoint(forward, x, use_reentrant=False))
    actual = torch.autograd.grad(model(images, noise).loss, list(model.parameters()))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_the_decoder_starts_as_in_the_paper() -> None:
    torch.manual_seed(0)
    decoder = MAE(MAEConfig(ENCODER, decoder_width=512, decoder_depth=1)).decoder
    assert 0.018 < decoder.mask_token.std() < 0.022
    assert torch.equal(decoder.pos_embed, sincos_position_embedding((3, 10), 512))
    bound = (6 / (48 + 512)) ** 0.5
    assert 0.98 * bound < decoder.embed.weight.abs().max() <= bound
    assert (decoder.pred.bias == 0).all()


@pytest.mark.parametrize(
    "config",
    [CONFIG, MAEConfig(vit_config("small", 96), 192, 3, 6)],
    ids=["not-square", "small"],
)
def test_flops_are_those_counted(config: MAEConfig) -> None:
    model = MAE(config)
    noise = torch.rand(2, config.encoder.num_patches)
    images = torch.randn(2, config.encoder.in_channels, *config.encoder.image_size)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # plain products, none recomputed
        model(images, noise).loss.backward()
    # The images need no gradient: the patch projection has two products where the formula counts three.
    unneeded = 2 * config.num_kept * config.encoder.patch_values * config.encoder.width
    assert counter.get_total_flops() / 2 == mae_flops(config) - unneeded
    assert unneeded < 0.03 * mae_flops(config)


def test_the_papers_models_cost_what_is_known() -> None:
    # Forward and backward of MAE-L at 224: three times about 2 x (303 M x 50 + 26 M x 197) and attention.
    assert 1.2e11 < mae_flops(MAEConfig(vit_config("large"))) < 1.3e11


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask_ratio": 0.0}, "hides none of the 30 patches"),
        ({"mask_ratio": 0.99}, "leaves"),
        ({"decoder_width": 30}, "multiple of decoder_heads and of 4"),
        ({"decoder_depth": 0}, "decoder_depth is 0"),
    ],
)
def test_impossible_autoencoders_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MAEConfig(ENCODER, **{"decoder_heads": 2, **fields})
