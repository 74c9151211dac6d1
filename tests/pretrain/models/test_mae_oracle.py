"""Our masked autoencoder against transformers' `ViTMAEForPreTraining`, with its weights and the same mask noise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pretrain.models.config import MAEConfig, ViTConfig
from pretrain.models.mae import MAE
from pretrain.models.positions import sincos_position_embedding

transformers = pytest.importorskip("transformers", minversion="5.0")

LAYER_NAMES = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.o_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
ROOT_NAMES = {
    "vit.embeddings.cls_token": "encoder.cls_token",
    "vit.embeddings.position_embeddings": "encoder.pos_embed",
    "vit.embeddings.patch_embeddings.projection.weight": "encoder.patch_embed.proj.weight",
    "vit.embeddings.patch_embeddings.projection.bias": "encoder.patch_embed.proj.bias",
    "vit.layernorm.weight": "encoder.norm.weight",
    "vit.layernorm.bias": "encoder.norm.bias",
    "decoder.mask_token": "decoder.mask_token",
    "decoder.decoder_pos_embed": "decoder.pos_embed",
}
for part in ("embed", "norm", "pred"):
    for kind in ("weight", "bias"):
        ROOT_NAMES[f"decoder.decoder_{part}.{kind}"] = f"decoder.{part}.{kind}"


def to_our_names(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename transformers' (version 5) parameters, joining query, key and value."""
    ours: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        if name in ROOT_NAMES:
            ours[ROOT_NAMES[name]] = tensor
            continue
        part = "encoder" if name.startswith("vit.layers.") else "decoder"
        index, layer = name.removeprefix("vit.layers.").removeprefix("decoder.decoder_layers.").split(".", 1)
        layer, kind = layer.rsplit(".", 1)
        prefix = f"{part}.blocks.{index}"
        if layer in ("attention.k_proj", "attention.v_proj"):
            continue  # joined below, with the query
        if layer == "attention.q_proj":
            parts = [theirs[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            ours[f"{prefix}.attn.qkv.{kind}"] = torch.cat(parts)
        else:
            ours[f"{prefix}.{LAYER_NAMES[layer]}.{kind}"] = tensor
    return ours


def make_pair(
    *,
    image: int,
    patch: int,
    channels: int,
    width: int,
    depth: int,
    heads: int,
    decoder: tuple[int, int, int],
    mask_ratio: float,
    norm_pixels: bool,
) -> tuple[nn.Module, MAE]:
    """Their model with random weights, and ours with the same; the decoder is given as (width, depth, heads)."""
    torch.manual_seed(0)
    theirs = transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(
            image_size=image, patch_size=patch, num_channels=channels, hidden_size=width, num_hidden_layers=depth,
            num_attention_heads=heads, intermediate_size=4 * width, decoder_hidden_size=decoder[0],
            decoder_num_hidden_layers=decoder[1], decoder_num_attention_heads=decoder[2],
            decoder_intermediate_size=4 * decoder[0], mask_ratio=mask_ratio, norm_pix_loss=norm_pixels,
            layer_norm_eps=1e-6,
        )
    )  # fmt: skip
    with torch.no_grad():  # nothing may be zero that training moves away from zero
        for name, parameter in theirs.named_parameters():
            if "pos" not in name and parameter.std() == 0:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    encoder = ViTConfig((image, image), (patch, patch), channels, width, depth, heads)
    ours = MAE(MAEConfig(encoder, *decoder, mask_ratio, norm_pixels))
    # Theirs stay zero unless a checkpoint is loaded (seen in 5.23); the formulas are compared in the next test.
    theirs.vit.embeddings.position_embeddings.data.copy_(ours.encoder.pos_embed)
    theirs.decoder.decoder_pos_embed.data.copy_(ours.decoder.pos_embed)
    named = to_our_names(theirs.state_dict())
    ours.load_state_dict(named, strict=True)
    return theirs.train(), ours.train()


def assert_same_gradients(theirs: nn.Module, ours: MAE, images: Tensor, noise: Tensor) -> None:
    """Loss within 1e-6 relative, each gradient within 1e-5 of its largest value."""
    their_output, output = theirs(images, noise=noise), ours(images, noise)
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, their_output.loss, rtol=1e-6, atol=0)
    assert torch.equal(output.mask, their_output.mask.bool())
    their_output.loss.backward()
    output.loss.backward()
    expected = to_our_names({name: p.grad for name, p in theirs.named_parameters() if p.requires_grad})
    actual = {name: p.grad for name, p in ours.named_parameters()}
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        largest = expected[name].abs().max()
        if name.endswith("attn.qkv.bias"):
            assert_same_qkv_bias(gradient, expected[name])
        else:
            assert largest > 0, f"{name} has no gradient to compare"
            assert (gradient - expected[name]).abs().max() <= 1e-5 * largest, name


def assert_same_qkv_bias(actual: Tensor, expected: Tensor) -> None:
    """A key's bias shifts all scores of a query alike and has a gradient of zero but for rounding."""
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_position_embedding_is_theirs_bit_for_bit() -> None:
    module = pytest.importorskip("transformers.models.vit_mae.modeling_vit_mae")
    if not hasattr(module, "build_2d_sinusoidal_position_embedding"):
        pytest.skip("this version of transformers has no such function")
    for grid, width in (((14, 14), 768), ((3, 5), 32)):
        expected = module.build_2d_sinusoidal_position_embedding(*grid, embed_dim=width, cls_token=True)
        rows, columns = expected.chunk(2, dim=1)  # the original MAE has the columns first
        actual = sincos_position_embedding(grid, width)
        torch.testing.assert_close(actual[0], torch.cat((columns, rows), dim=1), rtol=0, atol=0)


SMALL = {"image": 32, "patch": 8, "channels": 3, "width": 48, "depth": 2, "heads": 4, "decoder": (32, 2, 4)}
BASE = {"image": 224, "patch": 16, "channels": 3, "width": 768, "depth": 12, "heads": 12, "decoder": (512, 8, 16)}
VARIANTS = [
    {**SMALL, "mask_ratio": 0.75, "norm_pixels": True},
    {**SMALL, "mask_ratio": 0.75, "norm_pixels": False},
    {**SMALL, "image": 42, "patch": 14, "channels": 1, "mask_ratio": 0.5, "norm_pixels": True},
    {**SMALL, "image": 24, "patch": 4, "channels": 5, "mask_ratio": 0.6, "norm_pixels": True},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"c{v['channels']}p{v['patch']}norm{v['norm_pixels']}")
def test_small_model_has_their_loss_and_gradients(variant: dict) -> None:
    theirs, ours = make_pair(**variant)
    images = torch.randn(3, variant["channels"], variant["image"], variant["image"])
    noise = torch.rand(3, ours.config.encoder.num_patches)
    assert_same_gradients(theirs, ours, images, noise)


@pytest.mark.slow
def test_base_at_224_has_their_loss_and_gradients() -> None:
    theirs, ours = make_pair(**BASE, mask_ratio=0.75, norm_pixels=True)
    assert_same_gradients(theirs, ours, torch.randn(2, 3, 224, 224), torch.rand(2, 196))


TRAJECTORIES = [
    pytest.param({**SMALL, "norm_pixels": True}, 8, id="small-normalised"),
    pytest.param({**SMALL, "norm_pixels": False}, 8, id="small-raw"),
    pytest.param(
        {**BASE, "norm_pixels": True}, 1, id="base-normalised", marks=[pytest.mark.slow, pytest.mark.timeout(1800)]
    ),
]


@pytest.mark.parametrize(("shape", "batch_size"), TRAJECTORIES)
def test_fifty_steps_of_adamw_stay_together(shape: dict, batch_size: int) -> None:
    theirs, ours = make_pair(**shape, mask_ratio=0.75)
    settings = {"lr": 5e-4 if shape["width"] < 768 else 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.05}
    their_optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], **settings)
    optimizer = torch.optim.AdamW(ours.parameters(), **settings)
    generator = torch.Generator().manual_seed(1)
    side = shape["image"]
    data = torch.randn(16, 3, side, side, generator=generator).cumsum(-1).cumsum(-2) / side  # smooth: can be learnt
    losses = []
    for _ in range(50):
        images = data[torch.randint(16, (batch_size,), generator=generator)]
        noise = torch.rand(batch_size, ours.config.encoder.num_patches, generator=generator)
        pair = (theirs(images, noise=noise).loss, ours(images, noise).loss)
        for loss, one in zip(pair, (their_optimizer, optimizer), strict=True):
            one.zero_grad()
            loss.backward()
            one.step()
        losses.append([loss.item() for loss in pair])
    expected, actual = torch.tensor(losses).T
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=0)
    assert actual[-10:].mean() < actual[:3].mean(), "the models should have learnt something"
