"""The video objectives: what a step, a validation and a picture compute from a batch of repeated clips."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from data_pipes.batch import Batch
from pretrain.losses.clips import predicted_frames, tubelets
from pretrain.losses.pixels import normalise_patches
from pretrain.models.normalise import Normalise
from pretrain.models.statistics import IMAGENET_MEAN
from pretrain.models.video_config import VideoMAEConfig, VideoViTConfig
from pretrain.models.video_mae import video_mae_flops
from pretrain.models.video_masking import ClipMask, dual_masks, spacetime_masks, tube_masks
from pretrain.objectives.clip_mae import ClipMAEObjective
from pretrain.objectives.clip_target import normalise_clips
from pretrain.objectives.mae_config import ClipMAEConfig, MAESTConfig, VideoMAEObjectiveConfig, VideoMAEv2Config
from pretrain.objectives.mae_st import mae_st_objective
from pretrain.objectives.masked_autoencoder import VALIDATION_SEED
from pretrain.objectives.video_mae import video_mae_objective
from pretrain.objectives.video_mae_v2 import video_mae_v2_objective

METHODS = {
    "mae_st": (MAESTConfig, mae_st_objective),
    "video_mae": (VideoMAEObjectiveConfig, video_mae_objective),
    "video_mae_v2": (VideoMAEv2Config, video_mae_v2_objective),
}
GRID = (4, 2, 4)
EVERY = pytest.mark.parametrize("method", list(METHODS))


def config(method: str, channels: int = 3, **fields: object) -> ClipMAEConfig:
    family = "mae_st" if method == "mae_st" else "video_mae"
    encoder = VideoViTConfig(8, (16, 32), 2, (8, 8), channels, 24, 2, 2, family=family)
    model = VideoMAEConfig(encoder, 16, 1, 2, predicted_frames=4 if method == "mae_st" else None)
    return METHODS[method][0](**{"model": model, "mask_ratio": 0.75, "repeats": 2, **fields})


def make(method: str, seed: int = 0, **fields: object) -> ClipMAEObjective:
    torch.manual_seed(0)
    return METHODS[method][1](config(method, **fields), seed)


def batch(positions: tuple[int, ...] = (0, 1, 2, 3), repeats: int = 2, channels: int = 3) -> Batch:
    """Clips that are a function of their positions, in the memory order of the loader."""
    shape = (repeats, 8, 16, 32, channels)
    clips = torch.stack(
        [torch.randint(256, shape, generator=torch.Generator().manual_seed(position)) for position in positions]
    )
    return Batch(
        images=clips.to(torch.uint8).movedim(-1, 2),
        labels=torch.full((len(positions),), -1),
        positions=torch.tensor(positions),
        keys=[str(position) for position in positions],
    )


def masks_of(method: str, positions: Tensor, repeats: int, seed: int) -> ClipMask:
    if method == "mae_st":
        return spacetime_masks(positions, repeats, GRID, 0.75, seed)
    if method == "video_mae":
        return tube_masks(positions, repeats, GRID, 0.75, seed)
    return dual_masks(positions, repeats, GRID, 0.75, 0.5, seed)


def loss_of(objective: ClipMAEObjective, data: Batch) -> Tensor:
    return next(iter(objective.turns(data, 0))).loss


class Recorder(nn.Module):
    """Stands where a strategy puts its wrapper, and keeps what it is called with."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.calls: list[tuple[Tensor, ClipMask, Tensor]] = []

    def forward(self, clips: Tensor, mask: ClipMask, target: Tensor) -> object:
        self.calls.append((clips, mask, target))
        return self.model(clips, mask, target)


@EVERY
def test_a_step_is_one_turn_of_the_prepared_player(method: str) -> None:
    objective = make(method, seed=11)
    recorder = objective.players["model"] = Recorder(objective.players["model"])
    data = batch(positions=(5, 900))
    (turn,) = objective.turns(data, step=3)
    ((clips, mask, target),) = recorder.calls
    for actual, expected in zip(mask, masks_of(method, data.positions, 2, seed=11), strict=True):
        assert torch.equal(actual, expected)
    # Repeats are folded in behind their video.
    folded = torch.stack([data.images[video, repeat] for video in range(2) for repeat in range(2)])
    mean, std = (torch.tensor(values)[:, None, None, None] for values in (objective.mean, objective.std))
    torch.testing.assert_close(clips, (folded / 255 - mean) / std)
    for clip in range(4):
        ids = mask.predict_ids[clip]
        if method == "mae_st":
            frames = ((folded[clip : clip + 1] / 255 - mean) / std)[:, :, [0, 2, 4, 7]]
            expected = normalise_patches(tubelets(frames, (1, 8, 8)).flatten(2))
        else:
            values = tubelets(folded[clip : clip + 1] / 255, (2, 8, 8))
            scores = (values - values.mean(2, keepdim=True)) / (values.std(2, keepdim=True) + 1e-6)
            expected = scores.flatten(2)
        torch.testing.assert_close(target[clip], expected[0, ids], rtol=1e-4, atol=1e-5)
    assert turn.player == "model"
    assert turn.loss.requires_grad
    assert turn.metrics["loss"] == turn.loss
    assert not turn.metrics["loss"].requires_grad


@EVERY
def test_raw_pixels_are_on_the_methods_scale(method: str) -> None:
    objective = make(method, norm_pixels=False)
    recorder = objective.players["model"] = Recorder(objective.players["model"])
    next(iter(objective.turns(batch(positions=(1,)), 0)))
    target = recorder.calls[0][2]
    if method == "mae_st":
        assert target.min() < -1.5
    else:
        assert target.min() == 0
        assert target.max() == 1


@EVERY
def test_micro_batches_average_to_the_whole_batch(method: str) -> None:
    objective = make(method)
    halves = [loss_of(objective, batch(positions=p)) for p in ((0, 1), (2, 3))]
    torch.testing.assert_close(loss_of(objective, batch()), sum(halves) / 2, rtol=1e-6, atol=1e-6)


@EVERY
def test_a_videos_loss_is_the_mean_over_its_clips(method: str) -> None:
    objective, data = make(method), batch(positions=(7,))
    single = make(method, repeats=1)
    first = loss_of(single, dataclasses.replace(data, images=data.images[:, :1]))
    whole = loss_of(objective, data)
    assert not torch.allclose(first, whole)
    swapped = loss_of(objective, dataclasses.replace(data, images=data.images.flip(1)))
    assert not torch.allclose(swapped, whole)  # masks belong to repeats


@EVERY
def test_validation_has_its_own_masks_and_any_number_of_repeats(method: str) -> None:
    data = batch(repeats=1)
    first, second = make(method, seed=1), make(method, seed=2)
    assert torch.equal(first.validate(data, 0)["loss"], second.validate(data, 5)["loss"])
    assert not first.validate(data, 0)["loss"].requires_grad
    assert not torch.equal(loss_of(make(method, seed=1, repeats=1), data), first.validate(data, 0)["loss"])


@EVERY
@pytest.mark.parametrize("norm_pixels", [True, False])
def test_films_show_what_they_say(method: str, norm_pixels: bool) -> None:
    objective, data = make(method, norm_pixels=norm_pixels), batch()
    films = objective.films(data)
    frames = predicted_frames(8, 4 if method == "mae_st" else 8)
    mask = masks_of(method, data.positions, 1, VALIDATION_SEED)
    size = objective.config.model.target_size
    views = {name: tubelets(film.transpose(1, 2), size) for name, film in films.items()}
    assert torch.equal(films["input"], data.images[:, 0][:, :, frames].transpose(1, 2))
    hidden = mask.hidden(32)
    for view in views.values():
        assert torch.equal(view[~hidden], views["input"][~hidden])
    assert (views["masked"][hidden] == 128).all()
    assert ("oracle_denormalised" in films) == norm_pixels
    recorder = objective.players["model"] = Recorder(objective.players["model"])
    objective.films(data)
    clips, _, target = recorder.calls[0]
    prediction = objective.model(clips, mask, target).prediction.unflatten(2, (-1, 3))
    if norm_pixels or method == "mae_st":
        prediction = prediction * torch.tensor(objective.std) + torch.tensor(objective.mean)
    shown = (prediction * 255).round().clamp(0, 255)
    predicted = torch.zeros(4, 32, dtype=torch.bool)
    for clip in range(4):
        for rank, token in enumerate(mask.predict_ids[clip].tolist()):
            if mask.counted[clip, rank]:
                predicted[clip, token] = True
                assert (views["prediction"][clip, token].float() - shown[clip, rank]).abs().max() <= 1
    assert (views["prediction"][hidden & ~predicted] == 128).all()
    assert (hidden & ~predicted).any() == (method == "video_mae_v2")


@EVERY
def test_a_perfect_prediction_makes_the_oracle_view_the_input(method: str) -> None:
    objective, data = make(method), batch()

    class Perfect(nn.Module):
        def forward(self, clips: Tensor, mask: ClipMask, target: Tensor) -> object:
            return objective.model(clips, mask, target)._replace(prediction=target)

    objective.players["model"] = Perfect()
    films = objective.films(data)
    known = (films["masked"] != 128) | (films["prediction"] != 128)  # v2 leaves tokens grey
    difference = (films["oracle_denormalised"].int() - films["input"].int()).abs()
    assert difference[known].max() <= 1
    assert known.float().mean() > 0.5
    # The honest view knows neither brightness nor contrast.
    assert (films["prediction"].int() - films["input"].int()).abs().max() > 20


@EVERY
def test_pictures_are_strips_of_the_films(method: str) -> None:
    objective, data = make(method), batch()
    films, pictures = objective.films(data), objective.pictures(data)
    assert films.keys() == pictures.keys()
    frames = [0, 1, 2, 3] if method == "mae_st" else [0, 2, 4, 7]
    for name, picture in pictures.items():
        assert picture.dtype == torch.uint8
        assert picture.shape == (4, 3, 16, 4 * 32)
        for place, frame in enumerate(frames):
            assert torch.equal(picture[..., 32 * place : 32 * place + 32], films[name][:, frame])


@EVERY
@pytest.mark.parametrize(("channels", "shown"), [(1, 1), (2, 1), (5, 3)])
def test_any_number_of_channels(method: str, channels: int, shown: int) -> None:
    objective = make(method, channels=channels)
    data = batch(channels=channels)
    loss_of(objective, data).backward()
    assert objective.pictures(data)["prediction"].shape == (4, shown, 16, 128)
    assert objective.mean == objective.std == (0.5,) * channels


@EVERY
def test_flops_count_a_video_with_its_repeats(method: str) -> None:
    objective, data = make(method, repeats=2), batch()
    recorder = objective.players["model"] = Recorder(objective.players["model"])
    loss_of(objective, data)
    mask = recorder.calls[0][1]
    per_clip = video_mae_flops(objective.config.model, mask.keep_ids.shape[1], mask.predict_ids.shape[1])
    assert objective.flops_per_sample() == 2 * per_clip
    assert make(method, repeats=1).flops_per_sample() == per_clip


@EVERY
def test_blocks_weights_and_backbone(method: str) -> None:
    with torch.device("meta"):
        objective = METHODS[method][1](config(method), 0)
    assert len(objective.blocks("model")) == 3
    player = objective.players["model"].to_empty(device="cpu")
    for tensor in player.state_dict().values():
        tensor.fill_(float("nan"))
    objective.init_weights("model")
    state = player.state_dict()
    assert all(tensor.isfinite().all() for tensor in state.values())
    with torch.device("meta"):
        backbone = objective.build_backbone()
    prefix = objective.backbone_prefix
    backbone.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}, strict=True)
    (summary, tokens), *_ = backbone.features(torch.randn(1, 3, 8, 16, 32), 1)
    assert summary.shape == (1, 24)
    assert tokens.shape == (1, 32, 24)
    assert (objective.image_size, objective.num_frames, objective.in_channels) == ((16, 32), 8, 3)
    with pytest.raises(ValueError, match="no player 'generator'"):
        objective.blocks("generator")


@EVERY
def test_the_papers_defaults_build(method: str) -> None:
    config_class, build = METHODS[method]
    with torch.device("meta"):
        objective = build(config_class(), 0)
    assert objective.image_size == (224, 224)
    assert objective.config.repeats == (1 if method == "video_mae" else 4)
    assert objective.mean == ((0.45,) * 3 if method == "mae_st" else IMAGENET_MEAN)
    kept = {"mae_st": 156, "video_mae": 160, "video_mae_v2": 8 * 26}
    assert objective.config.num_kept == kept[method]


def test_training_reduces_the_loss() -> None:
    objective = make("video_mae_v2")
    smooth = torch.linspace(0, 200, 32).expand(4, 2, 3, 8, 16, 32) + torch.arange(8)[:, None, None] * 5
    data = dataclasses.replace(batch(), images=smooth.to(torch.uint8))
    optimizer = torch.optim.AdamW(objective.model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = loss_of(objective, data)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_clips_are_normalised_as_they_lie() -> None:
    data = batch()
    clips = data.images.flatten(0, 1)
    assert clips.untyped_storage().data_ptr() == data.images.untyped_storage().data_ptr()
    normalised = normalise_clips(Normalise((0.1, 0.2, 0.3), (1.0, 2.0, 3.0)), clips)
    mean, std = (torch.tensor(v)[:, None, None, None] for v in ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0)))
    torch.testing.assert_close(normalised, (clips / 255 - mean) / std)
    assert normalised.stride() == clips.stride()  # no transposition on the way


def test_wrong_batches_are_refused() -> None:
    objective = make("video_mae")
    with pytest.raises(ValueError, match=r"batch has 3 clips of each video and objective\.repeats is 2"):
        loss_of(objective, batch(repeats=3))
    with pytest.raises(ValueError, match=r"shape \[4, 2, 1, 8, 16, 32\]; expected \[videos, repeats, 3, 8, 16, 32\]"):
        loss_of(objective, batch(channels=1))


@pytest.mark.parametrize(
    ("method", "fields", "message"),
    [
        ("video_mae", {"mean": (0.5,)}, "mean has 1 numbers and the model 3"),
        ("mae_st", {"std": (0.5, 0.0, 0.5)}, "expected positive"),
        ("video_mae", {"repeats": 0}, "repeats is 0"),
        ("video_mae", {"mask_ratio": 0.05}, "hides none of 32 tokens"),
        ("mae_st", {"mask_ratio": 0.0}, "hides none of 32 tokens"),
        ("video_mae_v2", {"mask_ratio": 0.5}, "hides 4 places and decoder_mask_ratio 0.5 leaves 4 out"),
        ("video_mae_v2", {"decoder_mask_ratio": 0.3}, "expected 0.25, 0.5 or 0.75"),
    ],
)
def test_impossible_configurations_are_refused(method: str, fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(method, **fields)


def test_families_are_not_mixed() -> None:
    with pytest.raises(ValueError, match=r"mae_st has an encoder of the family 'mae_st'; .* is 'video_mae'"):
        MAESTConfig(model=VideoMAEConfig())
    with pytest.raises(ValueError, match="video_mae has an encoder of the family 'video_mae'"):
        VideoMAEObjectiveConfig(model=config("mae_st").model)
