"""Masked autoencoders for video: against references written literally, precision, compilation, FLOPs, sizes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain.losses.clips import channel_statistics, clip_loss, from_tubelets, predicted_frames, tubelets
from pretrain.models.positions import sincos_position_embedding, sinusoid_table
from pretrain.models.video_config import DECODERS, VideoMAEConfig, VideoViTConfig, video_mae_config
from pretrain.models.video_mae import VideoMAE, video_mae_flops
from pretrain.models.video_masking import ClipMask, dual_masks, running_cells, spacetime_masks, tube_masks
from pretrain.weights.video_names import to_mae_st

VIDEO_MAE = VideoMAEConfig(VideoViTConfig(6, (16, 24), 3, (8, 4), 2, 24, 2, 2), 16, 2, 2)
MAE_ST = VideoMAEConfig(
    VideoViTConfig(8, (16, 24), 2, (8, 4), 2, 24, 2, 2, family="mae_st"), 16, 2, 2, predicted_frames=4
)
CONFIGS = pytest.mark.parametrize("config", [VIDEO_MAE, MAE_ST], ids=["video_mae", "mae_st"])


def make(config: VideoMAEConfig, batch_size: int = 2) -> tuple[VideoMAE, Tensor, ClipMask, Tensor]:
    """A model without zeros in it, clips, masks and random targets."""
    torch.manual_seed(0)
    model, encoder = VideoMAE(config), config.encoder
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    masking = spacetime_masks if encoder.family == "mae_st" else tube_masks
    mask = masking(torch.arange(batch_size), 1, encoder.grid_size, 0.75, 3)
    clips = torch.randn(batch_size, encoder.in_channels, *encoder.clip_size)
    return model, clips, mask, torch.randn(*mask.predict_ids.shape, config.target_values)


def literal_tokens(clip: Tensor, token_size: tuple[int, int, int], order: str) -> Tensor:
    """Cuts [C, T, H, W] into [N, values], value by value, in the order "tpqc" (targets) or "ctpq" (a convolution)."""
    frames, height, width = token_size
    tokens = []
    for t in range(0, clip.shape[1], frames):
        for y in range(0, clip.shape[2], height):
            for x in range(0, clip.shape[3], width):
                part = {
                    (dt, p, q, c): clip[c, t + dt, y + p, x + q]
                    for dt in range(frames)
                    for p in range(height)
                    for q in range(width)
                    for c in range(len(clip))
                }
                places = sorted(part, key=lambda i: i if order == "tpqc" else (i[3], i[0], i[1], i[2]))
                tokens.append(torch.stack([part[place] for place in places]))
    return torch.stack(tokens)


def literal_norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def literal_linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].flatten(1).T + weights[f"{name}.bias"]


def literal_block(x: Tensor, weights: dict[str, Tensor], name: str, heads: int) -> Tensor:
    """A pre-norm block with separate query, key and value, on one sequence [N, D]."""
    normed = literal_norm(x, weights, f"{name}.norm1")
    query, key, value = (literal_linear(normed, weights, f"{name}.attn.{letter}") for letter in "qkv")
    mixed = []
    for part in range(heads):
        own = slice(part * x.shape[1] // heads, (part + 1) * x.shape[1] // heads)
        scores = query[:, own] @ key[:, own].T / math.sqrt(x.shape[1] // heads)
        mixed.append(scores.softmax(-1) @ value[:, own])
    x = x + literal_linear(torch.cat(mixed, 1), weights, f"{name}.attn.proj")
    hidden = literal_linear(literal_norm(x, weights, f"{name}.norm2"), weights, f"{name}.mlp.fc1")
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return x + literal_linear(hidden, weights, f"{name}.mlp.fc2")


def literal_mae_st(weights: dict[str, Tensor], clip: Tensor, kept: list[int], heads: int) -> tuple[Tensor, Tensor]:
    """MAE-ST as in its paper, for one clip: loss, and the prediction of all tokens in order.

    The encoder's class token is dropped before the decoder, which has its own; the decoder sees all tokens in their
    order; the targets are patches of single frames, frames 0 to 7 taken evenly, rounded down.
    """
    grid, places = (4, 2, 6), 12
    frames = [int(number * (clip.shape[1] - 1) / (4 - 1)) for number in range(4)]
    assert frames == [0, 2, 4, 7]
    tokens = literal_linear(literal_tokens(clip, (2, 8, 4), "ctpq"), weights, "patch_embed.proj")
    x = [weights["cls_token"][0, 0] + weights["pos_embed_class"][0, 0]]
    for n in kept:
        spatial, temporal = weights["pos_embed_spatial"][0, n % places], weights["pos_embed_temporal"][0, n // places]
        x.append(tokens[n] + spatial + temporal)
    x = torch.stack(x)
    for index in range(2):
        x = literal_block(x, weights, f"blocks.{index}", heads)
    x = literal_linear(literal_norm(x, weights, "norm")[1:], weights, "decoder_embed")
    full = [weights["decoder_cls_token"][0, 0] + weights["decoder_pos_embed_class"][0, 0]]
    for n in range(grid[0] * places):
        token = x[kept.index(n)] if n in kept else weights["mask_token"][0, 0]
        spatial = weights["decoder_pos_embed_spatial"][0, n % places]
        full.append(token + spatial + weights["decoder_pos_embed_temporal"][0, n // places])
    x = torch.stack(full)
    for index in range(2):
        x = literal_block(x, weights, f"decoder_blocks.{index}", heads)
    prediction = literal_linear(literal_norm(x, weights, "decoder_norm"), weights, "decoder_pred")[1:]
    target = literal_tokens(clip[:, frames], (1, 8, 4), "tpqc")
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    losses = [(prediction[n] - target[n]).square().mean() for n in range(48) if n not in kept]
    return torch.stack(losses).mean(), prediction


def test_mae_st_equals_the_literal_one() -> None:
    from pretrain.objectives.clip_target import joint_target  # the target is the method's, not the model's

    model, _, mask, _ = make(MAE_ST)
    stored = torch.randint(256, (2, 2, 8, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    values = tubelets(stored[:, :, [0, 2, 4, 7]], MAE_ST.target_size)
    values = values.gather(1, mask.predict_ids[..., None, None].expand(-1, -1, *values.shape[2:]))
    target = joint_target((0.45, 0.4), (0.225, 0.3), norm_pixels=True)(values)
    mean, std = (torch.tensor(numbers)[:, None, None, None] for numbers in ((0.45, 0.4), (0.225, 0.3)))
    clips = (stored / 255 - mean) / std
    output = model(clips, mask, target)
    weights = to_mae_st(model.state_dict())
    losses = []
    for clip in range(2):
        loss, prediction = literal_mae_st(weights, clips[clip], mask.keep_ids[clip].tolist(), heads=2)
        losses.append(loss)
        torch.testing.assert_close(output.prediction[clip], prediction[mask.predict_ids[clip]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.loss, torch.stack(losses).mean(), rtol=1e-5, atol=0)


def test_dual_masking_equals_the_literal_one() -> None:
    """VideoMAE v2: mask tokens wherever the decoder's mask leaves a token, also where the encoder saw it; the loss
    counts the tokens that both left out.
    """
    config = VideoMAEConfig(VideoViTConfig(8, (16, 16), 2, (4, 4), 2, 24, 2, 2), 16, 2, 2)
    model, clips, _, _ = make(config)
    mask = dual_masks(torch.arange(2), 1, config.encoder.grid_size, 0.75, 0.5, seed=3)
    targets = torch.randn(2, 64, config.target_values)  # of all tokens
    target = targets.gather(1, mask.predict_ids[..., None].expand(-1, -1, config.target_values))
    output = model(clips, mask, target)
    decoder = model.decoder
    total, count = torch.tensor(0.0), 0
    for clip in range(2):
        kept = mask.keep_ids[clip].tolist()
        masked = next(cells for cells in running_cells((4, 4, 4), 0.5) if not cells[mask.predict_ids[clip]].any())
        visible = decoder.embed(model.encoder(clips[clip : clip + 1], mask.keep_ids[clip : clip + 1]))[0]
        sequence = [visible[rank] + decoder.positions.table[0, token] for rank, token in enumerate(kept)]
        left = [token for token in range(64) if not masked[token]]
        sequence += [decoder.mask_token[0, 0] + decoder.positions.table[0, token] for token in left]
        x = torch.stack(sequence)[None]
        for block in decoder.blocks:
            x = block(x)
        prediction = decoder.pred(decoder.norm(x))[0, len(kept) :]
        torch.testing.assert_close(output.prediction[clip], prediction, rtol=1e-5, atol=1e-5)
        for rank, token in enumerate(left):
            if token not in kept:
                total = total + (prediction[rank] - targets[clip, token]).square().mean()
                count += 1
    assert 0 < count < 2 * 32
    torch.testing.assert_close(output.loss, total / count)


def test_tubelets_equal_a_loop_and_come_back() -> None:
    clips = torch.randn(2, 2, 6, 16, 24)
    values = tubelets(clips, (3, 8, 4))
    for clip in range(2):
        assert torch.equal(values[clip].flatten(1), literal_tokens(clips[clip], (3, 8, 4), "tpqc"))
    assert torch.equal(from_tubelets(values, (2, 2, 6), (3, 8, 4)), clips)


def test_channels_are_normalised_one_by_one() -> None:
    values = torch.rand(2, 3, 12, 2)
    expected = torch.empty_like(values)
    for token in values.flatten(0, 1), expected.flatten(0, 1):
        assert token.shape == (6, 12, 2)
    for clip in range(2):
        for token in range(3):
            for channel in range(2):
                numbers = values[clip, token, :, channel]
                mean = numbers.sum() / 12
                deviation = ((numbers - mean).square().sum() / 11).sqrt()
                expected[clip, token, :, channel] = (numbers - mean) / (deviation + 1e-6)
    mean, deviation = channel_statistics(values)
    torch.testing.assert_close((values - mean) / deviation, expected)
    assert (channel_statistics(torch.full((1, 1, 4, 2), 0.3))[1] > 0).all()  # a flat token has a finite target


def test_predicted_frames_are_those_of_the_paper() -> None:
    assert predicted_frames(16, 8) == [0, 2, 4, 6, 8, 10, 12, 15]
    assert predicted_frames(16, 8) == torch.linspace(0, 15, 8).long().tolist()
    assert predicted_frames(16, 16) == list(range(16))
    assert predicted_frames(5, 1) == [0]


def test_loss_weighs_clips_alike_and_splits() -> None:
    prediction, target = torch.randn(4, 6, 3), torch.randn(4, 6, 3)
    counted = torch.rand(4, 6) > 0.4
    counted[:, 0] = True  # a mean over no token is no number
    expected = torch.stack([(p - t)[c].square().mean() for p, t, c in zip(prediction, target, counted, strict=True)])
    torch.testing.assert_close(clip_loss(prediction, target, counted), expected.mean())
    halves = [clip_loss(prediction[part], target[part], counted[part]) for part in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(sum(halves) / 2, expected.mean())


@CONFIGS
def test_prediction_depends_on_visible_tokens_alone(config: VideoMAEConfig) -> None:
    model, clips, mask, target = make(config)
    encoder = config.encoder
    hidden = mask.hidden(encoder.num_tokens)[..., None, None].expand(-1, -1, encoder.token_values // 2, 2)
    hidden = from_tubelets(hidden, encoder.grid_size, encoder.token_size)
    prediction = model(clips, mask, target).prediction
    torch.testing.assert_close(model(clips + hidden * 9.0, mask, target).prediction, prediction, rtol=0, atol=0)
    assert not torch.allclose(model(clips + ~hidden * 1.0, mask, target).prediction, prediction)


@CONFIGS
def test_a_token_knows_its_place(config: VideoMAEConfig) -> None:
    model, clips, mask, target = make(config)
    prediction = model(clips, mask, target).prediction
    shuffled = torch.randperm(mask.predict_ids.shape[1])
    moved = mask._replace(predict_ids=mask.predict_ids[:, shuffled])
    torch.testing.assert_close(model(clips, moved, target).prediction, prediction[:, shuffled])
    # The encoder alone: each token has another position, so equal tubelets give different tokens.
    tokens = model.encoder.embed(torch.ones_like(clips), None)[0]
    assert len(tokens.unique(dim=0)) == len(tokens)


@CONFIGS
def test_gradients_reach_every_parameter_and_nothing_else(config: VideoMAEConfig) -> None:
    model, clips, mask, target = make(config)
    model(clips, mask, target).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    learned = [name for name, _ in model.named_parameters() if "positions" in name]
    assert len(learned) == (6 if config.encoder.family == "mae_st" else 0)


@CONFIGS
def test_features_are_the_unmasked_encoder(config: VideoMAEConfig) -> None:
    model, clips, _, _ = make(config)
    encoder = model.encoder
    (early, _), (summary, tokens) = encoder.features(clips, num_blocks=2)
    whole = encoder(clips)
    assert tokens.shape == (2, config.encoder.num_tokens, 24)
    assert torch.equal(tokens, whole[:, -config.encoder.num_tokens :])
    assert torch.equal(summary, whole[:, 0] if config.encoder.has_class_token else tokens.mean(1))
    assert not torch.allclose(early, summary)
    with pytest.raises(ValueError, match="num_blocks is 3; expected 1 to 2"):
        encoder.features(clips, num_blocks=3)


@CONFIGS
def test_kept_tokens_are_those_of_the_whole_embedding(config: VideoMAEConfig) -> None:
    model, clips, mask, _ = make(config)
    every = model.encoder.embed(clips, None)
    some = model.encoder.embed(clips, mask.keep_ids)
    if config.encoder.has_class_token:
        assert torch.equal(some[:, 0], every[:, 0])
        every, some = every[:, 1:], some[:, 1:]
    torch.testing.assert_close(some, every.gather(1, mask.keep_ids[..., None].expand(-1, -1, 24)))
    convolution = torch.nn.functional.conv3d(
        clips, model.encoder.patch_embed.proj.weight, model.encoder.patch_embed.proj.bias, config.encoder.token_size
    )
    tokens = convolution.flatten(2).transpose(1, 2) + model.encoder.positions(None)
    torch.testing.assert_close(every, tokens, rtol=1e-5, atol=1e-5)


@CONFIGS
def test_autocast_keeps_the_loss_in_float32(config: VideoMAEConfig) -> None:
    model, clips, mask, target = make(config)
    with torch.autocast("cpu", torch.bfloat16):
        loss, prediction = model(clips, mask, target)
    assert loss.dtype == torch.float32
    assert prediction.dtype == torch.bfloat16
    exact = clip_loss(prediction.double(), target.double(), mask.counted)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(loss, model(clips, mask, target).loss, rtol=0.02, atol=0)
    assert model.bfloat16()(clips, mask, target).loss.isfinite()


def test_inputs_of_low_precision_or_wrong_shape_are_refused() -> None:
    model, clips, mask, target = make(VIDEO_MAE)
    with pytest.raises(ValueError, match=r"clips are torch\.bfloat16.*cast_forward_inputs"):
        model(clips.bfloat16(), mask, target)
    with pytest.raises(ValueError, match=r"targets are torch\.bfloat16.*cast_forward_inputs"):
        model(clips, mask, target.bfloat16())
    with pytest.raises(ValueError, match=r"targets have shape \[2, 17, 192\] for 2 clips; expected \[2, 18, 192\]"):
        model(clips, mask, target[:, 1:])
    with pytest.raises(ValueError, match=r"clips have shape \[2, 2, 5, 16, 24\]; expected \[batch, 2, 6, 16, 24\]"):
        model(clips[:, :, 1:], mask, target)


def test_compiled_it_computes_the_same() -> None:
    encoder = VideoViTConfig(4, (16, 16), 2, (8, 8), 1, 16, 1, 2, family="mae_st")
    model, clips, mask, target = make(VideoMAEConfig(encoder, 8, 1, 2, predicted_frames=2))
    expected = torch.autograd.grad(model(clips, mask, target).loss, list(model.parameters()))
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(whole(clips, mask, target).loss, list(model.parameters()))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


@CONFIGS
def test_flops_are_those_counted(config: VideoMAEConfig) -> None:
    model, clips, mask, target = make(config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # plain products, none recomputed
        model(clips, mask, target).loss.backward()
    kept, predicted = mask.keep_ids.shape[1], mask.predict_ids.shape[1]
    # The clips need no gradient: the tubelet projection has two products where the formula counts three.
    unneeded = 2 * kept * config.encoder.token_values * config.encoder.width
    assert counter.get_total_flops() / 2 == video_mae_flops(config, kept, predicted) - unneeded


PARAMETERS = {"small": 22, "base": 87, "large": 305, "huge": 633}  # millions, published with a head for 400 classes


@pytest.mark.parametrize(("method", "size"), [(method, size) for method in DECODERS for size in DECODERS[method]])
def test_the_papers_models_build(method: str, size: str) -> None:
    config = video_mae_config(method, size)
    with torch.device("meta"):
        model = VideoMAE(config)
    assert config.encoder.grid_size[0] == 8
    assert config.encoder.num_tokens == 8 * (256 if config.encoder.patch_size == (14, 14) else 196)
    assert config.num_predicted_frames == (8 if method == "mae_st" else 16)
    if method == "video_mae":
        with_head = sum(p.numel() for p in model.encoder.parameters()) + 401 * config.encoder.width
        assert with_head / 1e6 == pytest.approx(PARAMETERS[size], rel=0.01)


def test_the_giant_has_the_papers_mlp() -> None:
    with torch.device("meta"):
        model = VideoMAE(video_mae_config("video_mae_v2", "giant"))
    assert model.encoder.blocks[0].mlp.fc1.out_features == 6144


def test_it_starts_as_described() -> None:
    torch.manual_seed(0)
    model = VideoMAE(MAE_ST)
    assert (model.decoder.cls_token == 0).all()
    assert 0.015 < model.encoder.positions.spatial.std() < 0.025
    assert (model.decoder.embed.bias == 0).all()
    bound = (6 / (24 + 16)) ** 0.5
    assert 0.9 * bound < model.decoder.embed.weight.abs().max() <= bound
    bound = (6 / (24 + 2 * 2 * 8 * 4)) ** 0.5
    assert 0.98 * bound < model.encoder.patch_embed.proj.weight.abs().max() <= bound
    assert VideoMAE(VIDEO_MAE).decoder.embed.bias is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_frames": 5}, r"num_frames of 5 is no multiple of a tubelet's 2. Set it to 4 or 6"),
        ({"image_size": (20, 32)}, r"height of 20 is no multiple of a tubelet's 16"),
        ({"width": 30}, "multiple of heads"),
        ({"width": 9, "heads": 3}, "even width"),
        ({"tubelet_size": 0}, "at least 1 of each"),
        ({"family": "vivit"}, "family is 'vivit'"),
    ],
)
def test_impossible_encoders_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VideoViTConfig(**{"num_frames": 4, "image_size": (32, 32), **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decoder_width": 30, "decoder_heads": 4}, "multiple of decoder_heads"),
        ({"decoder_depth": 0}, "decoder_depth is 0"),
        ({"predicted_frames": 6}, "multiple of their 8 steps in time, at most 16"),
        ({"predicted_frames": 32}, "multiple of their 8 steps"),
    ],
)
def test_impossible_autoencoders_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VideoMAEConfig(**fields)


def test_unknown_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no 'mae_st' of size 'giant'; expected one of mae_st base/large/huge"):
        video_mae_config("mae_st", "giant")


def test_learned_positions_may_start_as_sines_and_cosines() -> None:
    encoder = replace(MAE_ST.encoder, positions_start="sincos")
    model = VideoMAE(replace(MAE_ST, encoder=encoder))
    for part, width in ((model.encoder, 24), (model.decoder, 16)):
        _, rows, columns = encoder.grid_size
        assert torch.equal(part.positions.spatial, sincos_position_embedding((rows, columns), width)[:, 1:])
        assert torch.equal(part.positions.temporal, sinusoid_table(encoder.grid_size[0], width))
        assert part.positions.spatial.requires_grad
        assert part.positions.temporal.requires_grad
    with pytest.raises(ValueError, match="whose positions are fixed"):
        replace(VIDEO_MAE.encoder, positions_start="sincos")
    with pytest.raises(ValueError, match="expected a multiple of 4"):
        VideoMAE(replace(MAE_ST, encoder=replace(encoder, width=26)))
