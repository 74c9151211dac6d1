"""Channel prefixes and equivariance: what is drawn, what the losses compare, and that nothing else decides it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from pretrain.losses.config import AdversarialConfig, PerceptualConfig
from pretrain.models.tokenizers.config import DiscriminatorConfig
from pretrain.models.tokenizers.dc_ae_config import dc_ae_config
from pretrain.models.tokenizers.discriminator import Discriminator
from pretrain.models.tokenizers.latent_view import LatentView
from pretrain.objectives.latent_views import draw_prefix, draw_transform
from pretrain.objectives.tokenizer import TokenizerObjective
from pretrain.objectives.tokenizer_config import ChannelPrefixConfig, EquivarianceConfig, TokenizerConfig
from tests.pretrain.tokenizer_steps import batch, gradients, play

PREFIX = ChannelPrefixConfig(step=3)
ALWAYS = EquivarianceConfig(probability=1.0)
GAME = AdversarialConfig(weight=0.5)


def config(**fields: object) -> TokenizerConfig:
    model = fields.pop("model", None) or dc_ae_config("tiny", decoder_norms=("rms",) * 3, latent_shortcuts=False)
    discriminator = DiscriminatorConfig(width=4, layers=1)
    return TokenizerConfig(**{"image_size": (24, 32), **fields}, model=model, discriminator=discriminator)


def make(seed: int = 0, **fields: object) -> TokenizerObjective:
    torch.manual_seed(0)
    return TokenizerObjective(config(**fields), seed)


# -- channel prefixes ------------------------------------------------------------------------------------------------


def test_counts_are_even_steps_and_all() -> None:
    assert PREFIX.counts(8) == [3, 6, 8]
    assert ChannelPrefixConfig(step=16).counts(64) == [16, 32, 48, 64]
    assert ChannelPrefixConfig().counts(64) == []
    assert draw_prefix(ChannelPrefixConfig(), torch.arange(4), 64, 0) is None
    drawn = draw_prefix(PREFIX, torch.arange(3000), 8, 1)
    assert drawn.dtype == torch.int64
    shares = drawn.bincount(minlength=9)[[3, 6, 8]] / 3000
    assert (shares - 1 / 3).abs().max() < 0.03


def test_a_sample_draws_by_its_position_and_the_seed() -> None:
    drawn = draw_prefix(PREFIX, torch.arange(64), 8, 1)
    assert torch.equal(draw_prefix(PREFIX, torch.tensor([40, 7]), 8, 1), drawn[[40, 7]])
    assert not torch.equal(draw_prefix(PREFIX, torch.arange(64), 8, 2), drawn)


@pytest.mark.parametrize("first", [0, 1, 2, 3, 1001])
def test_fewest_and_all_are_in_every_four_samples(first: int) -> None:
    prefix = ChannelPrefixConfig(step=1, always_min_max=True)
    drawn = draw_prefix(prefix, torch.arange(first, first + 4), 64, 0)
    assert {1, 64} <= set(drawn.tolist())
    several = draw_prefix(prefix, torch.arange(4000), 64, 0)
    assert several.unique().numel() == 64


def test_the_loss_is_that_of_the_drawn_prefixes() -> None:
    objective, data = make(prefix=PREFIX, seed=5), batch()
    images = data.images / 255.0 * 2.0 - 1.0
    latent, losses = objective.autoencoder.encode(images), []
    counts = draw_prefix(PREFIX, data.positions, 8, 5).tolist()
    assert len(set(counts)) > 1
    for sample, count in enumerate(counts):
        shown = latent[sample : sample + 1].clone()
        shown[:, count:] = 0.0
        losses.append((objective.autoencoder.decode(shown) - images[sample]).abs().mean())
    torch.testing.assert_close(play(objective, data, 0)["autoencoder"].loss, torch.stack(losses).mean())


def test_micro_batches_average_to_the_whole_batch() -> None:
    prefix = replace(PREFIX, always_min_max=True)
    objectives = [make(prefix=prefix, equivariance=ALWAYS, adversarial=GAME) for _ in range(2)]
    for objective, groups in zip(objectives, ([(0, 1, 2, 3)], [(0, 1), (2, 3)]), strict=True):
        for module in objective.players.values():
            module.eval()
        for positions in groups:
            play(objective, batch(positions=positions), 7)
    for player in ("autoencoder", "discriminator"):
        whole, halves = (gradients(objective, player) for objective in objectives)
        for name, gradient in whole.items():
            torch.testing.assert_close(halves[name] / 2, gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_validation_reports_each_count() -> None:
    objective, data = make(prefix=PREFIX), batch()
    with torch.no_grad():
        objective.autoencoder.decoder.project_in.conv.weight[:, 3:6] = 0.0  # which then say nothing
    metrics = objective.validate(data, 0)
    assert [name for name in metrics if name.startswith("psnr_")] == ["psnr_3", "psnr_6", "psnr_8"]
    assert metrics["psnr_3"] == metrics["psnr_6"] != metrics["psnr_8"] == metrics["psnr"]
    one = make(prefix=replace(PREFIX, validated=(6,)))
    assert [name for name in one.validate(data, 0) if name.startswith("psnr_")] == ["psnr_6"]


# -- equivariance ----------------------------------------------------------------------------------------------------


def test_sides_of_the_latent_are_whole() -> None:
    assert EquivarianceConfig(min_scale=0.25).sizes((8, 8)) == [(n, n) for n in range(2, 9)]
    assert EquivarianceConfig(min_scale=0.5).sizes((6, 9)) == [(3, 4), (4, 6), (5, 8), (6, 9)]
    assert EquivarianceConfig(min_scale=0.01).sizes((2, 2)) == [(1, 1), (2, 2)]
    assert EquivarianceConfig(min_scale=1.0).sizes((4, 4)) == [(4, 4)]


def test_transforms_follow_the_step_and_the_seed() -> None:
    equivariance = EquivarianceConfig(probability=0.5)
    views = [draw_transform(equivariance, step, (8, 8), 0) for step in range(2000)]
    assert views == [draw_transform(equivariance, step, (8, 8), 0) for step in range(2000)]
    assert views != [draw_transform(equivariance, step, (8, 8), 1) for step in range(2000)]
    moved = [view for view in views if not view.keeps_geometry]
    assert abs(len(moved) / 2000 - 0.5 * (1 - 1 / 28)) < 0.04  # 7 sizes and 4 turns, one of them as it was
    assert {view.size for view in moved} == {None, *((n, n) for n in range(2, 8))}
    assert {view.quarter_turns for view in moved} == {0, 1, 2, 3}
    assert all(draw_transform(EquivarianceConfig(), step, (8, 8), 0) == LatentView() for step in range(50))


@pytest.mark.parametrize("size", [(24, 32), (22, 29)])
def test_all_losses_compare_with_the_moved_image(size: tuple[int, int]) -> None:
    """Both turns; sides that the factor does not divide are padded before they move."""
    objective = make(equivariance=ALWAYS, adversarial=GAME, image_size=size, seed=3)
    data, shapes = batch(size=size), set()
    for step in range(6):
        view = draw_transform(ALWAYS, step, (6, 8), 3)
        padded = F.pad(data.images / 255.0 * 2.0 - 1.0, (0, -size[1] % 4, 0, -size[0] % 4), mode="replicate")
        latent, wanted = objective.autoencoder.encode(padded), padded
        if view.size is not None:
            latent = F.interpolate(latent, view.size, mode="bilinear")
            wanted = F.interpolate(wanted, tuple(4 * side for side in view.size), mode="bilinear")
        latent, wanted = (torch.rot90(x, view.quarter_turns, (2, 3)) for x in (latent, wanted))
        fake = objective.autoencoder.decode(latent)
        if view.keeps_geometry:
            fake, wanted = (x[..., : size[0], : size[1]] for x in (fake, wanted))
        for module in objective.players.values():
            module.eval()  # spectral norms stay
        distance = (fake - wanted).abs().mean()
        judged = -objective.discriminator(fake).fake.mean()
        logits = objective.discriminator(fake.detach(), wanted)
        turns = play(objective, data, step)
        torch.testing.assert_close(turns["autoencoder"].loss, distance + 0.5 * judged)
        torch.testing.assert_close(turns["discriminator"].metrics["logit_real"], logits.real.mean())
        torch.testing.assert_close(turns["discriminator"].metrics["logit_fake"], logits.fake.mean())
        shapes.add(wanted.shape[2:])
    assert len(shapes) > 3
    assert any(height > width for height, width in shapes)  # some step turned the wide picture upright


def test_validation_knows_no_view() -> None:
    data = batch()
    plain, moved = make().validate(data, 0), make(equivariance=ALWAYS).validate(data, 0)
    assert {name: value.item() for name, value in plain.items()} == {n: v.item() for n, v in moved.items()}


def test_a_gaussian_latent_may_move_too() -> None:
    model = dc_ae_config("tiny", decoder_norms=("rms",) * 3, gaussian=True)
    objective = make(model=model, equivariance=ALWAYS, prefix=ChannelPrefixConfig(step=4), kl_weight=0.1)
    for step in range(3):
        turn = play(objective, batch(), step)["autoencoder"]
        torch.testing.assert_close(turn.loss, turn.metrics["l1"] + 0.1 * turn.metrics["kl"])


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prefix": ChannelPrefixConfig(step=8)}, "prefix.step is 8 and the latent has 8 channels"),
        ({"prefix": ChannelPrefixConfig(always_min_max=True)}, "prefix.step is 0, which keeps all"),
        ({"prefix": replace(PREFIX, validated=(4, 6))}, r"holds \[4\], which are not trained"),
        (
            {
                "equivariance": EquivarianceConfig(probability=0.5),
                "perceptual": PerceptualConfig(weight=1.0, network="vgg"),
            },
            "images down to 8 pixels",
        ),
        ({"equivariance": EquivarianceConfig(0.5, 0.1), "adversarial": GAME}, "needs sides of at least 6 pixels"),
    ],
)
def test_impossible_views_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**fields)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_smallest_image_that_a_discriminator_judges(layers: int) -> None:
    shape, side = DiscriminatorConfig(width=4, layers=layers), 3 * 2**layers
    judge = Discriminator(shape, 3, 0.9)
    assert judge(torch.randn(1, 3, side, side)).fake.shape == (1, 1, 1, 1)
    with pytest.raises(RuntimeError, match="Kernel size"):
        judge(torch.randn(1, 3, side - 1, side))
    model = dc_ae_config("tiny", decoder_norms=("rms",) * 3)
    TokenizerConfig(model, (side, 64), discriminator=shape, adversarial=GAME)
    with pytest.raises(ValueError, match=f"needs sides of at least {side} pixels"):
        TokenizerConfig(model, (side - 1, 64), discriminator=shape, adversarial=GAME)


@pytest.mark.parametrize(
    ("make_config", "message"),
    [
        (lambda: ChannelPrefixConfig(step=-1), "prefix.step is -1"),
        (lambda: EquivarianceConfig(probability=1.5), "equivariance.probability is 1.5"),
        (lambda: EquivarianceConfig(min_scale=0.0), "min_scale 0.0"),
    ],
)
def test_impossible_numbers_are_refused(make_config: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config()
