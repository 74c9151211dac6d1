"""The vision transformer: names, positions, initialisation, skipped patches, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

from pretrain.models.attention import SelfAttention, attend
from pretrain.models.config import VIT_SIZES, ViTConfig, vit_config
from pretrain.models.positions import sincos_position_embedding
from pretrain.models.vit import ViT
from tests.pretrain.exact import relative_error

SMALL = ViTConfig(image_size=(24, 40), patch_size=(8, 4), in_channels=2, width=48, depth=3, heads=4)


def literal_position(grid_size: tuple[int, int], width: int) -> np.ndarray:
    """The original's formula, one number at a time: the first half of the width encodes the column."""
    rows, columns = grid_size
    table = np.zeros((1 + rows * columns, width))
    quarter = width // 4
    for row in range(rows):
        for column in range(columns):
            for i in range(quarter):
                frequency = 1.0 / 10000 ** (i / quarter)
                entry = table[1 + row * columns + column]
                entry[i], entry[quarter + i] = np.sin(column * frequency), np.cos(column * frequency)
                entry[2 * quarter + i], entry[3 * quarter + i] = np.sin(row * frequency), np.cos(row * frequency)
    return table.astype(np.float32)


@pytest.mark.parametrize(("grid_size", "width"), [((14, 14), 32), ((3, 7), 64), ((1, 1), 4)])
def test_position_embedding_is_the_originals(grid_size: tuple[int, int], width: int) -> None:
    actual = sincos_position_embedding(grid_size, width)
    assert actual.dtype == torch.float32
    np.testing.assert_allclose(actual[0].numpy(), literal_position(grid_size, width), rtol=1.2e-7, atol=1e-12)


@pytest.mark.parametrize("size", VIT_SIZES)
def test_names_and_shapes_are_timms(size: str) -> None:
    with torch.device("meta"):
        ours = ViT(vit_config(size)).state_dict()
        name = f"vit_{size}_patch{14 if size == 'huge' else 16}_224"
        theirs = timm.create_model(name, num_classes=0).state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


def test_features_are_timms_with_the_same_weights() -> None:
    torch.manual_seed(0)
    ours = ViT(ViTConfig(image_size=(32, 48), patch_size=(16, 16), width=64, depth=2, heads=4)).eval()
    theirs = timm.models.VisionTransformer(
        img_size=(32, 48), embed_dim=64, depth=2, num_heads=4, num_classes=0, global_pool=""
    ).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = torch.randn(3, 3, 32, 48)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)
        cls_token, patches = ours.features(images)[0]
        torch.testing.assert_close(torch.cat((cls_token[:, None], patches), dim=1), ours(images), rtol=0, atol=0)


def test_features_of_several_blocks_are_normed_prefixes() -> None:
    model = ViT(SMALL)
    images = torch.randn(2, 2, 24, 40)
    features = model.features(images, num_blocks=2)
    assert len(features) == 2
    tokens = model.embed(images, None)
    for block in model.blocks[:2]:
        tokens = block(tokens)
    torch.testing.assert_close(features[0][1], model.norm(tokens)[:, 1:])
    assert features[1][0].shape == (2, 48)
    with pytest.raises(ValueError, match="expected 1 to 3"):
        model.features(images, num_blocks=4)


def test_embedding_equals_the_convolution_and_then_the_selection() -> None:
    model = ViT(SMALL)
    images = torch.randn(2, 2, 24, 40)
    keep_ids = torch.stack((torch.randperm(30)[:8], torch.randperm(30)[:8]))
    projected = F.conv2d(images, model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride=(8, 4))
    every = projected.flatten(2).transpose(1, 2) + model.pos_embed[:, 1:]
    expected = torch.stack([every[sample, keep_ids[sample]] for sample in range(2)])
    tokens = model.embed(images, keep_ids)
    torch.testing.assert_close(tokens[:, 1:], expected)
    torch.testing.assert_close(tokens[:, 0], model.cls_token[0].expand(2, -1))
    torch.testing.assert_close(model.embed(images, None)[:, 1:], every)


def test_attention_equals_a_literal_one() -> None:
    torch.manual_seed(0)
    attention, tokens = SelfAttention(24, 3), torch.randn(2, 5, 24)
    query, key, value = attention.qkv(tokens).reshape(2, 5, 3, 3, 8).unbind(2)  # [B, N, heads, 8]
    mixed = torch.empty(2, 5, 3, 8)
    for sample in range(2):
        for head in range(3):
            scores = query[sample, :, head] @ key[sample, :, head].T / 8**0.5
            mixed[sample, :, head] = scores.softmax(-1) @ value[sample, :, head]
    torch.testing.assert_close(attention(tokens), attention.proj(mixed.flatten(2)))


def test_bfloat16_attention_on_a_cpu_rounds_nothing_but_its_result() -> None:
    """torch's own was 2.5% further from the exact values than their rounding, on a processor without AVX-512."""
    parts = torch.randn(3, 2, 4, 50, 16, generator=torch.Generator().manual_seed(0)) * 3
    exact = F.scaled_dot_product_attention(*parts.bfloat16().double())
    ours = attend(*parts.bfloat16())
    assert ours.dtype == torch.bfloat16
    assert relative_error(ours, exact) <= 1.001 * relative_error(exact.bfloat16(), exact)


def test_initialisation_is_the_papers() -> None:
    torch.manual_seed(0)
    model = ViT(ViTConfig(image_size=(32, 32), patch_size=(8, 8), width=96, depth=2, heads=3))
    for name, tensor in model.state_dict().items():
        if name == "cls_token":
            assert 0.012 < tensor.std() < 0.028
        elif name == "pos_embed":
            assert torch.equal(tensor, sincos_position_embedding((4, 4), 96))
        elif "norm" in name:
            assert (tensor == (1 if name.endswith("weight") else 0)).all()
        elif name.endswith("bias"):
            assert (tensor == 0).all()
        else:
            matrix = tensor.flatten(1)
            bound = (6 / sum(matrix.shape)) ** 0.5
            assert 0.98 * bound < matrix.abs().max() <= bound, name
            assert abs(matrix.std() * 3**0.5 / bound - 1) < 0.05, name


def test_initialisation_from_meta_fills_everything_and_follows_the_seed() -> None:
    torch.manual_seed(5)
    expected = ViT(SMALL)
    torch.manual_seed(5)
    expected.init_weights()
    with torch.device("meta"):
        model = ViT(SMALL)
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(float("nan"))
    torch.manual_seed(5)
    model.init_weights()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name


def test_positions_are_saved_but_not_trained() -> None:
    model = ViT(SMALL)
    assert model.state_dict()["pos_embed"].shape == (1, 31, 48)
    assert "pos_embed" not in dict(model.named_parameters())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": (225, 224)}, "image height of 225 .* 224 or 240"),
        ({"image_size": (224, 100)}, "image width of 100"),
        ({"image_size": (224,)}, "expected \\[height, width\\]"),
        ({"width": 100, "heads": 12}, "multiple of heads and of 4"),
        ({"width": 6, "heads": 3}, "and of 4"),
        ({"in_channels": 0}, "in_channels is 0"),
        ({"depth": 0}, "depth 0"),
    ],
)
def test_impossible_shapes_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViTConfig(**fields)


def test_wrong_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \[1, 3, 24, 40\]; expected \[batch, 2, 24, 40\]"):
        ViT(SMALL)(torch.randn(1, 3, 24, 40))


def test_named_sizes() -> None:
    assert vit_config("huge").patch_size == (14, 14)
    assert vit_config("tiny", (32, 64), patch_size=4, in_channels=1).num_patches == 128
    with pytest.raises(ValueError, match="no ViT size 'giant'"):
        vit_config("giant")
