"""Starting weights of video autoencoders: every layout, images inflated, and files that fit half load nothing."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from pretrain.checkpoint.open_folder import open_folder
from pretrain.checkpoint.read import load_weights, newest_complete
from pretrain.export.transformers_arguments import transformers_arguments
from pretrain.models.config import MAEConfig, ViTConfig
from pretrain.models.inflate import Inflation
from pretrain.models.mae import MAE
from pretrain.models.positions import sincos_position_embedding, sinusoid_table
from pretrain.models.video_config import VideoMAEConfig, VideoViTConfig
from pretrain.models.video_mae import VideoMAE
from pretrain.models.video_masking import spacetime_masks
from pretrain.weights.files import WeightsError
from pretrain.weights.video import load_video_weights
from pretrain.weights.video_names import to_mae_st, to_original_video_mae, to_transformers
from tests.pretrain.export.tiny_runs import train_on_clips, train_on_images

ENCODER = VideoViTConfig(4, (16, 16), 2, (8, 8), 3, 24, 2, 2)
CONFIGS = {
    "video_mae": VideoMAEConfig(ENCODER, 16, 1, 2),
    "mae_st": VideoMAEConfig(replace(ENCODER, family="mae_st"), 16, 1, 2, predicted_frames=2),
}
VIDEO_MAE, MAE_ST = CONFIGS["video_mae"], CONFIGS["mae_st"]
IMAGE = MAEConfig(
    ViTConfig(image_size=(16, 16), patch_size=(8, 8), width=24, depth=2, heads=2),
    decoder_width=8,
    decoder_depth=1,
    decoder_heads=2,
)

Model = TypeVar("Model", MAE, VideoMAE)


def random(model: Model, seed: int) -> Model:
    """The model with random numbers in every parameter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def make(config: VideoMAEConfig, seed: int) -> VideoMAE:
    return random(VideoMAE(config), seed)


def prediction(model: VideoMAE) -> Tensor:
    encoder = model.config.encoder
    mask = spacetime_masks(torch.arange(2), 1, encoder.grid_size, 0.5, 0)
    clips = torch.randn(2, encoder.in_channels, *encoder.clip_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(clips, mask, torch.zeros(*mask.predict_ids.shape, model.config.target_values)).prediction


def assert_loads(path: Path, saved: VideoMAE) -> None:
    """The whole of `saved`: predictions equal but for rounding, where it was a key's bias that files do not have."""
    loaded = make(saved.config, 2)
    assert not torch.allclose(prediction(loaded), prediction(saved), atol=1e-2)
    assert load_video_weights(path, loaded) == []
    torch.testing.assert_close(prediction(loaded), prediction(saved), rtol=1e-5, atol=1e-6)


def assert_loads_the_encoder(path: Path, saved: VideoMAE) -> None:
    loaded, before = make(saved.config, 2), make(saved.config, 2).state_dict()
    decoder = sorted(name for name in before if name.startswith("decoder."))
    assert load_video_weights(path, loaded) == decoder
    assert all(torch.equal(loaded.state_dict()[name], before[name]) for name in decoder)
    clips = torch.randn(2, 3, 4, 16, 16)
    torch.testing.assert_close(loaded.encoder(clips), saved.encoder(clips), rtol=1e-5, atol=1e-6)


def assert_untouched(path: Path, config: VideoMAEConfig, message: str) -> None:
    """The file is refused with a message, and nothing of it is in the model."""
    loaded = make(config, 2)
    with pytest.raises(WeightsError, match=message):
        load_video_weights(path, loaded)
    before = make(config, 2).state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())


def save_torch(state: Any, folder: Path, name: str = "weights.pth") -> Path:
    torch.save(state, folder / name)
    return folder / name


def save_folder(state: dict[str, Tensor], config: dict[str, Any], folder: Path) -> Path:
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def encoder_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name.startswith("encoder.")}


LAYOUTS: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any]]] = {
    "tessera": ("video_mae", dict),
    "tessera-mae-st": ("mae_st", dict),
    "tessera-compiled": ("video_mae", lambda s: {f"module._orig_mod.{name}": t for name, t in s.items()}),
    "original-v1": ("video_mae", lambda s: {"model": to_original_video_mae(s), "epoch": 1599, "args": VIDEO_ARGS}),
    "original-deepspeed": ("video_mae", lambda s: {"module": to_original_video_mae(s), "epoch": 1}),
    "mae-st": ("mae_st", lambda s: {"model_state": to_mae_st(s), "epoch": 3}),
    "mae-st-training-file": ("mae_st", lambda s: {"model": to_mae_st(s), "optimizer": {"state": {}}}),
    "transformers-5": ("video_mae", to_transformers),
    "transformers-4": ("video_mae", lambda s: to_transformers(s, major=4)),
}
VIDEO_ARGS = argparse.Namespace(lr=1.0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_fills_encoder_and_decoder(tmp_path: Path, layout: str) -> None:
    family, convert = LAYOUTS[layout]
    saved = make(CONFIGS[family], 1)
    assert_loads(save_torch(convert(saved.state_dict()), tmp_path), saved)


def fine_tuned(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of the original's fine-tuned files."""
    tuned = {name.removeprefix("encoder."): t for name, t in to_original_video_mae(encoder_of(state)).items()}
    for kind in ("weight", "bias"):
        tuned[f"fc_norm.{kind}"] = tuned.pop(f"norm.{kind}")
    return tuned | {"head.weight": torch.zeros(7, 24)}


ENCODERS: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any]]] = {
    "tessera": ("video_mae", encoder_of),
    "tessera-bare": ("mae_st", lambda s: {n.removeprefix("encoder."): t for n, t in encoder_of(s).items()}),
    "original-fine-tuned": ("video_mae", lambda s: {"module": fine_tuned(s)}),
    "mae-st-classifier": ("mae_st", lambda s: {"model": to_mae_st(encoder_of(s)) | {"head.bias": torch.zeros(7)}}),
    "transformers-bare": (
        "video_mae",
        lambda s: {n.removeprefix("videomae."): t for n, t in to_transformers(encoder_of(s)).items()},
    ),
    "transformers-classifier": (
        "video_mae",
        lambda s: {
            n.replace("videomae.layernorm.", "fc_norm."): t
            for n, t in (to_transformers(encoder_of(s)) | {"classifier.bias": torch.zeros(7)}).items()
        },
    ),
}


@pytest.mark.parametrize("layout", ENCODERS)
def test_an_encoders_file_leaves_the_decoder_and_names_it(tmp_path: Path, layout: str) -> None:
    family, convert = ENCODERS[layout]
    saved = make(CONFIGS[family], 1)
    assert_loads_the_encoder(save_torch(convert(saved.state_dict()), tmp_path), saved)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_that_transformers_wrote_is_read(tmp_path: Path, file: str) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    arguments = transformers_arguments(VIDEO_MAE, norm_pixels=True)
    theirs = transformers.VideoMAEForPreTraining(transformers.VideoMAEConfig(**arguments))
    saved = make(VIDEO_MAE, 1)
    theirs.load_state_dict(to_transformers(saved.state_dict()), strict=True)
    theirs.save_pretrained(tmp_path / "theirs")
    if file == "pytorch_model.bin":
        (tmp_path / "theirs/model.safetensors").unlink()
        save_torch(theirs.state_dict(), tmp_path / "theirs", file)
    assert_loads(tmp_path / "theirs", saved)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("num_attention_heads", "the encoder has 3 attention heads, the model's 2"),
        ("decoder_num_attention_heads", "the decoder has 3 attention heads, the model's 2"),
    ],
)
def test_other_attention_heads_are_refused(tmp_path: Path, part: str, message: str) -> None:
    """Shapes do not show them."""
    state = to_transformers(make(VIDEO_MAE, 1).state_dict())
    assert_untouched(save_folder(state, {part: 3}, tmp_path / "theirs"), VIDEO_MAE, message)


def test_half_precision_becomes_single(tmp_path: Path) -> None:
    saved, loaded = make(MAE_ST, 1), make(MAE_ST, 2)
    load_video_weights(save_torch({n: t.half() for n, t in saved.state_dict().items()}, tmp_path), loaded)
    assert all(tensor.dtype == torch.float32 for tensor in loaded.state_dict().values())
    torch.testing.assert_close(prediction(loaded), prediction(saved), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("layout", ["tessera", "original-v1", "transformers-5"])
def test_fixed_positions_of_other_clips_are_computed_anew(tmp_path: Path, layout: str) -> None:
    longer = VideoMAEConfig(replace(ENCODER, num_frames=6, image_size=(16, 24)), 16, 1, 2)
    saved, loaded = make(VIDEO_MAE, 1), make(longer, 2)
    assert load_video_weights(save_torch(LAYOUTS[layout][1](saved.state_dict()), tmp_path), loaded) == []
    assert torch.equal(loaded.encoder.positions.table, sinusoid_table(18, 24))
    assert torch.equal(loaded.decoder.positions.table, sinusoid_table(18, 16))
    assert torch.equal(loaded.encoder.blocks[1].mlp.fc1.weight, saved.encoder.blocks[1].mlp.fc1.weight)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_frames": 8}, r"encoder\.positions\.temporal was learned for 2 places or times, the model has 4"),
        ({"image_size": (16, 24)}, r"encoder\.positions\.spatial was learned for 4 places or times, the model has 6"),
    ],
)
def test_learned_positions_of_other_clips_are_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    """The decoder's fit: its positions are missing, so that the encoder's alone are at fault."""
    other = VideoMAEConfig(replace(MAE_ST.encoder, **fields), 16, 1, 2)
    path = save_torch(to_mae_st(encoder_of(make(MAE_ST, 1).state_dict())), tmp_path)
    assert_untouched(path, other, message)


def test_a_stored_sinusoid_is_dropped_and_learned_positions_in_its_place_are_refused(tmp_path: Path) -> None:
    saved = make(VIDEO_MAE, 1)
    state = to_original_video_mae(saved.state_dict())
    assert_loads(save_torch(state | {"encoder.pos_embed": sinusoid_table(8, 24)}, tmp_path), saved)
    learned = save_torch(state | {"encoder.pos_embed": torch.randn(1, 8, 24)}, tmp_path)
    assert_untouched(learned, VIDEO_MAE, r"encoder\.pos_embed was learned; VideoMAE's positions here are its fixed")


def spoil(change: Callable[[dict[str, Tensor]], Any]) -> dict[str, Tensor]:
    state = to_original_video_mae(make(VIDEO_MAE, 1).state_dict())
    change(state)
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("decoder.head.bias"), r"1 missing: decoder\.pred\.bias"),
        (lambda s: s.pop("encoder.blocks.1.mlp.fc2.weight"), r"1 missing: encoder\.blocks\.1\.mlp\.fc2\.weight"),
        (
            lambda s: s.update({"encoder.norm.weight": torch.ones(5)}),
            r"1 of another shape: encoder\.norm\.weight is \[5\], expected \[24\]",
        ),
        (lambda s: s.update({"encoder.blocks.0.gamma_1": torch.ones(24)}), "'gamma_1' is none of a video autoencoder"),
        (lambda s: s.update({"encoder.blocks.2.norm1.bias": torch.ones(24)}), r"unexpected: encoder\.blocks\.2\.norm1"),
        (lambda s: s.update({"surprise": torch.ones(1)}), "'surprise' is none of a video autoencoder"),
    ],
    ids=["half-a-decoder", "missing", "shape", "layer-scale", "deeper", "stranger"],
)
def test_a_file_that_fits_half_loads_nothing(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    assert_untouched(save_torch(spoil(change), tmp_path), VIDEO_MAE, message)


@pytest.mark.parametrize(("file", "into"), [("mae_st", "video_mae"), ("video_mae", "mae_st")])
def test_the_other_family_is_refused_and_named(tmp_path: Path, file: str, into: str) -> None:
    path = save_torch(make(CONFIGS[file], 1).state_dict(), tmp_path)
    assert_untouched(path, CONFIGS[into], f"is of the family '{file}' .*the model of '{into}'")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"conv1.weight": torch.ones(1)}, r"no video autoencoder and no image encoder \(conv1\.weight\)"),
        ({"vit.embeddings.patch_embeddings.projection.weight": torch.ones(2, 3, 8, 8)}, "image model of transformers"),
        ({"cls_token": torch.ones(1), "patch_embed.proj.weight": torch.ones(2, 3, 2, 8, 8)}, "joint positions"),
    ],
)
def test_what_is_no_video_autoencoder_is_refused(tmp_path: Path, state: dict[str, Tensor], message: str) -> None:
    assert_untouched(save_torch(state, tmp_path), VIDEO_MAE, message)


def test_nothing_and_folders_without_weights_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no weights at"):
        load_video_weights(tmp_path / "nothing.pth", make(VIDEO_MAE, 2))
    with pytest.raises(WeightsError, match="holds neither a complete checkpoint nor"):
        load_video_weights(tmp_path, make(VIDEO_MAE, 2))


# Images.


def image_layouts(saved: MAE, folder: Path) -> Iterator[tuple[str, Path]]:
    """The same image MAE in the files that it may come in."""
    state = saved.state_dict()
    original = {}
    for name, tensor in state.items():
        part, rest = name.split(".", 1)
        original[rest if part == "encoder" or rest == "mask_token" else f"decoder_{rest}"] = tensor
    yield "tessera", save_torch(state, folder, "tessera.pth")
    yield "original", save_torch({"model": original}, folder, "original.pth")
    arguments = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    theirs = timm.create_model("vit_base_patch16_224", num_classes=5, **arguments)
    encoder = {name.removeprefix("encoder."): tensor for name, tensor in encoder_of(state).items()}
    theirs.load_state_dict(encoder, strict=False)
    yield "timm", save_folder(theirs.state_dict(), {"model_args": {"num_heads": 2}}, folder / "timm")


@pytest.mark.parametrize("how", ["average", "centre"])
@pytest.mark.parametrize("family", CONFIGS)
def test_an_image_mae_is_inflated_and_a_static_clip_gives_its_projections(
    tmp_path: Path, family: str, how: Inflation
) -> None:
    image = random(MAE(IMAGE), 1)
    pictures = torch.randn(2, 3, 16, 16)
    clips = pictures[:, :, None].repeat(1, 1, 4, 1, 1)
    expected = image.encoder.embed(pictures, None)[:, 1:] - image.encoder.pos_embed[:, 1:]
    for layout, path in image_layouts(image, tmp_path):
        loaded, before = make(CONFIGS[family], 2), make(CONFIGS[family], 2).state_dict()
        missing = load_video_weights(path, loaded, inflation=how)
        assert missing == sorted(name for name in before if name.startswith("decoder.")), layout
        assert all(torch.equal(loaded.state_dict()[name], before[name]) for name in missing)
        encoder = loaded.encoder
        tokens = encoder.embed(clips, None)[:, -8:] - encoder.positions(None)
        for step in range(2):
            torch.testing.assert_close(tokens[:, 4 * step : 4 * step + 4], expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(encoder.blocks[1].attn.qkv.bias, image.encoder.blocks[1].attn.qkv.bias)
        if family == "mae_st":
            assert torch.equal(encoder.cls_token, image.encoder.cls_token)
            assert torch.equal(encoder.positions.spatial, image.encoder.pos_embed[:, 1:])
            assert not encoder.positions.temporal.any()


def test_the_image_models_fixed_positions_are_computed_for_the_clips(tmp_path: Path) -> None:
    wide = VideoMAEConfig(replace(MAE_ST.encoder, image_size=(16, 32)), 16, 1, 2)
    path, loaded = save_torch(random(MAE(IMAGE), 1).state_dict(), tmp_path), make(wide, 2)
    load_video_weights(path, loaded)
    assert torch.equal(loaded.encoder.positions.spatial, sincos_position_embedding((2, 4), 24)[:, 1:])
    learned = random(MAE(IMAGE), 1).state_dict() | {"encoder.pos_embed": torch.randn(1, 5, 24)}
    assert_untouched(save_torch(learned, tmp_path), wide, "number of patches 4 in the image encoder, 8 in the video")


def test_an_image_model_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = save_torch(random(MAE(IMAGE), 1).state_dict(), tmp_path)
    deeper = VideoMAEConfig(replace(ENCODER, depth=3), 16, 1, 2)
    assert_untouched(path, deeper, r"weights\.pth: .*depth 2 in the image encoder, 3 in the video encoder")
    state = random(MAE(IMAGE), 1).state_dict() | {"encoder.blocks.0.ls1.gamma": torch.ones(24)}
    assert_untouched(save_torch(state, tmp_path), VIDEO_MAE, r"unexpected: encoder\.blocks\.0\.ls1\.gamma")


# Runs.


def test_a_run_on_clips_gives_its_moving_average(tmp_path: Path) -> None:
    run = train_on_clips(tmp_path)
    checkpoint = newest_complete(open_folder(run))
    assert checkpoint is not None
    average, trained = (load_weights(checkpoint, "model", ema=ema) for ema in (True, False))
    for path in (run, Path(str(checkpoint))):
        loaded = make(VIDEO_MAE, 2)
        assert load_video_weights(path, loaded) == []
        state = loaded.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in average.items())
        assert not torch.equal(state["decoder.pred.weight"], trained["decoder.pred.weight"])
    heads = VideoMAEConfig(replace(ENCODER, heads=3), 16, 1, 2)
    assert_untouched(run, heads, "the encoder has 2 attention heads, the model's 3")


def test_a_run_on_images_is_inflated(tmp_path: Path) -> None:
    run = train_on_images(tmp_path)
    checkpoint = newest_complete(open_folder(run))
    assert checkpoint is not None
    image = load_weights(checkpoint, "model", ema=True)
    loaded, before = make(MAE_ST, 2), make(MAE_ST, 2).state_dict()
    missing = load_video_weights(run, loaded)
    assert missing == sorted(name for name in before if name.startswith("decoder."))
    assert torch.equal(loaded.encoder.blocks[1].mlp.fc2.weight, image["encoder.blocks.1.mlp.fc2.weight"])
    projection = loaded.encoder.patch_embed.proj.weight
    assert torch.equal(projection[:, :, 1], image["encoder.patch_embed.proj.weight"])
    assert not projection[:, :, 0].any()
