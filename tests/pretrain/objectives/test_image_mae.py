"""The image MAE objective: what a step, a validation and a picture compute from a batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from data_pipes.batch import Batch
from pretrain.losses.pixels import patchify
from pretrain.models.config import MAEConfig, ViTConfig
from pretrain.models.mae import mae_flops
from pretrain.models.masking import position_noise
from pretrain.models.normalise import Normalise
from pretrain.models.statistics import IMAGENET_MEAN, IMAGENET_STD
from pretrain.objectives.image_mae import ImageMAEObjective
from pretrain.objectives.mae_config import ImageMAEConfig
from pretrain.objectives.masked_autoencoder import VALIDATION_SEED
from pretrain.objectives.table import OBJECTIVES


def config(channels: int = 3, norm_pixels: bool = True, **fields: object) -> ImageMAEConfig:
    encoder = ViTConfig(image_size=(16, 24), patch_size=(4, 4), in_channels=channels, width=24, depth=2, heads=2)
    model = MAEConfig(encoder, decoder_width=16, decoder_depth=1, decoder_heads=2, norm_pixels=norm_pixels)
    return ImageMAEConfig(model=model, **fields)


def make(channels: int = 3, norm_pixels: bool = True, seed: int = 0) -> ImageMAEObjective:
    torch.manual_seed(0)
    return ImageMAEObjective(config(channels, norm_pixels), seed)


def batch(channels: int = 3, positions: tuple[int, ...] = (0, 1, 2, 3), dtype: torch.dtype = torch.uint8) -> Batch:
    """Images that are a function of their positions, as the loader's are."""
    images = torch.stack(
        [
            torch.randint(0, 256, (channels, 16, 24), generator=torch.Generator().manual_seed(position))
            for position in positions
        ]
    )
    if dtype == torch.uint16:
        images = images * 257
    return Batch(
        images=images.to(dtype),
        labels=torch.full((len(positions),), -1),
        positions=torch.tensor(positions),
        keys=[str(position) for position in positions],
    )


class Recorder(nn.Module):
    """Stands where a strategy puts its wrapper, and keeps what it is called with."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.calls: list[tuple[Tensor, Tensor]] = []

    def forward(self, images: Tensor, noise: Tensor) -> object:
        self.calls.append((images, noise))
        return self.model(images, noise)


def test_a_step_is_one_turn_of_the_prepared_player() -> None:
    objective = make(seed=11)
    recorder = objective.players["model"] = Recorder(objective.players["model"])
    data = batch(positions=(5, 900))
    (turn,) = objective.turns(data, step=3)
    ((images, noise),) = recorder.calls
    assert torch.equal(noise, position_noise(data.positions, 24, seed=11))
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(images, (data.images / 255.0 - mean) / std)
    assert turn.player == "model"
    assert turn.loss.requires_grad
    assert turn.metrics["loss"].shape == ()
    assert not turn.metrics["loss"].requires_grad
    assert turn.metrics["loss"] == turn.loss


def test_micro_batches_average_to_the_whole_batch() -> None:
    objective = make()
    whole = next(iter(objective.turns(batch(positions=(0, 1, 2, 3)), 0))).loss
    halves = [next(iter(objective.turns(batch(positions=p), 0))).loss for p in ((0, 1), (2, 3))]
    torch.testing.assert_close(torch.stack(halves).mean(), whole)


def test_training_masks_follow_the_seed_and_validation_masks_do_not() -> None:
    one, other = make(seed=0), make(seed=1)
    assert next(iter(one.turns(batch(), 0))).loss != next(iter(other.turns(batch(), 0))).loss
    expected = one.validate(batch(), 0)["loss"]
    assert expected.shape == ()
    assert not expected.requires_grad
    torch.rand(3)  # no global generator has a say
    assert one.validate(batch(), 500)["loss"] == expected
    assert other.validate(batch(), 0)["loss"] == expected


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_any_number_of_channels_and_both_stored_types(channels: int, dtype: torch.dtype) -> None:
    objective = make(channels)
    (turn,) = objective.turns(batch(channels, dtype=dtype), 0)
    assert turn.loss.isfinite()
    # 257 * v of 65535 is v of 255: the same picture in the deeper type.
    torch.testing.assert_close(turn.loss, next(iter(objective.turns(batch(channels), 0))).loss)
    shown = 3 if channels >= 3 else 1
    for picture in objective.pictures(batch(channels, dtype=dtype)).values():
        assert picture.shape == (4, shown, 16, 24)
        assert picture.dtype == torch.uint8


@pytest.mark.parametrize("norm_pixels", [True, False])
def test_pictures_show_what_they_say(norm_pixels: bool) -> None:
    objective, data = make(norm_pixels=norm_pixels), batch()
    pictures = objective.pictures(data)
    noise = position_noise(data.positions, 24, VALIDATION_SEED)
    _, prediction, mask = objective.model(objective.normalise(data.images), noise)
    views = {name: patchify(picture, (4, 4)) for name, picture in pictures.items()}
    assert (pictures["input"].int() - data.images.int()).abs().max() == 0
    for view in views.values():
        assert torch.equal(view[~mask], views["input"][~mask])
    assert (views["masked"][mask] == 128).all()
    std, mean = (torch.tensor(values).repeat(16) for values in (objective.std, objective.mean))
    shown = ((prediction * std + mean) * 255).round().clamp(0, 255)
    assert (views["prediction"][mask].float() - shown[mask]).abs().max() <= 1
    assert ("oracle_denormalised" in pictures) == norm_pixels


def test_a_perfect_prediction_makes_the_oracle_view_the_input() -> None:
    objective, data = make(), batch()

    class Perfect(nn.Module):
        def forward(self, images: Tensor, noise: Tensor) -> object:
            return objective.model(images, noise)._replace(prediction=objective.model.target(images))

    objective.players["model"] = Perfect()
    pictures = objective.pictures(data)
    assert (pictures["oracle_denormalised"].int() - data.images.int()).abs().max() <= 1
    # The honest view knows neither brightness nor contrast.
    assert (pictures["prediction"].int() - data.images.int()).abs().max() > 20


def test_blocks_weights_and_backbone() -> None:
    with torch.device("meta"):
        objective = ImageMAEObjective(config(), seed=0)
    assert len(objective.blocks("model")) == 3
    player = objective.players["model"].to_empty(device="cpu")
    for tensor in player.state_dict().values():
        tensor.fill_(float("nan"))
    objective.init_weights("model")
    state = player.state_dict()
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert objective.backbone_player == "model"
    with torch.device("meta"):
        backbone = objective.build_backbone()
    prefix = objective.backbone_prefix
    backbone.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}, strict=True)
    assert backbone(torch.randn(1, 3, 16, 24)).isfinite().all()
    assert (objective.image_size, objective.in_channels) == ((16, 24), 3)
    assert objective.flops_per_sample() == mae_flops(objective.config.model)
    with pytest.raises(ValueError, match="no player 'generator'"):
        objective.blocks("generator")


def test_the_table_builds_it() -> None:
    config_class, objective_class = OBJECTIVES["image_mae"]
    with torch.device("meta"):
        objective = objective_class(config_class(), 0)
    assert objective.image_size == (224, 224)
    assert objective.mean == IMAGENET_MEAN


def test_statistics_have_defaults_for_any_number_of_channels() -> None:
    assert config(1).mean == config(1).std == (0.5,)
    assert config(5).std == (0.5,) * 5
    assert config(2, mean=[0.1, 0.2], std=[1.0, 2.0]).mean == (0.1, 0.2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"mean": (0.5,)}, "mean has 1 numbers and the model 3"), ({"std": (0.5, 0.0, 0.5)}, "expected positive")],
)
def test_wrong_statistics_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_normalise_refuses_other_images() -> None:
    normalise = Normalise((0.5,), (0.5,))
    with pytest.raises(ValueError, match=r"expected uint8 or uint16"):
        normalise(torch.rand(1, 1, 4, 4))
    with pytest.raises(ValueError, match=r"expected \[batch, 1, height, width\]"):
        normalise(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="one number per channel"):
        Normalise((0.5,), (0.5, 0.5))


def test_normalise_and_back_is_the_image() -> None:
    normalise, data = Normalise(IMAGENET_MEAN, IMAGENET_STD), batch()
    assert torch.equal(normalise.to_uint8(normalise(data.images)), data.images)
