"""Exports in the authors' layouts: their names and files, imported again bit for bit, and refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretrain.export import original as original_export
from pretrain.export.original import ENTRIES, export_original, outputs, read_back, why_not
from pretrain.export.publish import ExportError
from pretrain.models.config import MAEConfig, ViTConfig
from pretrain.models.mae import MAE
from pretrain.models.tokenizers.dc_ae import DCAE
from pretrain.models.video_config import VideoMAEConfig, VideoViTConfig
from pretrain.models.video_mae import VideoMAE
from pretrain.models.vit import ViT
from pretrain.weights.backbone import load_backbone
from pretrain.weights.starting import initialize
from tests.pretrain.export.tiny_runs import train_on_clips, train_on_images
from tests.pretrain.tiny_tokenizer import random_tokenizer
from tests.pretrain.weights.tiny_dc_ae import KINDS, make_tokenizer

NAMES = {
    "mae": {
        "cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.1.attn.qkv.bias", "norm.weight", "mask_token",
        "decoder_embed.weight", "decoder_pos_embed", "decoder_blocks.0.norm1.bias", "decoder_norm.weight",
        "decoder_pred.bias",
    },
    "video_mae": {
        "encoder.patch_embed.proj.weight", "encoder.blocks.1.attn.q_bias", "encoder.blocks.0.attn.v_bias",
        "encoder.blocks.0.attn.qkv.weight", "encoder.norm.weight", "encoder_to_decoder.weight", "mask_token",
        "decoder.blocks.0.mlp.fc1.bias", "decoder.norm.bias", "decoder.head.weight",
    },
    "mae_st": {
        "cls_token", "decoder_cls_token", "mask_token", "pos_embed_spatial", "pos_embed_temporal", "pos_embed_class",
        "decoder_pos_embed_class", "blocks.1.attn.q.weight", "blocks.1.attn.k.bias", "decoder_blocks.0.attn.v.weight",
        "decoder_embed.bias", "decoder_pred.weight",
    },
}  # fmt: skip
"""Of each layout, as the authors' files have them."""
MAE_ST = [
    "objective.name=mae_st",
    "objective.repeats=1",
    "objective.model.encoder.family=mae_st",
    "objective.model.predicted_frames=2",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of a run of each masked autoencoder."""
    folders = {layout: tmp_path_factory.mktemp(layout) for layout in NAMES}
    return {
        "mae": train_on_images(folders["mae"]),
        "video_mae": train_on_clips(folders["video_mae"]),
        "mae_st": train_on_clips(folders["mae_st"], *MAE_ST),
    }


def load(folder: Path, entry: str) -> dict[str, Tensor]:
    """As the authors' scripts do, but for `weights_only`."""
    content = torch.load(folder / "model.pth", map_location="cpu", weights_only=True)
    assert list(content) == [entry]
    state: dict[str, Tensor] = content[entry]
    return state


def without_key_biases(model: nn.Module) -> nn.Module:
    """What VideoMAE's layout can hold: softmax ignores a key's bias, and rounding does not."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("attn.qkv.bias"):
                parameter.chunk(3)[1].zero_()
    return model


@pytest.mark.parametrize("layout", NAMES)
def test_a_run_is_imported_again_bit_for_bit(runs: dict[str, Path], layout: str, tmp_path: Path) -> None:
    """The moving average, by the way that `objective.init_from` takes, into a run that has other weights."""
    backbone = load_backbone(runs[layout], ema=True)
    exported = export_original(backbone, tmp_path / "out")
    assert (exported.layout, exported.digest) == (layout, backbone.digest)
    assert set(exported.errors) == {"predictions"}
    assert exported.errors["predictions"] == 0.0 or layout == "video_mae"
    state = load(tmp_path / "out", "model")
    assert NAMES[layout] <= state.keys()
    assert backbone.config is not None
    objective = backbone.config.build_objective()
    initialize(objective, seed=7, init_from=str(tmp_path / "out" / "model.pth"))
    whole = original_export.whole_model(backbone)
    expected = whole if layout != "video_mae" else without_key_biases(whole)
    imported = objective.players["model"]
    assert isinstance(imported, MAE | VideoMAE)
    assert isinstance(expected, MAE | VideoMAE)
    for (_, theirs), (_, ours) in zip(outputs(imported), outputs(expected), strict=True):
        assert torch.equal(theirs, ours)
    again = original_export.to_original(imported)
    assert again.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_is_imported_again_bit_for_bit(tmp_path: Path, kind: str) -> None:
    tokenizer = make_tokenizer(KINDS[kind])
    exported = export_original(tokenizer, tmp_path / "out")
    assert exported.errors == {"latents": 0.0, "reconstructions": 0.0}
    assert ENTRIES[exported.layout] == "state_dict"
    state = load(tmp_path / "out", "state_dict")
    assert any(".op_list." in name for name in state)
    assert isinstance(tokenizer.model, DCAE)
    imported = read_back(tmp_path / "out" / "model.pth", tokenizer.model)
    for (_, theirs), (_, ours) in zip(outputs(imported), outputs(tokenizer.model), strict=True):
        assert torch.equal(theirs, ours)


def test_an_encoder_without_a_decoder_goes_alone(runs: dict[str, Path], tmp_path: Path) -> None:
    """MAE's own published files are like that; timm's class reads it as MAE's scripts do."""
    timm = pytest.importorskip("timm")
    first = export_original(load_backbone(runs["mae"]), tmp_path / "whole")
    arguments: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    encoder = ViT(ViTConfig((16, 16), (8, 8), width=24, depth=2, heads=2))
    encoder.load_state_dict(load_backbone(runs["mae"]).model.state_dict())
    alone = replace(load_backbone(runs["mae"]), model=encoder.eval(), checkpoint=None, complete=None)
    exported = export_original(alone, tmp_path / "alone")
    assert exported.errors == {"features": 0.0}
    state = load(exported.folder, "model")
    whole = load(first.folder, "model")
    assert state.keys() == {name for name in whole if not name.startswith(("decoder_", "mask_token"))}
    theirs = timm.create_model("vit_base_patch16_224", num_classes=0, **arguments).eval()
    theirs.load_state_dict(state, strict=True)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(theirs.forward_features(images), encoder(images), rtol=1e-5, atol=1e-5)


def test_the_card_builds_the_model(runs: dict[str, Path], tmp_path: Path) -> None:
    export_original(load_backbone(runs["mae_st"]), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for line in ("# in github.com/facebookresearch/mae_st", "    t_patch_size=2,", "    pred_t_dim=2,"):
        assert line in card.splitlines()
    assert "optimizer step" in card


def mae(image_size: tuple[int, int], patch_size: tuple[int, int]) -> MAE:
    return MAE(MAEConfig(ViTConfig(image_size, patch_size, width=24, depth=1, heads=2), 8, 1, 2))


def video_mae(predicted_frames: int | None = None, **fields: Any) -> VideoMAE:
    encoder = replace(VideoViTConfig(4, (16, 16), 2, (8, 8), 3, 24, 1, 2), **fields)
    return VideoMAE(VideoMAEConfig(encoder, 16, 1, 2, predicted_frames))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (mae((16, 32), (8, 8)), "its images are 16 x 32 and its patches 8 x 8 pixels; there they are square"),
        (mae((16, 16), (4, 8)), "its images are 16 x 16 and its patches 4 x 8"),
        (video_mae(image_size=(16, 24), family="mae_st"), "its images are 16 x 24"),
        (video_mae(patch_size=(4, 8)), "its patches 4 x 8"),
        (video_mae(in_channels=1), "it predicts 128 values of a token; there it must be 3 channels of all 128 pixels"),
        (video_mae(predicted_frames=2), "it predicts 192 values of a token; there it must be 3 channels of all 128"),
        (nn.Linear(1, 1), "it is a Linear; there are those of MAE"),
    ],
    ids=["image", "patch", "mae-st", "tubelet", "channels", "frames", "other"],
)
def test_what_the_originals_cannot_express_is_refused(model: nn.Module, reason: str) -> None:
    assert reason in str(why_not(model))


def test_videos_need_not_be_square() -> None:
    assert why_not(video_mae(image_size=(16, 24))) is None


def test_a_tokenizer_of_another_kind_is_refused(tmp_path: Path) -> None:
    class Other(DCAE):
        pass

    tokenizer = random_tokenizer()
    assert isinstance(tokenizer.model, DCAE)
    with pytest.raises(ValueError, match="this model has no original layout: it is a Other"):
        export_original(replace(tokenizer, model=Other(tokenizer.model.config)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_computes_something_else_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    to_original = original_export.to_original
    spoiled = lambda model: {name: 1.01 * t if t.ndim == 4 else t for name, t in to_original(model).items()}
    monkeypatch.setattr(original_export, "to_original", spoiled)
    with pytest.raises(ExportError, match="latents differ"):
        export_original(make_tokenizer(KINDS["residual"]), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="never overwritten"):
        export_original(make_tokenizer(KINDS["residual"]), tmp_path)
