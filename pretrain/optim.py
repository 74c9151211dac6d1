"""Optimizers: parameter groups, and schedules as pure functions of the number of samples consumed.

Schedules count samples, not steps, so that a run whose global batch changes on resume stays on the same curve.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pretrain.optim_config import OptimConfig


@dataclass(frozen=True)
class LearningRate:
    """A player's learning rate as a function of the samples consumed."""

    config: OptimConfig
    """The player's own settings."""
    global_batch: int
    """Samples per step."""
    samples_per_epoch: int
    """For a warm-up in epochs; 0 where nobody knows."""
    total: int
    """The run's length in samples."""

    def at(self, position: int) -> float:
        """The learning rate of the step that starts at sample `position`."""
        warmup = self.config.warmup_epochs * self.samples_per_epoch + self.config.warmup_steps * self.global_batch
        return scheduled_lr(
            position,
            peak=self.config.peak_lr(self.global_batch),
            total=self.total,
            warmup=warmup,
            minimum=self.config.min_lr,
            schedule=self.config.schedule,
        )


def scheduled_lr(position: float, *, peak: float, total: float, warmup: float, minimum: float, schedule: str) -> float:
    """The learning rate for a step: linear from 0 through the warm-up, then the schedule's shape down to `minimum`.

    MAE (arXiv 2111.06377) evaluates its half-cosine per iteration in the same way.

    Args:
        position: samples consumed before the step.
        peak: after the warm-up.
        total: the run's length, in samples.
        warmup: length of the warm-up, in samples.
        minimum: at the end of the run.
        schedule: "cosine", "linear" or "constant", which stays at `peak`.
    """
    if position < warmup:
        return peak * position / warmup
    progress = min(1.0, (position - warmup) / max(1e-12, total - warmup))
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return minimum + (peak - minimum) * (1.0 - progress)
    assert schedule == "cosine", schedule
    return minimum + (peak - minimum) * 0.5 * (1.0 + math.cos(math.pi * progress))


def parameter_groups(parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, object]]:
    """Two AdamW groups: decayed, and not decayed (biases and one-dimensional parameters). Frozen ones are left out.

    Class and mask tokens have three dimensions and are decayed, as in the original MAE.

    Args:
        parameters: by canonical name.
        weight_decay: of the first group, per unit of learning rate.

    Returns:
        The groups that are not empty, as AdamW takes them.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in parameters:
        if parameter.requires_grad:
            (free if parameter.ndim <= 1 or name.endswith(".bias") else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW; its kernel leaves weights and state as they are where `found_inf` says so.

    The attributes are those that `torch.amp.GradScaler` sets, with the same meaning.
    """

    found_inf: Tensor | None = None
    """0-d float32 on the parameters' device: 1 = the next `step` changes nothing."""
    grad_scale: Tensor | None = None
    """0-d float32 that gradients are divided by; None = they are not."""


def build_adamw(parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> AdamW:
    """Fused AdamW; its learning rate is set before each step by the loop."""
    groups = parameter_groups(parameters, config.weight_decay)
    return AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)


def start_adamw(optimizer: torch.optim.AdamW, parameters: Iterable[Tensor]) -> None:
    """Makes AdamW's state of each parameter, as its first step would, so that there is something to save or load into.

    torch.distributed.checkpoint would otherwise make it by a step with zero gradients, which counts as one: bias
    correction would then be one step ahead for the whole run.
    """
    for parameter in parameters:
        if not optimizer.state[parameter]:
            on_device = optimizer.defaults["fused"] or optimizer.defaults["capturable"]
            device = parameter.device if on_device else torch.device("cpu")
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }


@torch.no_grad()
def update_ema(average: list[Tensor], weights: list[Tensor], decay: float) -> None:
    """average <- decay * average + (1 - decay) * weights, in place, on local shards."""
    torch._foreach_lerp_(average, weights, 1.0 - decay)
