"""Exports from the file on: the libraries' own preprocessing makes our evaluation's pixels, or nothing is published."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import Tensor

from data_pipes.decode.picture import decode_image
from data_pipes.sequential.clips import cut_crops
from data_pipes.transforms.image import EvalTransform
from pretrain.export import diffusers, onnx_pictures, transformers_image
from pretrain.export import timm as timm_export
from pretrain.export.by_hand import preprocess, source_code
from pretrain.export.clips import frame_files
from pretrain.export.diffusers import export_diffusers
from pretrain.export.onnx_models import export_backbone_onnx
from pretrain.export.pictures import detail, encode, evaluation_view, picture_files, pixel_error
from pretrain.export.publish import ExportError
from pretrain.export.targets import export_model
from pretrain.export.timm import export_timm
from pretrain.export.timm_pictures import crop_pct
from pretrain.export.transformers_image import export_vit
from pretrain.models.config import ViTConfig
from pretrain.models.normalise import Normalise
from pretrain.models.video_config import VideoViTConfig
from pretrain.weights.backbone import Backbone, load_backbone
from tests.pretrain.export.random_backbones import backbone_of
from tests.pretrain.export.tiny_runs import train_on_images
from tests.pretrain.weights.tiny_dc_ae import make_tokenizer, tiny

transformers = pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("onnxscript")

SMALL = ViTConfig(image_size=(96, 96), patch_size=(16, 16), width=16, depth=1, heads=2)
CLIPS = VideoViTConfig(4, (32, 32), 2, (16, 16), 3, 24, 1, 2)
PICTURES = [(640, 427), (427, 640), (300, 300), (500, 333), (375, 500), (130, 97), (1000, 120), (60, 45)]
"""Width and height of files."""


def jpeg(width: int, height: int, channels: int = 3) -> bytes:
    return encode(detail(height, width, channels), 8)


def evaluated(backbone: Backbone, data: bytes, short_side: int) -> Tensor:
    """The model's input, by the parts of our evaluation and none of the export's."""
    view = EvalTransform(backbone.interface.image_size, short_side)
    return Normalise(backbone.mean, backbone.std)(view(decode_image(data, len(backbone.mean)))[None])


@pytest.mark.parametrize(
    ("side", "short_side"), [(32, 32), (96, 110), (112, 128), (160, 182), (192, 220), (224, 256), (336, 384)]
)
def test_both_libraries_prepare_pictures_as_our_evaluation_does(tmp_path: Path, side: int, short_side: int) -> None:
    """transformers to the last bit; timm up to Pillow's rounding, except where it rounds the crop's place up."""
    backbone = backbone_of(replace(SMALL, image_size=(side, side)), tmp_path)
    hf, tm = export_vit(backbone, tmp_path / "hf").folder, export_timm(backbone, tmp_path / "tm").folder
    processor = transformers.AutoImageProcessor.from_pretrained(hf)
    model = timm.create_model(f"local-dir:{tm}", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    agreed = 0
    for width, height in PICTURES:
        data = jpeg(width, height)
        ours, picture = evaluated(backbone, data, short_side), Image.open(io.BytesIO(data)).convert("RGB")
        theirs = processor(picture, return_tensors="pt").pixel_values
        assert pixel_error("picture", theirs, ours, backbone.std) < 1e-4, (width, height)
        beside = (short_side * max(width, height) // min(width, height) - side) % 4 == 3
        error = pixel_error("picture", transform(picture)[None], ours, backbone.std)
        assert error > 2.0 if beside else error < 0.2, (width, height, error)
        agreed += not beside
    assert agreed >= 4


@pytest.mark.parametrize("fields", [{"image_size": (96, 160)}, {"in_channels": 1}, {"in_channels": 4}], ids=str)
def test_every_shape_that_transformers_can_express(tmp_path: Path, fields: dict[str, Any]) -> None:
    backbone = backbone_of(replace(SMALL, **fields), tmp_path)
    exported = export_vit(backbone, tmp_path / "out")
    assert [name.split()[0] for name in exported.pictures] == ["landscape", "portrait", "square"]
    assert max(max(errors.values()) for errors in exported.pictures.values()) < 1e-4
    processor, channels = transformers.AutoImageProcessor.from_pretrained(exported.folder), len(backbone.mean)
    short_side = 182 if "image_size" in fields else 110
    stored = (detail(200, 333, channels) * 255).round().permute(1, 2, 0).numpy().astype(np.uint8)
    buffer = io.BytesIO()
    np.save(buffer, stored)
    theirs = processor(stored, input_data_format="channels_last", return_tensors="pt").pixel_values
    assert pixel_error("picture", theirs, evaluated(backbone, buffer.getvalue(), short_side), backbone.std) < 1e-4


def test_timm_gets_the_short_side_at_every_image_size() -> None:
    for side in range(1, 1025):
        for short_side in range(side, side + side // 4 + 2):
            assert math.floor(side / crop_pct(side, short_side)) == short_side
    assert crop_pct(224, 256) == 0.875


def test_what_timm_cannot_express_is_stated_with_code_that_was_compared(tmp_path: Path) -> None:
    backbone = backbone_of(replace(SMALL, image_size=(96, 160)), tmp_path)
    exported = export_timm(backbone, tmp_path / "out")
    assert exported.shifted is None
    card = (tmp_path / "out/README.md").read_text()
    assert "not square in another way than our evaluation" in card
    data = jpeg(391, 250)
    names: dict[str, Any] = {"picture": Image.open(io.BytesIO(data)), "torch": torch, "torchvision": torchvision}
    exec(card.split("```py\n")[1].split("```")[0], names)
    assert pixel_error("picture", names["images"], evaluated(backbone, data, 182), backbone.std) < 0.2
    square = export_timm(backbone_of(SMALL, tmp_path), tmp_path / "square")
    assert square.shifted is not None
    assert square.shifted > 1e-3
    assert f"differed by {square.shifted:.3g} of its size" in (tmp_path / "square/README.md").read_text()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"size": {"height": 96, "width": 96}, "do_center_crop": False}, "landscape of 242 x 159"),
        ({"size": {"shortest_edge": 109}}, "landscape of 242 x 159"),
        ({"size": {"shortest_edge": 96}}, "landscape"),
        ({"resample": 2}, "landscape"),
        ({"rescale_factor": 1 / 256}, "landscape"),
        ({"image_mean": [0.4, 0.4, 0.45]}, "landscape"),
        ({"crop_size": {"height": 80, "width": 96}}, r"becomes an input of \[1, 3, 80, 96\]"),
    ],
    ids=["squashed", "a pixel smaller", "not larger", "bilinear", "scale", "mean", "crop"],
)
def test_other_preprocessing_for_transformers_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], message: str
) -> None:
    right = transformers_image.preprocessor
    monkeypatch.setattr(transformers_image, "preprocessor", lambda source: right(source) | changed)
    with pytest.raises(ExportError, match=message):
        export_vit(backbone_of(SMALL, tmp_path), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changed",
    [{"crop_pct": 224 / 256}, {"crop_pct": 1.0}, {"crop_mode": "squash"}, {"interpolation": "bilinear"}],
    ids=["as for 224", "none", "squashed", "bilinear"],
)
def test_other_preprocessing_for_timm_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]
) -> None:
    right = timm_export.timm_config

    def wrong(backbone: Backbone, pool: timm_export.Pool) -> dict[str, Any]:
        description = right(backbone, pool)
        return description | {"pretrained_cfg": description["pretrained_cfg"] | changed}

    monkeypatch.setattr(timm_export, "timm_config", wrong)
    with pytest.raises(ExportError, match=r"other pixels than our evaluation for the landscape of 239 x 159"):
        export_timm(backbone_of(SMALL, tmp_path), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_features_of_a_picture_that_differ_are_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal pixels and a model that is another one for pictures than for the random input."""
    monkeypatch.setattr("pretrain.export.transformers_image.compare", lambda encoder, theirs: {"features": 0.0})
    described = transformers_image.encoder_arguments
    monkeypatch.setattr(
        transformers_image, "encoder_arguments", lambda config: described(config) | {"layer_norm_eps": 1.0}
    )
    with pytest.raises(ExportError, match="features of the landscape of 242 x 159, from the file on, differ"):
        export_vit(backbone_of(SMALL, tmp_path), tmp_path / "out")


@pytest.fixture(scope="module")
def deep_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on 16 bits."""
    return train_on_images(tmp_path_factory.mktemp("deep"), "data.bit_depth=16")


def test_sixteen_bits_go_where_the_cards_say(deep_run: Path, tmp_path: Path) -> None:
    backbone = load_backbone(deep_run)
    stored = (detail(50, 77, 3) * 65535).round().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    np.save(buffer, stored.astype(np.uint16))
    ours = evaluated(backbone, buffer.getvalue(), 16)
    exported = export_vit(backbone, tmp_path / "hf")
    assert max(errors["pixels"] for errors in exported.pictures.values()) < 0.01
    processor = transformers.AutoImageProcessor.from_pretrained(exported.folder)
    theirs = processor(stored.astype(np.float32), input_data_format="channels_last", return_tensors="pt").pixel_values
    assert pixel_error("picture", theirs, ours, backbone.std) < 0.01
    assert 'astype("float32"), input_data_format="channels_last"' in (exported.folder / "README.md").read_text()
    assert max(errors["pixels"] for errors in export_timm(backbone, tmp_path / "tm").pictures.values()) < 0.01
    assert "float() / 65535" in (tmp_path / "tm/README.md").read_text()
    graphs = export_backbone_onnx(backbone, tmp_path / "onnx")
    assert max(errors["pixels"] for errors in graphs.pictures.values()) < 0.01


def test_a_whole_run_has_its_pictures_in_the_summary(deep_run: Path, tmp_path: Path) -> None:
    summary = export_model(deep_run, tmp_path / "out", "transformers", pretraining=True).summary
    pictures = summary["pictures"]
    assert isinstance(pictures, dict)
    assert [set(errors) for errors in pictures.values()] == [{"pixels", "features"}] * 3


@pytest.mark.parametrize("kind", ["image", pytest.param("clips", marks=pytest.mark.slow)])
def test_the_function_of_an_onnx_card_makes_our_evaluations_pixels(tmp_path: Path, kind: str) -> None:
    config = SMALL if kind == "image" else CLIPS
    backbone = backbone_of(config, tmp_path)
    exported = export_backbone_onnx(backbone, tmp_path / "out")
    assert len(exported.pictures) == 3
    assert 0.0 < max(errors["pixels"] for errors in exported.pictures.values()) < 0.2
    data = jpeg(391, 250)
    picture = Image.open(io.BytesIO(data))
    names: dict[str, Any] = {"picture": picture, "frames": [np.asarray(picture)] * 4}
    exec((exported.folder / "README.md").read_text().split("```py\n")[1].split("```")[0], names)
    if kind == "image":
        ours = EvalTransform((96, 96), 110)(decode_image(data, 3))[None]
    else:
        ours = cut_crops(decode_image(data, 3)[None].repeat(4, 1, 1, 1), (32, 32), None, 1)[0].transpose(0, 1)[None]
    assert pixel_error("picture", torch.from_numpy(names["pixels"]), ours.float() / 255.0, (1.0,) * 3) < 0.2


def test_a_card_whose_function_does_something_else_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bilinear(stored: Any, size: Any, short_side: Any, **options: Any) -> Any:
        return preprocess(stored, size, short_side, Image.Resampling.BILINEAR, **options)

    monkeypatch.setattr(onnx_pictures, "preprocess", bilinear)
    with pytest.raises(ExportError, match="other pixels than our evaluation for the landscape"):
        export_backbone_onnx(backbone_of(SMALL, tmp_path), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_printed_function_is_the_one_that_is_used() -> None:
    names: dict[str, Any] = {}
    exec(source_code(), names)
    stored = (detail(50, 70, 3) * 255).byte().permute(1, 2, 0).numpy()
    for short_side in (40, None):
        assert np.array_equal(
            names["preprocess"](stored, (20, 36), short_side), preprocess(stored, (20, 36), short_side)
        )


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pictures_go_to_diffusers_through_its_own_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, channels: int
) -> None:
    tokenizer = make_tokenizer(tiny(in_channels=channels))
    exported = export_diffusers(tokenizer, tmp_path / "out")
    assert [name.split()[0] for name in exported.pictures] == ["landscape", "portrait", "square"]
    assert max(errors["pixels"] for errors in exported.pictures.values()) < 1e-3
    files = picture_files((96, 96), 110, channels)  # whose sides the factor does not divide: diffusers resizes them
    monkeypatch.setattr(diffusers, "tokenizer_files", lambda tokenizer: files)
    with pytest.raises(ExportError, match="the landscape of 242 x 159 becomes an input of"):
        export_diffusers(tokenizer, tmp_path / "other")


def test_pictures_have_detail_and_tell_one_pixel_apart(tmp_path: Path) -> None:
    view = evaluation_view(backbone_of(SMALL, tmp_path))
    for file in (*picture_files((96, 96), 110, 3), *frame_files(3)):
        picture = file.decoded().float()
        assert picture.std() > 20.0
        assert (picture[..., 1:] - picture[..., :-1]).square().mean().sqrt() > 1.0
    picture = view(picture_files((96, 96), 110, 3)[0].decoded()).float()[None]
    assert pixel_error("picture", picture.roll(1, dims=-1), picture, (1 / 255,) * 3) > 2.0
