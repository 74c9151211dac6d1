"""Inflation of image encoders: what a clip that does not move gives, and what does not fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pretrain.models.config import ViTConfig
from pretrain.models.inflate import inflate_encoder
from pretrain.models.video_config import VideoViTConfig
from pretrain.models.video_vit import VideoViT
from pretrain.models.vit import ViT

IMAGE = ViTConfig((16, 24), (8, 4), 2, 24, 2, 2)


def video_config(family: str, **fields: object) -> VideoViTConfig:
    shape = {"num_frames": 6, "image_size": (16, 24), "tubelet_size": 3, "patch_size": (8, 4), "in_channels": 2}
    return VideoViTConfig(**{**shape, "width": 24, "depth": 2, "heads": 2, "family": family, **fields})


def make_image_encoder() -> ViT:
    torch.manual_seed(0)
    model = ViT(IMAGE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def inflated(family: str, how: str) -> tuple[ViT, VideoViT]:
    image = make_image_encoder()
    video = VideoViT(video_config(family))
    video.load_state_dict(inflate_encoder(image.state_dict(), video.config, how), strict=True)
    return image, video


def clip_of(images: Tensor, frames: int = 6) -> Tensor:
    return images[:, :, None].repeat(1, 1, frames, 1, 1)


@pytest.mark.parametrize("how", ["average", "centre"])
def test_a_static_clip_gives_the_images_tokens(how: str) -> None:
    image, video = inflated("mae_st", how)
    pictures = torch.randn(3, 2, 16, 24)
    expected, tokens = image.embed(pictures, None), video.embed(clip_of(pictures), None)
    torch.testing.assert_close(tokens[:, 0], expected[:, 0])
    for step in range(2):  # positions included: those in time start at zero
        torch.testing.assert_close(tokens[:, 1 + 12 * step : 13 + 12 * step], expected[:, 1:], rtol=1e-4, atol=1e-5)


def test_the_whole_encoder_gives_the_images_tokens_for_one_step() -> None:
    image = make_image_encoder()
    video = VideoViT(video_config("mae_st", num_frames=3))
    video.load_state_dict(inflate_encoder(image.state_dict(), video.config, "average"), strict=True)
    pictures = torch.randn(3, 2, 16, 24)
    torch.testing.assert_close(video(clip_of(pictures, 3)), image(pictures), rtol=1e-4, atol=1e-5)


def test_without_learned_positions_the_projections_agree() -> None:
    image, video = inflated("video_mae", "average")
    pictures = torch.randn(3, 2, 16, 24)
    expected = image.embed(pictures, None)[:, 1:] - image.pos_embed[:, 1:]
    tokens = video.embed(clip_of(pictures), None) - video.positions(None)
    for step in range(2):
        torch.testing.assert_close(tokens[:, 12 * step : 12 * step + 12], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(video.positions.table, VideoViT(video.config).positions.table)


def test_centre_looks_at_the_middle_frame_alone_and_average_at_all() -> None:
    clips = torch.randn(2, 2, 6, 16, 24)
    for how, looked_at in (("centre", {1, 4}), ("average", set(range(6)))):
        image, video = inflated("mae_st", how)
        tokens = video.embed(clips, None)
        for frame in range(6):
            changed = clips.clone()
            changed[:, :, frame] += 1.0
            assert torch.equal(video.embed(changed, None), tokens) == (frame not in looked_at)
        if how == "centre":
            torch.testing.assert_close(tokens[:, 1:13], image.embed(clips[:, :, 1], None)[:, 1:], rtol=1e-4, atol=1e-5)


def test_inflated_weights_are_copies() -> None:
    image, video = inflated("mae_st", "average")
    before = image.blocks[0].attn.qkv.weight.clone()
    with torch.no_grad():
        for parameter in video.parameters():
            parameter.zero_()
    assert torch.equal(image.blocks[0].attn.qkv.weight, before)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depth": 3}, "depth 2 in the image encoder, 3 in the video encoder"),
        ({"image_size": (16, 32)}, "number of patches 12 in the image encoder, 16"),
        ({"in_channels": 3}, "channels 2 in the image encoder, 3"),
        ({"patch_size": (4, 4)}, r"patch size \(8, 4\) in the image encoder, \(4, 4\)"),
        ({"mlp_ratio": 2.0}, "hidden width of a block 96 in the image encoder, 48"),
    ],
)
def test_encoders_that_do_not_fit_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inflate_encoder(make_image_encoder().state_dict(), video_config("mae_st", **fields), "average")


def test_other_weights_and_ways_are_refused() -> None:
    with pytest.raises(ValueError, match=r"not an image encoder's; missing: patch_embed\.proj\.weight, pos_embed"):
        inflate_encoder({"norm.weight": torch.ones(3)}, video_config("mae_st"), "average")
    without_class_token = {name: t for name, t in make_image_encoder().state_dict().items() if name != "cls_token"}
    with pytest.raises(ValueError, match="missing: cls_token"):
        inflate_encoder(without_class_token, video_config("mae_st"), "average")
    clips = dict(without_class_token, **{"patch_embed.proj.weight": torch.ones(24, 2, 3, 8, 4)})
    with pytest.raises(ValueError, match="missing: a 2-D projection"):
        inflate_encoder(clips, video_config("video_mae"), "average")
    with pytest.raises(ValueError, match="expected 'average' or 'centre'"):
        inflate_encoder(make_image_encoder().state_dict(), video_config("mae_st"), "middle")
