"""Schedules against MAE's published formula, parameter groups, and the moving average."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pretrain.optim import LearningRate, build_adamw, parameter_groups, scheduled_lr, update_ema
from pretrain.optim_config import OptimConfig


def _mae_reference(epoch: float, lr: float, min_lr: float, warmup: float, epochs: float) -> float:
    """The per-iteration rule of He et al., section A.1, written from the paper: linear warm-up, then half a cosine."""
    if epoch < warmup:
        return lr * epoch / warmup
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


@pytest.mark.parametrize("minimum", [0.0, 1e-6])
def test_cosine_follows_the_papers_rule(minimum: float) -> None:
    samples_per_epoch, batch, epochs, warmup = 1000, 100, 20, 4
    for step in range(epochs * samples_per_epoch // batch):
        position = step * batch
        got = scheduled_lr(
            position,
            peak=2.4e-3,
            total=epochs * samples_per_epoch,
            warmup=warmup * samples_per_epoch,
            minimum=minimum,
            schedule="cosine",
        )
        want = _mae_reference(position / samples_per_epoch, 2.4e-3, minimum, warmup, epochs)
        assert got == pytest.approx(want, rel=1e-12)


def test_schedule_does_not_depend_on_the_batch() -> None:
    keywords = {"peak": 1.0, "total": 1000.0, "warmup": 100.0, "minimum": 0.0, "schedule": "linear"}
    assert scheduled_lr(550, **keywords) == pytest.approx(0.5)  # type: ignore[arg-type]
    assert scheduled_lr(5000, **keywords) == 0.0  # type: ignore[arg-type]


def test_linear_scaling_rule() -> None:
    assert OptimConfig(base_lr=1.5e-4).peak_lr(4096) == pytest.approx(2.4e-3)
    assert OptimConfig(base_lr=None, lr=3e-3).peak_lr(4096) == 3e-3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"base_lr": 1e-3, "lr": 1e-3}, "exactly one"),
        ({"base_lr": None}, "exactly one"),
        ({"warmup_epochs": 1, "warmup_steps": 1}, "give one"),
        ({"ema_decay": 1.5}, "optim.ema_decay is 1.5; expected more than 0 and less than 1"),
    ],
)
def test_contradictions_are_errors(settings: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        OptimConfig(**settings)  # type: ignore[arg-type]


def test_tokens_decay_and_biases_do_not() -> None:
    module = nn.Module()
    module.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
    module.linear = nn.Linear(4, 4)
    module.norm = nn.LayerNorm(4)
    module.frozen = nn.Parameter(torch.zeros(4, 4), requires_grad=False)
    decayed, free = parameter_groups(module.named_parameters(), 0.05)
    assert [p.shape for p in decayed["params"]] == [(1, 1, 4), (4, 4)]  # type: ignore[attr-defined]
    assert len(free["params"]) == 3  # type: ignore[arg-type]
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.05, 0.0)
    assert len(build_adamw(module.named_parameters(), OptimConfig()).param_groups) == 2


def test_ema_against_the_recurrence() -> None:
    weights = [torch.randn(5) for _ in range(4)]
    average, want = weights[0].clone(), weights[0].clone()
    for weight in weights[1:]:
        update_ema([average], [weight], 0.9)
        want = 0.9 * want + 0.1 * weight
    torch.testing.assert_close(average, want)


def test_a_player_has_its_own_settings_where_they_are_given() -> None:
    players = {"discriminator": {"lr": 1e-4, "betas": [0.5, 0.9], "warmup_steps": 3, "ema_decay": None}}
    optim = OptimConfig(base_lr=1.5e-4, warmup_epochs=2.0, weight_decay=0.1, ema_decay=0.99, players=players)
    own = optim.of("discriminator")
    assert own == OptimConfig(base_lr=None, lr=1e-4, betas=(0.5, 0.9), weight_decay=0.1, warmup_steps=3)
    assert optim.of("autoencoder") == OptimConfig(base_lr=1.5e-4, warmup_epochs=2.0, weight_decay=0.1, ema_decay=0.99)
    with pytest.raises(ValueError, match=r"optim\.players\.discriminator has the key 'rate'; known keys: base_lr, lr"):
        OptimConfig(players={"discriminator": {"rate": 1.0}})


def test_a_learning_rate_counts_samples() -> None:
    rate = LearningRate(OptimConfig(base_lr=None, lr=1.0, warmup_epochs=2), 8, samples_per_epoch=20, total=120)
    assert [rate.at(position) for position in (0, 20, 40)] == [0.0, 0.5, 1.0]
    assert rate.at(80) == pytest.approx(0.5)
    steps = LearningRate(OptimConfig(base_lr=None, lr=1.0, warmup_steps=5), 8, samples_per_epoch=0, total=120)
    assert steps.at(20) == 0.5
