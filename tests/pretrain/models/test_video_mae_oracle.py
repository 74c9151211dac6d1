"""Our VideoMAE against transformers' `VideoMAEForPreTraining`, with its weights and the same masks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pretrain.export.transformers_arguments import transformers_arguments
from pretrain.losses.clips import tubelets
from pretrain.models.normalise import Normalise
from pretrain.models.positions import sinusoid_table
from pretrain.models.statistics import IMAGENET_MEAN, IMAGENET_STD
from pretrain.models.video_config import VideoMAEConfig, VideoViTConfig, video_mae_config
from pretrain.models.video_mae import VideoMAE
from pretrain.models.video_masking import ClipMask, tube_masks
from pretrain.objectives.clip_target import channel_target, normalise_clips
from pretrain.weights.video_names import from_transformers, to_transformers

transformers = pytest.importorskip("transformers", minversion="5.0")

SQUARE = VideoMAEConfig(VideoViTConfig(8, (32, 32), 2, (8, 8), 3, 48, 2, 4), 32, 2, 4)
WIDE = VideoMAEConfig(VideoViTConfig(6, (16, 24), 3, (8, 8), 1, 48, 1, 4, mlp_ratio=48 / 11), 24, 1, 2)
FIVE = VideoMAEConfig(VideoViTConfig(4, (24, 24), 1, (4, 4), 5, 32, 2, 2), 16, 1, 2)


def make_pair(config: VideoMAEConfig, norm_pixels: bool) -> tuple[nn.Module, VideoMAE]:
    """Their model with random weights, and ours with the same."""
    torch.manual_seed(0)
    theirs = transformers.VideoMAEForPreTraining(
        transformers.VideoMAEConfig(**transformers_arguments(config, norm_pixels))
    )
    with torch.no_grad():  # nothing may be zero that training moves away from zero
        for parameter in theirs.parameters():
            if parameter.std() == 0:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    ours = VideoMAE(config)
    ours.load_state_dict(from_transformers(theirs.state_dict(), config), strict=True)
    ours.decoder.norm.eps = theirs.decoder.norm.eps  # 1e-5, fixed in their code; the original has 1e-6
    return theirs.train(), ours.train()


def make_batch(config: VideoMAEConfig, norm_pixels: bool, batch_size: int) -> tuple[Tensor, ClipMask, Tensor]:
    """Normalised clips, masks and our targets, from stored clips: smooth ones that can be learnt, and some noise."""
    encoder = config.encoder
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(batch_size, encoder.in_channels, 2, 4, 4, generator=generator)
    smooth = nn.functional.interpolate(coarse, encoder.clip_size, mode="trilinear")
    stored = (200 * smooth + 55 * torch.rand(smooth.shape, generator=generator)).to(torch.uint8)
    mask = tube_masks(torch.arange(batch_size), 1, encoder.grid_size, 0.75, seed=0)
    values = tubelets(stored, config.target_size)
    values = values.gather(1, mask.predict_ids[..., None, None].expand(-1, -1, *values.shape[2:]))
    target = channel_target(encoder.in_channels, norm_pixels)(values)
    normalise = Normalise(IMAGENET_MEAN, IMAGENET_STD)
    if encoder.in_channels != 3:  # theirs puts only 3 channels back to [0, 1], and takes the target of others as it is
        normalise = Normalise((0.0,) * encoder.in_channels, (1.0,) * encoder.in_channels)
    return normalise_clips(normalise, stored), mask, target


def assert_same_gradients(config: VideoMAEConfig, norm_pixels: bool, batch_size: int) -> None:
    """Loss within 1e-6 relative, each gradient within 1e-5 of its largest value."""
    theirs, ours = make_pair(config, norm_pixels)
    clips, mask, target = make_batch(config, norm_pixels, batch_size)
    their_output = theirs(clips.transpose(1, 2), bool_masked_pos=mask.hidden(config.encoder.num_tokens))
    output = ours(clips, mask, target)
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, their_output.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(output.prediction, their_output.logits, rtol=1e-4, atol=1e-4)
    their_output.loss.backward()
    output.loss.backward()
    actual = to_transformers({name: p.grad for name, p in ours.named_parameters()})
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        largest = expected[name].abs().max()
        assert largest > 0, f"{name} has no gradient to compare"
        assert (gradient - expected[name]).abs().max() <= 1e-5 * largest, name


@pytest.mark.parametrize("norm_pixels", [True, False])
def test_small_model_has_their_loss_and_gradients(norm_pixels: bool) -> None:
    assert_same_gradients(SQUARE, norm_pixels, 3)


@pytest.mark.parametrize("config", [WIDE, FIVE], ids=["wide-grey-giant-mlp", "five-channels"])
def test_other_shapes_have_their_loss_and_gradients(config: VideoMAEConfig) -> None:
    assert_same_gradients(config, True, 3)


@pytest.mark.parametrize("norm_pixels", [True, False])
def test_vit_small_has_their_loss_and_gradients(norm_pixels: bool) -> None:
    assert_same_gradients(video_mae_config("video_mae", "small", num_frames=4, image_size=96), norm_pixels, 1)


def test_positions_are_theirs_bit_for_bit() -> None:
    module = pytest.importorskip("transformers.models.videomae.modeling_videomae")
    if not hasattr(module, "get_sinusoid_encoding_table"):
        pytest.skip("this version of transformers has no such function")
    for tokens, width in ((1568, 64), (7, 10)):
        assert torch.equal(sinusoid_table(tokens, width), module.get_sinusoid_encoding_table(tokens, width))


def test_thirty_steps_of_adamw_stay_together() -> None:
    theirs, ours = make_pair(SQUARE, True)
    settings = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.05}
    optimizers = [torch.optim.AdamW(model.parameters(), **settings) for model in (theirs, ours)]
    clips, mask, target = make_batch(SQUARE, True, 2)
    losses = []
    for _ in range(30):
        hidden = mask.hidden(SQUARE.encoder.num_tokens)
        pair = (theirs(clips.transpose(1, 2), bool_masked_pos=hidden).loss, ours(clips, mask, target).loss)
        for loss, optimizer in zip(pair, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append([loss.item() for loss in pair])
    expected, actual = torch.tensor(losses).T
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=0)
    assert actual[-1] < 0.95 * actual[0], "the models should have learnt something"
