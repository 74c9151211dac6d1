"""Exports to transformers: features, predictions and loss of the reloaded model are ours, or nothing is published."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pretrain.checkpoint.open_folder import open_folder
from pretrain.checkpoint.read import load_weights, newest_complete, read_complete
from pretrain.config import load_run_config
from pretrain.export import transformers_video as export
from pretrain.export.publish import ExportError
from pretrain.export.transformers_video import export_videomae, why_not
from pretrain.models.config import ViTConfig
from pretrain.models.video_config import VideoMAEConfig, VideoViTConfig
from pretrain.models.video_mae import VideoMAE
from pretrain.models.video_masking import tube_masks
from pretrain.models.video_vit import VideoViT
from pretrain.models.vit import ViT
from pretrain.objectives.clip_mae import ClipMAEObjective
from pretrain.weights.backbone import Backbone, Weights, weights_digest
from pretrain.weights.video import load_video_weights
from tests.pretrain.exact import EXACT, StaysDouble, relative_error
from tests.pretrain.export.random_backbones import backbone_of
from tests.pretrain.export.tiny_runs import train_on_clips

transformers = pytest.importorskip("transformers", minversion="5.0")

SMALL = VideoViTConfig(4, (16, 16), 2, (8, 8), 3, 24, 2, 2)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_on_clips(tmp_path_factory.mktemp("clips"))


def backbone_of_run(run_dir: Path, weights: Weights = "trained") -> Backbone:
    checkpoint = newest_complete(open_folder(run_dir))
    assert checkpoint is not None
    config = load_run_config(checkpoint)
    objective = config.build_objective()
    model = objective.build_backbone()
    assert isinstance(model, VideoViT)
    state = load_weights(checkpoint, "model", ema=weights == "ema")
    model.load_state_dict({n.removeprefix("encoder."): t for n, t in state.items() if n.startswith("encoder.")})
    return Backbone(
        model=model.eval(),
        mean=objective.mean,
        std=objective.std,
        weights=weights,
        label=checkpoint.name,
        source=str(checkpoint),
        digest=weights_digest(model.state_dict()),
        step=2,
        config=config,
        checkpoint=checkpoint,
        complete=read_complete(checkpoint),
        run_dir=run_dir,
    )


SHAPES = {
    "square": SMALL,
    "not-square": replace(SMALL, image_size=(16, 48)),
    "patches-not-square": replace(SMALL, patch_size=(4, 16)),
    "one-channel": replace(SMALL, in_channels=1),
    "five-channels": replace(SMALL, in_channels=5),
    "tubelets-of-one-frame": replace(SMALL, tubelet_size=1),
    "mlp-of-the-giant": replace(SMALL, mlp_ratio=48 / 11),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_computes_our_features(tmp_path: Path, shape: str) -> None:
    config = SHAPES[shape]
    backbone = backbone_of(config, tmp_path)
    exported = export_videomae(backbone, tmp_path / "out")
    assert exported.errors["features"] <= 1e-5
    assert set(exported.errors) == {"features"}
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    assert type(theirs) is transformers.VideoMAEModel
    clips = torch.randn(2, config.in_channels, *config.clip_size).double()
    with torch.no_grad(), StaysDouble():
        hidden = theirs.double()(clips.transpose(1, 2)).last_hidden_state
        assert relative_error(hidden, backbone.model.double()(clips)) <= EXACT


@pytest.mark.parametrize("weights", ["trained", "ema"])
def test_the_whole_model_of_a_run_has_our_predictions_and_loss(run_dir: Path, tmp_path: Path, weights: Weights) -> None:
    backbone = backbone_of_run(run_dir, weights)
    exported = export_videomae(backbone, tmp_path / "out", pretraining=True)
    errors = dict(exported.errors)
    assert 1e-7 < errors.pop("eps_effect") < 1e-3
    assert set(errors) == {"features", "predictions", "loss"}
    assert max(errors.values()) <= 1e-5
    theirs, info = transformers.VideoMAEForPreTraining.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert (backbone.digest == backbone_of_run(run_dir).digest) == (weights == "trained")
    assert backbone.config is not None
    model = VideoMAE(backbone.config.objective.model).eval()
    model.load_state_dict(load_weights(open_folder(backbone.source), "model", ema=weights == "ema"))
    model.decoder.norm.eps = 1e-5
    clips = torch.randn(2, 3, 4, 16, 16).double()
    mask = tube_masks(torch.arange(2), 1, SMALL.grid_size, 0.5, 7)
    with torch.no_grad(), StaysDouble():
        ours = model.double()(clips, mask, torch.zeros(2, 4, 2 * 8 * 8 * 3)).prediction
        logits = theirs.double().eval()(clips.transpose(1, 2), bool_masked_pos=mask.hidden(8)).logits
    assert relative_error(logits, ours) <= EXACT


@pytest.mark.parametrize("pretraining", [False, True])
def test_an_export_is_read_back_as_the_same_weights(run_dir: Path, tmp_path: Path, pretraining: bool) -> None:
    backbone = backbone_of_run(run_dir)
    export_videomae(backbone, tmp_path / "out", pretraining=pretraining)
    assert backbone.config is not None
    model = VideoMAE(backbone.config.objective.model)
    missing = load_video_weights(tmp_path / "out", model)
    assert (missing == []) == pretraining
    clips = torch.randn(1, 3, 4, 16, 16)
    torch.testing.assert_close(model.encoder(clips), backbone.model(clips), rtol=1e-5, atol=1e-5)
    assert torch.equal(model.encoder.positions.table, backbone.model.positions.table)


def test_the_folder_has_what_the_next_user_needs(run_dir: Path, tmp_path: Path) -> None:
    exported = export_videomae(backbone_of_run(run_dir), tmp_path / "deep/out", pretraining=True)
    names = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
    assert sorted(path.name for path in exported.folder.iterdir()) == names
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]  # no temporary folder stays
    config = json.loads((exported.folder / "config.json").read_text())
    assert (config["layer_norm_eps"], config["use_mean_pooling"], config["norm_pix_loss"]) == (1e-6, False, True)
    card = (exported.folder / "README.md").read_text()
    for text in (
        f"| weights sha256 | {exported.digest} |",
        "| optimizer step | 2 |",
        "| frames | 4 of a video, 2 from one to the next |",
        f"of the loss: {exported.errors['loss']:.3g}; allowed: 1e-05",
        "1e-6, which changes the predictions by",
        "- videomae",
    ):
        assert text in card, text


def test_files_have_the_names_of_version_4_which_version_5_reads(run_dir: Path, tmp_path: Path) -> None:
    names = set(load_file(export_videomae(backbone_of_run(run_dir), tmp_path / "a").folder / "model.safetensors"))
    assert "encoder.layer.1.attention.attention.q_bias" in names
    assert "layernorm.weight" in names
    whole = export_videomae(backbone_of_run(run_dir), tmp_path / "b", pretraining=True).folder
    names = set(load_file(whole / "model.safetensors"))
    assert "videomae.encoder.layer.0.attention.attention.v_bias" in names
    assert "decoder.decoder_layers.0.attention.attention.q_bias" in names
    assert not [name for name in names if "position" in name or "key.bias" in name]


@pytest.mark.parametrize("pretraining", [False, True])
def test_the_snippet_of_the_card_runs(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pretraining: bool
) -> None:
    backbone = backbone_of_run(run_dir)
    exported = export_videomae(backbone, tmp_path / "out", pretraining=pretraining)
    code = (exported.folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    frames = np.random.default_rng(0).integers(0, 256, (4, 20, 30, 3), dtype=np.uint8)
    hidden = tube_masks(torch.arange(1), 1, SMALL.grid_size, 0.5, 0).hidden(8)
    names: dict[str, Any] = {"frames": list(frames), "hidden": hidden}
    exec(code, names)
    assert names["clips"].shape == (1, 4, 3, 16, 16)
    expected = backbone.model(names["clips"].transpose(1, 2))
    torch.testing.assert_close(names["tokens"], expected, rtol=1e-4, atol=1e-4)


def test_a_user_can_add_a_head(run_dir: Path, tmp_path: Path) -> None:
    """As the card says."""
    exported = export_videomae(backbone_of_run(run_dir), tmp_path / "out")
    model, info = transformers.VideoMAEForVideoClassification.from_pretrained(
        exported.folder, use_mean_pooling=True, num_labels=7, output_loading_info=True
    )
    assert all(name.startswith(("fc_norm.", "classifier.")) for name in info["missing_keys"])
    assert model(torch.randn(2, 4, 3, 16, 16)).logits.shape == (2, 7)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_preprocessor_makes_our_pixels(tmp_path: Path, channels: int) -> None:
    backbone = backbone_of(replace(SMALL, image_size=(16, 24), in_channels=channels), tmp_path)
    exported = export_videomae(backbone, tmp_path / "out")
    assert exported.has_processor
    spoiled = json.loads((exported.folder / "preprocessor_config.json").read_text())
    (exported.folder / "preprocessor_config.json").write_text(json.dumps(spoiled | {"image_std": [0.26] * channels}))
    assert export.compare_pixels(backbone, backbone.model.config, exported.folder) > 0.03


def test_without_a_preprocessor_for_five_channels_the_card_has_none(tmp_path: Path) -> None:
    exported = export_videomae(backbone_of(SHAPES["five-channels"], tmp_path), tmp_path / "out")
    assert not exported.has_processor
    assert not (exported.folder / "preprocessor_config.json").exists()
    assert "VideoMAEImageProcessor" not in (exported.folder / "README.md").read_text()


def test_features_that_differ_are_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described = export.transformers_encoder_arguments
    monkeypatch.setattr(export, "transformers_encoder_arguments", lambda c: described(c) | {"layer_norm_eps": 1e-3})
    with pytest.raises(ExportError, match=r"features differ from ours by .* of their size, more than 1e-05"):
        export_videomae(backbone_of(SMALL, tmp_path), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_transformers_only_warns_of_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor under another name: there the layer would be random."""
    to_theirs = export.to_transformers

    def renamed(state: Any, major: Any) -> dict[str, torch.Tensor]:
        names = to_theirs(state, major)
        return {name.replace("layer.1.intermediate", "layer.1.mlp"): tensor for name, tensor in names.items()}

    monkeypatch.setattr(export, "to_transformers", renamed)
    with pytest.raises(ExportError, match=r"did not load the export completely: .*layer\.1\.intermediate\.dense"):
        export_videomae(backbone_of(SMALL, tmp_path), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="exports are never overwritten"):
        export_videomae(backbone_of(SMALL, tmp_path), tmp_path / "out")


def test_mae_st_and_image_encoders_are_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^This model cannot become a transformers VideoMAE: its positions are lear"):
        export_videomae(backbone_of(replace(SMALL, family="mae_st"), tmp_path), tmp_path / "out")
    image = replace(backbone_of(SMALL, tmp_path), model=ViT(ViTConfig((16, 16), (8, 8), 3, 24, 2, 2)))
    with pytest.raises(ValueError, match="it is a ViT, and only encoders of clips have a counterpart"):
        export_videomae(image, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_without_a_checkpoint_there_is_no_decoder_to_export(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"random \(imported\) has no decoder beside it"):
        export_videomae(backbone_of(SMALL, tmp_path), tmp_path / "out", pretraining=True)
    untrained = replace(backbone_of_run(run_dir), weights="untrained")
    assert "has no decoder beside it" in str(why_not(untrained, pretraining=True))


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        ({"predicted_frames": 2}, {}, "it predicts a part of the frames; there all are predicted"),
        ({}, {"norm_pixels": False, "mean": (0.4,) * 3, "std": (0.2,) * 3}, r"it predicts raw pixels and sees them"),
    ],
)
def test_targets_that_transformers_does_not_have_are_refused_for_pretraining_alone(
    run_dir: Path, model: dict[str, Any], fields: dict[str, Any], message: str
) -> None:
    backbone = backbone_of_run(run_dir)
    assert backbone.config is not None
    objective = backbone.config.objective
    changed = replace(objective, model=replace(objective.model, **model), **fields)
    config = replace(backbone.config, objective=changed)
    statistics = {name: fields[name] for name in ("mean", "std") if name in fields}
    backbone = replace(backbone, config=config, **statistics)
    assert message in str(why_not(backbone, pretraining=True))
    assert why_not(backbone) is None


@pytest.mark.parametrize("norm_pixels", [True, False])
def test_the_loss_is_theirs_on_their_scale_of_pixels(norm_pixels: bool) -> None:
    """`compare_pretraining` itself, on a model whose decoder makes a difference, and with the wrong target."""
    config = VideoMAEConfig(SMALL, 16, 1, 2)
    objective = clip_objective(config, norm_pixels)
    theirs = transformers.VideoMAEForPreTraining(
        transformers.VideoMAEConfig(**export.transformers_arguments(config, norm_pixels))
    ).eval()
    theirs.load_state_dict(export.to_transformers(objective.model.state_dict()))
    errors = export.compare_pretraining(objective, theirs)
    assert max(errors["predictions"], errors["loss"]) <= 1e-5
    assert objective.model.decoder.norm.eps == 1e-6  # put back
    theirs.config.norm_pix_loss = not norm_pixels
    assert export.compare_pretraining(objective, theirs)["loss"] > 0.1


def clip_objective(config: VideoMAEConfig, norm_pixels: bool) -> ClipMAEObjective:
    from pretrain.objectives.mae_config import VideoMAEObjectiveConfig
    from pretrain.objectives.video_mae import video_mae_objective

    objective = video_mae_objective(VideoMAEObjectiveConfig(config, mask_ratio=0.5, norm_pixels=norm_pixels), 0)
    objective.model.eval()
    return objective
