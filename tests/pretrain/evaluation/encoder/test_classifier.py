"""What fine-tuning trains, its groups, and its augmentation, against literal references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.data.mixup import Mixup
from timm.layers import DropPath
from torch import Tensor, nn

from pretrain.evaluation.encoder.augment import Mix, RandAugment, seed_of
from pretrain.evaluation.encoder.classifier import Classifier, layer_decay_groups
from pretrain.models.config import ViTConfig
from pretrain.models.video_config import VideoViTConfig
from pretrain.models.video_vit import VideoViT
from pretrain.models.vit import ViT

CLIPS = VideoViTConfig(num_frames=4, image_size=(8, 8), patch_size=(4, 4), width=16, depth=3, heads=2)
ST_CLIPS = VideoViTConfig(
    num_frames=4, image_size=(8, 8), patch_size=(4, 4), width=16, depth=3, heads=2, family="mae_st"
)
IMAGES = ViTConfig(image_size=(8, 8), patch_size=(4, 4), width=16, depth=3, heads=2)


def make(config: ViTConfig | VideoViTConfig) -> tuple[ViT | VideoViT, Tensor, int]:
    """A backbone, two inputs, and how many class tokens it has."""
    torch.manual_seed(0)
    if isinstance(config, ViTConfig):
        return ViT(config), torch.randn(2, 3, 8, 8), 1
    return VideoViT(config), torch.randn(2, 3, 4, 8, 8), int(config.family == "mae_st")


@pytest.mark.parametrize("config", [CLIPS, ST_CLIPS, IMAGES], ids=["video_mae", "mae_st", "image"])
def test_the_mean_of_the_patch_tokens_before_the_norm_is_classified(config: ViTConfig | VideoViTConfig) -> None:
    backbone, inputs, num_class_tokens = make(config)
    seen: list[Tensor] = []
    backbone.blocks[-1].register_forward_hook(lambda module, arguments, output: seen.append(output))
    backbone(inputs)
    model = Classifier(backbone, 5, drop_path=0.0).eval()
    pooled = nn.functional.layer_norm(seen[0][:, num_class_tokens:].mean(1), (16,), eps=1e-6)
    torch.testing.assert_close(model(inputs), pooled @ model.head.weight.T + model.head.bias)
    assert float(model.head.weight.detach().abs().max()) < 1e-4
    nn.init.zeros_(model.backbone.blocks[0].norm1.weight)  # type: ignore[union-attr, arg-type]
    assert isinstance(backbone.norm, nn.LayerNorm)
    assert float(backbone.blocks[0].norm1.weight.detach().min()) == 1.0  # type: ignore[union-attr, operator]


def reference_layer(name: str, num_layers: int) -> int:
    """`get_num_layer_for_vit` of BEiT and VideoMAE, in its words."""
    if name in ("cls_token", "mask_token", "pos_embed") or name.startswith("positions."):
        return 0
    if name.startswith("patch_embed"):
        return 0
    if name.startswith("blocks"):
        return int(name.split(".")[1]) + 1
    return num_layers - 1


@pytest.mark.parametrize("config", [CLIPS, ST_CLIPS, IMAGES], ids=["video_mae", "mae_st", "image"])
def test_learning_rates_decay_layer_by_layer_towards_the_input(config: ViTConfig | VideoViTConfig) -> None:
    model = Classifier(make(config)[0], 5, drop_path=0.0)
    groups = layer_decay_groups(model, weight_decay=0.05, layer_decay=0.5)
    found = {id(parameter): group for group in groups for parameter in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    num_layers = 3 + 2
    for name, parameter in model.named_parameters():
        group, own_name = found[id(parameter)], name.removeprefix("backbone.")
        assert group["lr_scale"] == 0.5 ** (num_layers - 1 - reference_layer(own_name, num_layers)), name
        spared = parameter.ndim <= 1 or "cls_token" in name or "positions" in name
        assert group["weight_decay"] == (0.0 if spared else 0.05), name
    assert sorted({group["lr_scale"] for group in groups}) == [0.0625, 0.125, 0.25, 0.5, 1.0]


def test_drop_path_grows_linearly_from_0() -> None:
    model = Classifier(make(CLIPS)[0], 5, drop_path=0.2)
    rates = [
        [module.drop_prob if isinstance(module, DropPath) else 0.0 for module in (block.drop_path1, block.drop_path2)]
        for block in model.backbone.blocks
    ]
    assert rates == [[0.0, 0.0], [pytest.approx(0.1)] * 2, [pytest.approx(0.2)] * 2]


@pytest.mark.parametrize("seed", range(4))
def test_frames_of_a_clip_are_mixed_as_timm_mixes_pictures(seed: int) -> None:
    clips, labels = torch.randn(4, 3, 2, 16, 16), torch.tensor([0, 1, 2, 2])
    before, state = clips.clone(), np.random.get_state()[1].copy()  # type: ignore[index] # noqa: NPY002
    mixed, targets = Mix(0.8, 1.0, 0.1, 3)(clips.transpose(1, 2).contiguous().transpose(1, 2), labels, seed)
    assert np.array_equal(state, np.random.get_state()[1])  # type: ignore[index] # noqa: NPY002
    assert torch.equal(clips, before)
    timm = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=3)
    for frame in range(2):
        np.random.seed(seed)  # noqa: NPY002
        expected, their_targets = timm(clips[:, :, frame].clone(), labels)
        assert torch.equal(mixed[:, :, frame], expected)
    assert torch.equal(targets, their_targets)
    assert not torch.equal(mixed, clips)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))


def test_without_mixing_labels_are_only_smoothed() -> None:
    images, labels = torch.randn(3, 3, 4, 4), torch.tensor([0, 1, 1])
    mixed, targets = Mix(0.0, 0.0, 0.3, 3)(images, labels, 0)
    assert torch.equal(mixed, images)
    torch.testing.assert_close(targets, torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.8, 0.1]]))


@pytest.mark.parametrize("shape", [(4, 3, 24, 24), (2, 2, 3, 5, 24, 24), (3, 1, 1, 5, 24, 24)])
def test_rand_augment_treats_the_frames_of_a_clip_alike(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.randint(0, 256, (*shape[:-3], 1, *shape[-2:]), dtype=torch.uint8, generator=generator)
    stored = one.expand(shape) if len(shape) == 6 else torch.randint(0, 256, shape, dtype=torch.uint8)
    augment = RandAugment(3, 21)
    found = augment(stored, 5)
    assert (found.shape, found.dtype) == (stored.shape, torch.uint8)
    assert torch.equal(found, augment(stored, 5))
    assert not torch.equal(found, augment(stored, 6))
    assert not torch.equal(found, stored)
    if len(shape) == 6:
        assert torch.equal(found, found[:, :, :, :1].expand(shape))


def test_seeds_differ_by_every_number() -> None:
    assert len({seed_of(0, 0), seed_of(0, 1), seed_of(1, 0), seed_of(1, 1)}) == 4
