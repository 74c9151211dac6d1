"""Exports of image models to transformers: features, predictions and loss of the reloaded model are ours."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pretrain.export import transformers_image as export
from pretrain.export.publish import ExportError
from pretrain.export.transformers_image import export_vit, why_not
from pretrain.models.config import ViTConfig
from pretrain.models.mae import MAE
from pretrain.models.video_config import VideoViTConfig
from pretrain.models.video_vit import VideoViT
from pretrain.models.vit import ViT
from pretrain.weights.backbone import load_backbone
from tests.pretrain.exact import EXACT, StaysDouble, relative_error
from tests.pretrain.export.random_backbones import backbone_of
from tests.pretrain.export.tiny_runs import train_on_images

transformers = pytest.importorskip("transformers", minversion="5.0")

SMALL = ViTConfig(image_size=(16, 16), patch_size=(8, 8), width=24, depth=2, heads=2)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_on_images(tmp_path_factory.mktemp("images"))


@pytest.mark.parametrize(
    "fields",
    [{}, {"image_size": (16, 48)}, {"patch_size": (4, 16)}, {"in_channels": 5}, {"mlp_ratio": 2.51}],
    ids=["square", "not-square", "patches-not-square", "five-channels", "mlp-ratio"],
)
def test_transformers_computes_our_features(tmp_path: Path, fields: dict[str, object]) -> None:
    backbone = backbone_of(replace(SMALL, **fields), tmp_path)
    exported = export_vit(backbone, tmp_path / "out")
    assert exported.errors["features"] <= 1e-5
    theirs, info = transformers.ViTModel.from_pretrained(
        tmp_path / "out", add_pooling_layer=False, output_loading_info=True
    )
    assert not any(info.values())
    config = backbone.model.config
    images = torch.randn(2, config.in_channels, *config.image_size).double()
    with torch.no_grad(), StaysDouble():
        hidden = theirs.double().eval()(images).last_hidden_state
        assert relative_error(hidden, backbone.model.double()(images)) <= EXACT


@pytest.mark.parametrize("ema", [False, True])
def test_the_whole_model_of_a_run_has_our_predictions_and_loss(run_dir: Path, tmp_path: Path, ema: bool) -> None:
    backbone = load_backbone(run_dir, ema=ema)
    exported = export_vit(backbone, tmp_path / "out", pretraining=True)
    assert max(exported.errors.values()) <= 1e-5
    assert set(exported.errors) == {"features", "predictions", "loss"}
    assert sorted(path.name for path in exported.folder.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "preprocessor_config.json"
    ]  # fmt: skip
    card = (exported.folder / "README.md").read_text()
    assert f"| weights sha256 | {backbone.digest} |" in card
    assert "of loss: " in card
    theirs = transformers.AutoModelForPreTraining.from_pretrained(exported.folder).eval()
    images, noise = torch.randn(2, 3, 16, 16).double(), torch.rand(2, 4)
    assert backbone.config is not None
    ours = MAE(backbone.config.objective.model).eval()
    state = load_file(exported.folder / "model.safetensors")
    ours.load_state_dict(export._whole_model(backbone).state_dict())
    with torch.no_grad(), StaysDouble():
        loss = theirs.double()(images, noise=noise).loss
        assert relative_error(ours.double()(images, noise).loss, loss) <= EXACT
    assert "vit.encoder.layer.1.attention.attention.key.bias" in state


def test_the_preprocessor_is_read(tmp_path: Path) -> None:
    exported = export_vit(backbone_of(SMALL, tmp_path), tmp_path / "out")
    processor = transformers.AutoImageProcessor.from_pretrained(exported.folder)
    pixels = processor(torch.full((3, 20, 30), 255, dtype=torch.uint8), return_tensors="pt").pixel_values
    torch.testing.assert_close(pixels, torch.full((1, 3, 16, 16), (1.0 - 0.4) / 0.25))


def test_what_differs_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described = export.encoder_arguments
    monkeypatch.setattr(export, "encoder_arguments", lambda config: described(config) | {"layer_norm_eps": 1e-3})
    with pytest.raises(ExportError, match="features differ from ours"):
        export_vit(backbone_of(SMALL, tmp_path), tmp_path / "out")
    monkeypatch.setattr(export, "encoder_arguments", described)
    monkeypatch.setitem(export._LAYER, "mlp.fc1.", "intermediate.thick.")
    with pytest.raises(ExportError, match="did not load the export completely"):
        export_vit(backbone_of(SMALL, tmp_path), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_said_there_is_refused(run_dir: Path, tmp_path: Path) -> None:
    clips = replace(backbone_of(SMALL, tmp_path), model=VideoViT(VideoViTConfig(4, (16, 16), 2, (8, 8), 3, 24, 1, 2)))
    with pytest.raises(ValueError, match="cannot become a transformers ViT: it is a VideoViT"):
        export_vit(clips, tmp_path / "out")
    assert "has no decoder beside it" in str(why_not(backbone_of(SMALL, tmp_path), pretraining=True))
    run = load_backbone(run_dir)
    wide = replace(run, model=ViT(replace(SMALL, image_size=(16, 32))))
    assert "images are 16 x 32 and its patches 8 x 8" in str(why_not(wide, pretraining=True))
    assert why_not(wide) is None
