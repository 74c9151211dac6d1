"""Exports to ONNX: onnxruntime computes our outputs for sizes that were not traced, or nothing is published."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from pretrain.export import onnx as onnx_export
from pretrain.export.onnx import OnnxExport, export_onnx
from pretrain.export.onnx_models import export_backbone_onnx, export_tokenizer_onnx
from pretrain.export.publish import ExportError
from pretrain.models.config import ViTConfig
from pretrain.models.tokenizers.config import ViTAutoencoderConfig
from pretrain.models.tokenizers.vit_autoencoder import ViTAutoencoder
from pretrain.models.video_config import VideoViTConfig
from pretrain.models.video_vit import VideoViT
from pretrain.models.vit import ViT
from pretrain.weights.backbone import Backbone, weights_digest
from pretrain.weights.tokenizer import LoadedTokenizer
from tests.pretrain.weights.tiny_dc_ae import make_tokenizer, tiny

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


def run(path: Path, **inputs: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    outputs = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return [torch.from_numpy(output) for output in outputs]


class Scaled(nn.Module):
    """x [B, N] -> (x W, twice its sum)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.linear(x)
        return y, 2.0 * y.sum(dim=1)


def export_scaled(module: nn.Module, out: Path, **options: Any) -> OnnxExport:
    return export_onnx(module, (torch.randn(2, 4),), out, input_names=["x"], output_names=["y", "total"], **options)


@pytest.fixture(scope="module")
def tokenizer() -> LoadedTokenizer:
    """One block of each kind, and statistics that tell the channels apart."""
    config = tiny(
        widths=(16, 32),
        encoder_depths=(1, 1),
        decoder_depths=(1, 1),
        blocks=("res", "multiscale"),
        decoder_norms=("batch", "rms"),
    )
    return replace(make_tokenizer(config), mean=(0.4, 0.5, 0.6), std=(0.5, 0.4, 0.3))


@pytest.fixture(scope="module")
def exported(tokenizer: LoadedTokenizer, tmp_path_factory: pytest.TempPathFactory) -> OnnxExport:
    return export_tokenizer_onnx(tokenizer, tmp_path_factory.mktemp("onnx") / "out")


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> OnnxExport:
    return export_scaled(Scaled(), tmp_path_factory.mktemp("onnx") / "out")


def test_any_module_is_exported_with_a_dynamic_batch(scaled: OnnxExport) -> None:
    assert sorted(path.name for path in scaled.folder.iterdir()) == ["README.md", "model.onnx", "model.onnx.data"]
    assert [path.name for path in scaled.folder.parent.iterdir()] == ["out"]  # no temporary folder stays
    assert scaled.errors.keys() == {"y", "total"}
    assert max(scaled.errors.values()) <= 1e-6
    x = torch.randn(7, 4)
    for theirs, ours in zip(run(scaled.folder / "model.onnx", x=x), Scaled()(x), strict=True):
        torch.testing.assert_close(theirs, ours)
    card = (scaled.folder / "README.md").read_text()
    assert "| model.onnx | x [batch, 4] -> y, total |" in card
    assert "allowed: 1e-05" in card


@pytest.mark.parametrize("change", [1e-3, float("nan")])
def test_outputs_that_differ_are_not_published(
    scaled: OnnxExport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: float
) -> None:
    module = Scaled()
    with torch.no_grad():
        module.linear.weight[0, 0] += change
    monkeypatch.setattr(onnx_export, "write_graph", lambda _, folder: copy_files(scaled.folder, folder))
    with pytest.raises(ExportError, match=r"model's y differ from ours by .* more than 1e-05"):
        export_scaled(module, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def copy_files(source: Path, folder: Path) -> None:
    shutil.copytree(source, folder, dirs_exist_ok=True)


def test_a_batch_that_tracing_has_fixed_is_not_published(tmp_path: Path) -> None:
    class Counts(Scaled):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.linear(x), torch.ones(len(x)) * x.sum(dim=1)

    with pytest.raises(ExportError, match=r"axis 0 of x has become the number 2 in model\.onnx: .*Use x\.shape"):
        export_scaled(Counts(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_other_axes_can_be_dynamic_and_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    class Mean(nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            return (x * weight[:, None, None]).mean(dim=(1, 2))

    batch = Dim("batch")
    exported = export_onnx(
        Mean(),
        (torch.ones(2, 4, 6), torch.ones(2)),
        tmp_path / "out",
        input_names=["x", "weight"],
        output_names=["mean"],
        dynamic=[{0: batch, 1: Dim("rows")}, {0: batch}],
        checks=[(torch.randn(3, 5, 6), torch.randn(3))],
    )
    x, weight = torch.randn(1, 9, 6), torch.randn(1)
    torch.testing.assert_close(run(exported.folder / "model.onnx", x=x, weight=weight)[0], Mean()(x, weight))
    with pytest.raises(FileExistsError, match="exports are never overwritten"):
        export_scaled(Scaled(), tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1, 2, 2), (3, 30, 8), (1, 4, 34)], ids=str)
def test_tokenizers_encode_and_decode_any_batch_and_size(
    exported: OnnxExport, tokenizer: LoadedTokenizer, size: tuple[int, int, int]
) -> None:
    batch, height, width = size
    pixels = torch.randint(0, 256, (batch, 3, height, width), generator=torch.Generator().manual_seed(1)) / 255.0
    mean, std = torch.tensor(tokenizer.mean)[:, None, None], torch.tensor(tokenizer.std)[:, None, None]
    with torch.no_grad():
        expected = tokenizer.model.encode((pixels - mean) / std)
        expected_pixels = tokenizer.model.decode(expected) * std + mean
    (latent,) = run(exported.folder / "encoder.onnx", images=pixels)
    assert latent.shape == (batch, 8, height // 2, width // 2)
    torch.testing.assert_close(latent, expected, atol=1e-5, rtol=1e-4)
    (reconstruction,) = run(exported.folder / "decoder.onnx", latent=latent)
    torch.testing.assert_close(reconstruction, expected_pixels, atol=1e-5, rtol=1e-4)


def test_a_tokenizers_folder_has_what_the_next_user_needs(
    exported: OnnxExport, tokenizer: LoadedTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["README.md", *(f"{part}.onnx{suffix}" for part in ("decoder", "encoder") for suffix in ("", ".data"))]
    assert sorted(path.name for path in exported.folder.iterdir()) == names
    assert exported.files == ("encoder.onnx", "decoder.onnx")
    assert all(0.0 < error <= 1e-5 for error in exported.errors.values())
    card = (exported.folder / "README.md").read_text()
    assert "| encoder.onnx | images [batch, 3, 2*rows, 2*columns] -> latent |" in card
    assert "mean [0.4, 0.5, 0.6], std [0.5, 0.4, 0.3]" in card
    assert f"| weights sha256 | {tokenizer.digest} |" in card
    monkeypatch.chdir(exported.folder.parent)
    used: dict[str, Any] = {"images": np.zeros((1, 3, 8, 6), np.float32)}
    exec(card.split("```python\n")[1].split("```")[0], used)
    assert used["reconstruction"].shape == (1, 3, 8, 6)


def test_weights_lie_beside_the_graphs_wherever_the_folder_goes(exported: OnnxExport, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported.folder, tmp_path / "copy"))
    images = torch.rand(1, 3, 4, 4)
    before = run(exported.folder / "encoder.onnx", images=images)
    assert torch.equal(run(folder / "encoder.onnx", images=images)[0], before[0])
    (folder / "encoder.onnx.data").unlink()
    with pytest.raises(Exception, match=r"encoder\.onnx\.data"):
        run(folder / "encoder.onnx", images=images)


@pytest.mark.slow
def test_a_transformer_tokenizer_is_exported_for_one_size(tmp_path: Path) -> None:
    """Its positions are computed for the size that is traced."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ViTAutoencoder(
            ViTAutoencoderConfig(
                patch_size=4,
                latent_channels=8,
                encoder_width=32,
                encoder_depth=1,
                encoder_heads=2,
                decoder_width=32,
                decoder_depth=1,
                decoder_heads=2,
            )
        )
        model.init_weights()
    half = (0.5,) * 3
    tokenizer = LoadedTokenizer(model.eval(), half, half, "random", Path("random"), weights_digest(model.state_dict()))
    exported = export_tokenizer_onnx(tokenizer, tmp_path / "out", size=(12, 8))
    pixels = torch.rand(5, 3, 12, 8)
    (latent,) = run(exported.folder / "encoder.onnx", images=pixels)
    with torch.no_grad():
        torch.testing.assert_close(latent, model.encode(pixels * 2.0 - 1.0), atol=1e-5, rtol=1e-4)
    assert "Height and width are 12 and 8" in (exported.folder / "README.md").read_text()


def test_a_size_that_is_no_multiple_of_the_factor_is_refused(tokenizer: LoadedTokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"size is \[8, 5\]; expected height and width that are multiples of 2"):
        export_tokenizer_onnx(tokenizer, tmp_path / "out", size=(8, 5))
    assert list(tmp_path.iterdir()) == []


IMAGE = ViT(ViTConfig(image_size=(16, 24), patch_size=(8, 8), width=16, depth=1, heads=2, in_channels=2))
VIDEO = VideoViTConfig(num_frames=4, image_size=(16, 16), patch_size=(8, 8), width=16, depth=1, heads=2, in_channels=2)


@pytest.mark.parametrize(
    ("model", "shape", "names"),
    [
        (IMAGE, (2, 16, 24), ["class_token", "patch_tokens"]),
        pytest.param(VideoViT(VIDEO), (2, 4, 16, 16), ["mean_token", "tokens"], marks=pytest.mark.slow),
        (VideoViT(replace(VIDEO, family="mae_st")), (2, 4, 16, 16), ["class_token", "tokens"]),
    ],
    ids=["image", "video", "mae-st"],
)
def test_features_of_backbones_with_the_normalisation_inside(
    tmp_path: Path, model: Any, shape: tuple[int, ...], names: list[str]
) -> None:
    backbone = Backbone(
        model=model.eval(),
        mean=(0.4, 0.2),
        std=(0.25, 0.5),
        weights="imported",
        label="random",
        source="random",
        digest=weights_digest(model.state_dict()),
    )
    exported = export_backbone_onnx(backbone, tmp_path / "out")
    assert list(exported.errors) == names
    pixels = torch.rand(5, *shape)
    mean, std = (torch.tensor(values).reshape(2, *[1] * (len(shape) - 1)) for values in (backbone.mean, backbone.std))
    with torch.no_grad():
        (expected,) = model.features((pixels - mean) / std)
    for theirs, ours in zip(run(exported.folder / "model.onnx", pixels=pixels), expected, strict=True):
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-4)
    card = (exported.folder / "README.md").read_text()
    assert f"| weights sha256 | {backbone.digest} |" in card
    assert "mean [0.4, 0.2], std [0.25, 0.5]" in card
