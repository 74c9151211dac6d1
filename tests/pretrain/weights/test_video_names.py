"""Names of video autoencoders elsewhere: there and back, features and losses of what was loaded, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pretrain.export.transformers_arguments import transformers_arguments
from pretrain.models.video_config import VideoMAEConfig, VideoViTConfig
from pretrain.models.video_mae import VideoMAE
from pretrain.models.video_masking import spacetime_masks, tube_masks
from pretrain.models.video_vit import VideoViT
from pretrain.weights.video_names import (
    from_mae_st,
    from_original_video_mae,
    from_transformers,
    to_mae_st,
    to_original_video_mae,
    to_transformers,
)

VIDEO_MAE = VideoMAEConfig(VideoViTConfig(4, (16, 16), 2, (8, 8), 3, 24, 2, 2), 16, 1, 2)
MAE_ST = VideoMAEConfig(VideoViTConfig(4, (16, 16), 2, (8, 8), 3, 24, 2, 2, family="mae_st"), 16, 1, 2, 2)


def make(config: VideoMAEConfig) -> VideoMAE:
    """A model without zeros in it."""
    torch.manual_seed(0)
    model = VideoMAE(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def predict(model: VideoMAE) -> Tensor:
    encoder = model.config.encoder
    masking = spacetime_masks if encoder.family == "mae_st" else tube_masks
    mask = masking(torch.arange(2), 1, encoder.grid_size, 0.5, 0)
    clips = torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    return model(clips, mask, torch.zeros(*mask.predict_ids.shape, model.config.target_values)).prediction


def load(config: VideoMAEConfig, state: dict[str, Tensor]) -> VideoMAE:
    model = VideoMAE(config).eval()
    model.load_state_dict(state, strict=True)
    return model


def assert_same(model: VideoMAE, state: dict[str, Tensor]) -> None:
    """All tensors but the keys' biases are the same to the bit, and so are predictions but for rounding."""
    loaded = load(model.config, state)
    for name, tensor in model.state_dict().items():
        other = loaded.state_dict()[name]
        if name.endswith("qkv.bias") and model.config.encoder.family == "video_mae":
            parts = zip(tensor.chunk(3), other.chunk(3), strict=True)
            (query, query2), (key, key2), (value, value2) = parts
            assert key.abs().max() > 0
            assert (key2 == 0).all()
            tensor, other = torch.cat((query, value)), torch.cat((query2, value2))
        assert torch.equal(tensor, other), name
    torch.testing.assert_close(predict(loaded), predict(model), rtol=1e-4, atol=1e-5)


def test_original_video_mae_there_and_back() -> None:
    model = make(VIDEO_MAE)
    original = to_original_video_mae(model.state_dict())
    assert {
        "encoder.patch_embed.proj.weight",
        "encoder.blocks.1.attn.q_bias",
        "encoder.blocks.0.attn.v_bias",
        "encoder.blocks.0.attn.qkv.weight",
        "encoder.norm.weight",
        "encoder_to_decoder.weight",
        "mask_token",
        "decoder.blocks.0.mlp.fc1.bias",
        "decoder.norm.bias",
        "decoder.head.weight",
    } <= original.keys()
    assert not [name for name in original if "positions" in name or "qkv.bias" in name]
    assert_same(model, from_original_video_mae(original, VIDEO_MAE))


def test_a_fine_tuned_original_becomes_an_encoder() -> None:
    model = make(VIDEO_MAE)
    original = to_original_video_mae(_encoder(model))
    tuned = {name.removeprefix("encoder."): tensor for name, tensor in original.items()}
    for kind in ("weight", "bias"):
        tuned[f"fc_norm.{kind}"] = tuned.pop(f"norm.{kind}")
    tuned["head.weight"] = torch.zeros(400, 24)
    _assert_encoder(model, from_original_video_mae(tuned, VIDEO_MAE))


def test_mae_st_there_and_back() -> None:
    model = make(MAE_ST)
    original = to_mae_st(model.state_dict())
    assert {
        "cls_token",
        "decoder_cls_token",
        "mask_token",
        "pos_embed_spatial",
        "pos_embed_temporal",
        "pos_embed_class",
        "decoder_pos_embed_class",
        "blocks.1.attn.q.weight",
        "blocks.1.attn.k.bias",
        "decoder_blocks.0.attn.v.weight",
        "decoder_embed.bias",
        "decoder_pred.weight",
    } <= original.keys()
    assert len(original) == len(model.state_dict()) + 3 * 2 * 2  # q, k, v apart: two more tensors of each of six
    assert_same(model, from_mae_st({**original, "head.bias": torch.zeros(400)}))


def test_transformers_there_and_back() -> None:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    model = make(VIDEO_MAE)
    theirs = transformers.VideoMAEForPreTraining(
        transformers.VideoMAEConfig(**transformers_arguments(VIDEO_MAE, norm_pixels=True))
    )
    theirs.load_state_dict(to_transformers(model.state_dict()), strict=True)
    assert_same(model, from_transformers(theirs.state_dict(), VIDEO_MAE))


def test_their_bare_encoder_has_our_features() -> None:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    model = make(VIDEO_MAE)
    theirs = transformers.VideoMAEModel(
        transformers.VideoMAEConfig(**transformers_arguments(VIDEO_MAE, norm_pixels=True))
    ).eval()
    theirs.load_state_dict(
        {n.removeprefix("videomae."): t for n, t in to_transformers(_encoder(model)).items()}, strict=True
    )
    clips = torch.randn(2, 3, 4, 16, 16)
    hidden = theirs(clips.transpose(1, 2)).last_hidden_state
    torch.testing.assert_close(model.encoder.features(clips)[0][1], hidden, rtol=1e-4, atol=1e-5)
    _assert_encoder(model, from_transformers(theirs.state_dict(), VIDEO_MAE))


def test_transformers_4_and_classifiers_are_read() -> None:
    model = make(VIDEO_MAE)
    newest = to_transformers(_encoder(model))
    older = {}
    for name, tensor in newest.items():
        for letter, part in (("q", "query"), ("v", "value")):
            name = name.replace(f"attention.attention.{part}.bias", f"attention.attention.{letter}_bias")
        older[name.replace("videomae.layernorm.", "fc_norm.")] = tensor
    older["classifier.weight"] = torch.zeros(400, 24)
    assert "videomae.encoder.layer.0.attention.attention.q_bias" in older
    _assert_encoder(model, from_transformers(older, VIDEO_MAE))


def test_what_cannot_be_said_elsewhere_is_refused() -> None:
    state = make(MAE_ST).state_dict()
    for convert in (to_transformers, to_original_video_mae):
        with pytest.raises(ValueError, match="positions are learned and it has a class token"):
            convert(state)
    with pytest.raises(ValueError, match="no learned positions"):
        to_mae_st(make(VIDEO_MAE).state_dict())
    with pytest.raises(ValueError, match=r"'conv1\.weight' is none of a video autoencoder"):
        from_mae_st({"conv1.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    ("config", "norm_pixels", "message"),
    [
        (MAE_ST, True, "positions are learned"),
        (VideoMAEConfig(VIDEO_MAE.encoder, predicted_frames=2), True, "predicts a part of the frames"),
        (
            VideoMAEConfig(VideoViTConfig(4, (16, 16), 2, (8, 4))),
            True,
            "patches are 8 x 4; there the decoder's are square",
        ),
        (VideoMAEConfig(VideoViTConfig(in_channels=1)), False, "raw pixels of 1 channels; there these must be 3"),
    ],
)
def test_models_that_transformers_does_not_have_are_refused(
    config: VideoMAEConfig, norm_pixels: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=f"cannot become a transformers VideoMAE.*{message}"):
        transformers_arguments(config, norm_pixels)


def _encoder(model: VideoMAE) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if name.startswith("encoder.")}


def _assert_encoder(model: VideoMAE, state: dict[str, Tensor]) -> None:
    assert all(name.startswith("encoder.") for name in state)
    encoder = VideoViT(model.config.encoder).eval()
    encoder.load_state_dict({name.removeprefix("encoder."): tensor for name, tensor in state.items()}, strict=True)
    clips = torch.randn(2, 3, 4, 16, 16)
    torch.testing.assert_close(encoder(clips), model.encoder(clips), rtol=1e-4, atol=1e-5)
