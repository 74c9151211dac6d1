"""The game's losses against their formulas, the discriminator, its penalties, and LeCam's averages over a resume."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.losses.adversarial import (
    LeCam,
    adaptive_factors,
    discriminator_loss,
    generator_loss,
    squared_gradient,
    with_gradient,
)
from pretrain.losses.config import AdversarialConfig
from pretrain.models.tokenizers.config import DiscriminatorConfig
from pretrain.models.tokenizers.discriminator import Discriminator

NORMS = ("spectral", "batch", "none")


def make(norm: str = "spectral", layers: int = 2, channels: int = 3) -> Discriminator:
    torch.manual_seed(0)
    return Discriminator(DiscriminatorConfig(width=8, layers=layers, norm=norm), channels, lecam_decay=0.9)


# -- losses ----------------------------------------------------------------------------------------------------------


def test_losses_are_their_formulas() -> None:
    real, fake = torch.randn(2, 3, 1, 4, 5, dtype=torch.float64)
    for sample in range(3):
        r, f = real[sample].flatten().tolist(), fake[sample].flatten().tolist()
        hinge = sum(max(0.0, 1.0 - x) for x in r) / 40 + sum(max(0.0, 1.0 + x) for x in f) / 40
        assert discriminator_loss(real, fake, "hinge")[sample].item() == pytest.approx(hinge)
        assert generator_loss(fake, "hinge")[sample].item() == pytest.approx(-sum(f) / 20)
        probability = lambda x: torch.sigmoid(torch.tensor(x, dtype=torch.float64)).log().item()
        both = -sum(probability(x) for x in r) / 20 - sum(probability(-x) for x in f) / 20
        assert discriminator_loss(real, fake, "non_saturating")[sample].item() == pytest.approx(both)
        assert generator_loss(fake, "non_saturating")[sample].item() == pytest.approx(
            -sum(probability(x) for x in f) / 20
        )


def test_losses_are_float32_under_autocast() -> None:
    model, x = make(), torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x, x + 1.0)
        assert logits.fake.dtype == torch.bfloat16
        assert discriminator_loss(logits.real, logits.fake, "hinge").dtype == torch.float32
        assert generator_loss(logits.fake, "non_saturating").dtype == torch.float32
        assert model.lecam.penalty(logits.real, logits.fake).dtype == torch.float32


def test_r1_is_the_squared_gradient_of_each_sample() -> None:
    model, images = make(), torch.randn(3, 3, 32, 32, requires_grad=True)
    model.eval()
    penalty = squared_gradient(model(images.detach(), images).real, images)
    for sample in range(3):
        one = images[sample : sample + 1].detach().requires_grad_()
        (gradient,) = torch.autograd.grad(model(one.detach(), one).real.mean(), one)
        torch.testing.assert_close(penalty[sample], gradient.square().sum())
    penalty.sum().backward()
    assert model.layers[0].weight.grad.abs().max() > 0


def test_adaptive_factors_belong_to_samples() -> None:
    wanted, given = torch.randn(2, 3, 3, 4, 4)
    factors = adaptive_factors(wanted, given, 1e4)
    for sample in range(3):
        expected = wanted[sample].square().sum().sqrt() / given[sample].square().sum().sqrt()
        torch.testing.assert_close(factors[sample], expected)
    assert (adaptive_factors(wanted, torch.zeros_like(given), 7.0) == 7.0).all()
    torch.testing.assert_close(adaptive_factors(wanted[:1], given[:1], 1e4), factors[:1])


def test_joined_gradients_pass_with_the_value() -> None:
    weight = torch.randn(3, requires_grad=True)
    gradient = torch.randn(3)
    loss = with_gradient(torch.tensor(5.0), 2.0 * weight, gradient)
    assert loss == 5.0
    loss.backward()
    torch.testing.assert_close(weight.grad, 2.0 * gradient)


# -- weights over time -----------------------------------------------------------------------------------------------


def test_the_discriminator_learns_before_it_counts() -> None:
    """Defect 10."""
    config = AdversarialConfig(weight=0.5, start_step=10, warmup_steps=5, ramp_steps=4)
    assert [config.discriminator_learns(step) for step in (0, 9, 10, 100)] == [False, False, True, True]
    shares = [config.generator_share(step) for step in range(9, 22)]
    assert shares == [0, 0, 0, 0, 0, 0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1]
    assert AdversarialConfig(weight=0.5).generator_share(0) == 1.0
    assert AdversarialConfig().generator_share(1000) == 0.0
    assert not AdversarialConfig().discriminator_learns(1000)


def test_r1_is_lazy_and_weighs_the_same() -> None:
    config = AdversarialConfig(weight=1.0, start_step=3, r1_weight=2.0, r1_every=4)
    factors = [config.r1_factor(step) for step in range(3, 15)]
    assert factors == [4.0, 0, 0, 0] * 3
    assert sum(factors) / 12 == 0.5 * 2.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"weight": -1.0}, "weight is -1"), ({"r1_every": 0}, "r1_every is 0"), ({"lecam_decay": 1.0}, "decay in")],
)
def test_impossible_games_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdversarialConfig(**fields)


# -- the discriminator -----------------------------------------------------------------------------------------------


class Literal(nn.Module):
    """The same network from torch's own parts."""

    def __init__(self, ours: Discriminator, norm: str) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number, layer in enumerate([*ours.layers, ours.head]):
            has_norm = layer.norm_weight is not None
            conv = nn.Conv2d(layer.weight.shape[1], layer.weight.shape[0], 4, layer.stride, 1, bias=not has_norm)
            conv.weight.data.copy_(layer.weight.data)
            if not has_norm:
                conv.bias.data.copy_(layer.bias.data)
            if norm == "spectral":
                conv = nn.utils.parametrizations.spectral_norm(conv, n_power_iterations=1)
                matrix, state = layer.weight.detach().flatten(1), conv.parametrizations.weight[0]
                state._v.copy_(F.normalize(layer.direction @ matrix, dim=0))
                state._u.copy_(F.normalize(matrix @ state._v, dim=0))
            layers.append(conv)
            if has_norm:
                batch_norm = nn.BatchNorm2d(len(layer.norm_weight), track_running_stats=False)
                batch_norm.weight.data.copy_(layer.norm_weight.data)
                batch_norm.bias.data.copy_(layer.bias.data)
                layers.append(batch_norm)
            if number < len(ours.layers):
                layers.append(nn.LeakyReLU(0.2))
        self.layers = nn.Sequential(*layers)


@pytest.mark.parametrize("norm", NORMS)
def test_the_discriminator_is_built_of_torchs_parts(norm: str) -> None:
    ours = make(norm)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    literal = Literal(ours, norm).layers.eval()  # where spectral norm takes the directions as they are
    fake, real = torch.randn(2, 2, 3, 32, 32)
    logits = ours(fake, real)
    torch.testing.assert_close(logits.fake, literal(fake))
    torch.testing.assert_close(logits.real, literal(real))
    assert logits.fake.shape == (2, 1, 6, 6)


def test_three_layers_see_70_pixels() -> None:
    model, x = make("none", layers=3), torch.randn(1, 3, 160, 160, requires_grad=True)
    logits = model(x).fake
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    seen = x.grad[0].abs().sum(dim=0).nonzero()
    assert (seen.amax(dim=0) - seen.amin(dim=0) + 1).tolist() == [70, 70]
    assert [layer.weight.shape[0] for layer in model.layers] == [8, 16, 32, 64]


@pytest.mark.parametrize("norm", NORMS)
def test_the_autoencoders_turn_leaves_the_discriminator_alone(norm: str) -> None:
    """Defect 3, second half: no gradient in its weights, no step of its buffers, but one for the picture."""
    model, fake = make(norm), torch.randn(2, 3, 32, 32, requires_grad=True)
    before = copy.deepcopy(model.state_dict())
    model(fake).fake.mean().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert fake.grad.abs().max() > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    logits = model(fake, fake.detach() + 1.0)
    discriminator_loss(logits.real, logits.fake, "hinge").mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
    moved = any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert moved == (norm == "spectral")


def test_spectral_norm_tends_to_the_largest_singular_value() -> None:
    model, x = make("spectral"), torch.randn(1, 3, 32, 32)
    for _ in range(200):
        model(x, x)
    layer = model.layers[1]
    expected = torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2)
    torch.testing.assert_close(layer._spectral_norm(layer.weight, advance=False), expected, rtol=1e-3, atol=0)


def test_samples_stay_apart_but_for_batch_norm() -> None:
    x = torch.randn(4, 3, 32, 32)
    for norm in NORMS:
        model = make(norm)
        same = torch.allclose(model(x).fake[:2], model(x[:2]).fake, atol=1e-6)
        assert same == (norm != "batch"), norm


@pytest.mark.parametrize("norm", NORMS)
def test_initialisation_from_meta_fills_everything(norm: str) -> None:
    with torch.device("meta"):
        model = Discriminator(DiscriminatorConfig(width=32, layers=2, norm=norm), 3, 0.9)
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(float("nan") if tensor.is_floating_point() else 7)
    torch.manual_seed(3)
    model.init_weights()
    first = copy.deepcopy(model.state_dict())
    assert all(tensor.isfinite().all() for tensor in first.values())
    assert 0.018 < model.layers[1].weight.std() < 0.022
    torch.manual_seed(3)
    model.init_weights()
    assert all(torch.equal(tensor, first[name]) for name, tensor in model.state_dict().items())


# -- LeCam -----------------------------------------------------------------------------------------------------------


def literal_lecam(steps: list[list[tuple[Tensor, Tensor]]], decay: float) -> tuple[float, float]:
    """Averages that count in the step after `steps`."""
    real = fake = 0.0
    for micro_batches in steps:
        real = decay * real + (1 - decay) * sum(r.mean().item() for r, _ in micro_batches) / len(micro_batches)
        fake = decay * fake + (1 - decay) * sum(f.mean().item() for _, f in micro_batches) / len(micro_batches)
    return real, fake


def test_lecam_is_its_formula_over_steps_and_micro_batches() -> None:
    torch.manual_seed(0)
    steps = [[tuple(torch.randn(2, 3, 1, 2, 2) + 1.0) for _ in range(2)] for _ in range(4)]
    lecam = LeCam(0.9)
    for step, micro_batches in enumerate(steps):
        for real, fake in micro_batches:
            before = lecam.averages.clone()
            lecam.collect(real, fake, step + 10)
        assert torch.equal(lecam.averages, before)  # the same for all micro-batches of a step but the first
    lecam.collect(*steps[0][0], 14)
    real_average, fake_average = literal_lecam(steps, 0.9)
    torch.testing.assert_close(lecam.averages, torch.tensor([real_average, fake_average]))
    real, fake = torch.randn(2, 3, 1, 2, 2)
    expected = F.relu(real - fake_average) ** 2 + F.relu(real_average - fake) ** 2
    torch.testing.assert_close(lecam.penalty(real, fake), expected.mean(dim=(1, 2, 3)))


def test_lecam_survives_a_resume_at_every_step() -> None:
    """Defect 5: the averages, and what is collected of the step before, are part of the state dict."""
    torch.manual_seed(0)
    logits = [tuple(torch.randn(2, 3, 1, 2, 2)) for _ in range(5)]
    whole = LeCam(0.9)
    for resumed_at in range(5):
        lecam = LeCam(0.9)
        for step, pair in enumerate(logits):
            if step == resumed_at:
                state = lecam.state_dict()
                lecam = LeCam(0.9)
                lecam.load_state_dict(state)
            lecam.collect(*pair, step)
        if resumed_at == 0:
            whole = lecam
        assert torch.equal(lecam.averages, whole.averages)
        assert torch.equal(lecam.collected, whole.collected)
    assert {"lecam.averages", "lecam.collected", "lecam.collected_step"} <= make().state_dict().keys()
