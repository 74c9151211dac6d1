"""Exports to timm: the features of both ways of loading equal ours, and nothing is published otherwise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from pretrain.export import timm as timm_export
from pretrain.export.publish import ExportError
from pretrain.export.timm import Pool, architecture_of, export_timm, reference_features
from pretrain.models.config import VIT_SIZES, ViTConfig, vit_config
from pretrain.models.vit import ViT
from pretrain.weights.backbone import load_backbone
from tests.pretrain.exact import EXACT, relative_error
from tests.pretrain.export.random_backbones import backbone_of

SMALL = ViTConfig(image_size=(32, 32), patch_size=(8, 8), width=16, depth=2, heads=2)

SHAPES = {
    "square": SMALL,
    "not-square": replace(SMALL, image_size=(16, 48)),
    "patches-not-square": replace(SMALL, patch_size=(4, 16)),
    "one-channel": replace(SMALL, in_channels=1),
    "five-channels": replace(SMALL, in_channels=5),
    "mlp-ratio": replace(SMALL, mlp_ratio=2.51),
}


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("shape", SHAPES)
def test_timm_computes_our_features_in_both_ways_of_loading(tmp_path: Path, shape: str, pool: Pool) -> None:
    backbone = backbone_of(SHAPES[shape], tmp_path)
    exported = export_timm(backbone, tmp_path / "out", pool=pool)
    assert exported.difference.relative <= 1e-5
    images = torch.randn(3, backbone.model.config.in_channels, *backbone.model.config.image_size).double()
    arguments = json.loads((tmp_path / "out/config.json").read_text())["model_args"]
    weights = str(tmp_path / "out/model.safetensors")
    with torch.no_grad():
        tokens, pooled = reference_features(backbone.model.double(), images, pool)
        for model in (
            timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True),
            timm.create_model(exported.architecture, num_classes=0, checkpoint_path=weights, **arguments),
        ):
            model.double().eval()
            assert relative_error(model.forward_features(images), tokens) <= EXACT
            assert relative_error(model(images), pooled) <= EXACT


def test_the_reference_features_are_those_of_forward(tmp_path: Path) -> None:
    """`token` is our forward; `avg` is the norm of the average, written down independently of the model's methods."""
    backbone = backbone_of(SMALL, tmp_path)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens, pooled = reference_features(backbone.model, images, "token")
        assert torch.equal(tokens, backbone.model(images))
        assert torch.equal(pooled, tokens[:, 0])
        raw, averaged = reference_features(backbone.model, images, "avg")
        norm = backbone.model.norm
        assert torch.allclose(norm(raw), backbone.model(images), atol=1e-6)
        expected = nn.functional.layer_norm(raw[:, 1:].mean(1), (16,), norm.weight, norm.bias, 1e-6)
        assert torch.allclose(averaged, expected, atol=1e-6)


def test_the_folder_has_what_the_next_user_needs(tmp_path: Path) -> None:
    exported = export_timm(backbone_of(replace(SMALL, in_channels=1), tmp_path), tmp_path / "deep/out")
    assert sorted(path.name for path in exported.folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]  # no temporary folder stays
    model = timm.create_model(f"local-dir:{exported.folder}", pretrained=True)
    data = timm.data.resolve_model_data_config(model)
    assert (data["input_size"], data["mean"], data["std"]) == ((1, 32, 32), [0.4], [0.25])
    assert (data["interpolation"], data["crop_pct"]) == ("bicubic", 1.0)
    card = (exported.folder / "README.md").read_text()
    assert f"| weights sha256 | {exported.digest} |" in card
    assert "| run uid | not recorded |" in card
    assert "allowed: 1e-05" in card
    assert "library_name: timm" in card


def test_the_snippets_of_the_card_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = backbone_of(SMALL, tmp_path)
    exported = export_timm(backbone, tmp_path / "out")
    blocks = (exported.folder / "README.md").read_text().split("```python\n")[1:]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"images": torch.randn(2, 3, 32, 32)}
    features = []
    for block in blocks:
        exec(block.split("```")[0], names)
        features.append(names["model"](names["images"]))
    assert len(features) == 2
    assert torch.equal(features[0], features[1])
    assert torch.allclose(features[0], backbone.model(names["images"])[:, 0], atol=1e-5)


def test_a_user_can_add_a_head(tmp_path: Path) -> None:
    exported = export_timm(backbone_of(SMALL, tmp_path), tmp_path / "out", pool="avg")
    model = timm.create_model(f"local-dir:{exported.folder}", pretrained=True, num_classes=7)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_an_export_is_loaded_back_as_the_same_backbone(tmp_path: Path, pool: Pool) -> None:
    backbone = backbone_of(SHAPES["patches-not-square"], tmp_path)
    loaded = load_backbone(export_timm(backbone, tmp_path / "out", pool=pool).folder)
    assert loaded.digest == backbone.digest
    assert (loaded.mean, loaded.std, loaded.model.config) == (backbone.mean, backbone.std, backbone.model.config)
    assert (loaded.weights, loaded.step, loaded.run_dir) == ("imported", None, None)


@pytest.mark.parametrize("size", list(VIT_SIZES))
def test_the_standard_sizes_have_timms_names(size: str) -> None:
    config = vit_config(size)
    assert architecture_of(config) == timm_export._STANDARD_ARCHITECTURES[size]
    with torch.device("meta"):
        theirs = timm.create_model(architecture_of(config), num_classes=0)
        ours = ViT(config)
    shapes = [{name: tuple(tensor.shape) for name, tensor in m.state_dict().items()} for m in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert theirs.blocks[0].attn.num_heads == config.heads


def test_rounding_is_measured_against_the_size_of_the_values(tmp_path: Path) -> None:
    """Tokens without the final norm grow in training: fp32 cannot hold 1e-5 of a value of 10,000."""
    backbone = backbone_of(SMALL, tmp_path)
    with torch.no_grad():
        backbone.model.cls_token.mul_(1e6)
    difference = export_timm(backbone, tmp_path / "out", pool="avg").difference
    assert difference.relative <= 1e-5
    assert difference.absolute <= difference.relative * 1e6


def test_features_that_differ_are_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = backbone_of(SMALL, tmp_path)
    monkeypatch.setattr(
        timm_export, "reference_features", lambda *given: tuple(f + 1e-3 for f in reference_features(*given))
    )
    with pytest.raises(ExportError, match=r"features differ from ours by 0\.000\d+ of their size, more than 1e-05"):
        export_timm(backbone, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_features_that_are_not_finite_are_not_published(tmp_path: Path) -> None:
    backbone = backbone_of(SMALL, tmp_path)
    with torch.no_grad():
        backbone.model.norm.weight[0] = float("nan")
    with pytest.raises(ExportError, match="differ from ours by inf"):
        export_timm(backbone, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="exports are never overwritten"):
        export_timm(backbone_of(SMALL, tmp_path), tmp_path / "out")


def test_what_timm_cannot_express_is_refused_with_the_reason(tmp_path: Path) -> None:
    class Other(ViT):
        pass

    backbone = backbone_of(SMALL, tmp_path)
    with pytest.raises(ValueError, match="timm cannot express this model: it is a Other, and only plain vision"):
        export_timm(replace(backbone, model=Other(SMALL)), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
