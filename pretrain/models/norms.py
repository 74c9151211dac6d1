"""Normalisations of DC-AE: RMS over channels, and batch norm whose statistics are the same on all ranks.

Enters and leaves: feature maps [B, C, H, W], in the type in which they came.
Legend: B batch, C channels, H/W pixels of the map.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-5
"""Added to the mean square or the variance, under the root."""
BATCH_NORM_MOMENTUM = 0.1
"""Weight of a step's statistics in the running ones."""


class RMSNorm(nn.Module):
    """Each pixel's channels divided by their root mean square, times a weight, plus a bias.

    Plain torch operations, which torch.compile fuses; the mean is float32 in any precision.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        last = x.permute(0, 2, 3, 1)  # a contiguous view where memory is channels-last
        # Without weights, so that the fused kernel runs though those are float32 and x is bfloat16.
        normed = F.rms_norm(last, (last.shape[-1],), eps=NORM_EPS)
        return torch.addcmul(self.bias, normed, self.weight).to(x.dtype).permute(0, 3, 1, 2)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)


class BatchNorm(nn.Module):
    """`nn.BatchNorm2d`, with the same names, whose forward pass may be repeated and which can be frozen.

    A training forward pass leaves the batch's statistics in `batch_statistics` and the running ones alone: activation
    checkpointing runs a block twice and would count its batch twice. `commit_statistics` takes them over afterwards,
    averaged over ranks, so that every rank validates, saves and freezes the same numbers.
    """

    running_mean: Tensor
    """float32 [C], moving average over training steps."""
    running_var: Tensor
    """float32 [C], moving average of the unbiased variance over training steps."""
    num_batches_tracked: Tensor
    """0-d int64: how many training steps the averages have seen."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self.frozen = False
        """Use the running statistics in training too, and keep them."""
        self.batch_statistics: tuple[Tensor, Tensor] | None = None
        """Mean and unbiased variance [C] of the last training forward pass; None once they are committed."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        weight, bias, mean, var = (t.to(dtype) for t in (self.weight, self.bias, self.running_mean, self.running_var))
        if not self.training or self.frozen:
            return F.batch_norm(x, mean, var, weight, bias, False, 0.0, NORM_EPS)
        mean, var = torch.zeros_like(mean), torch.zeros_like(var)
        normed = F.batch_norm(x, mean, var, weight, bias, True, 1.0, NORM_EPS)  # momentum 1: replaces the zeros
        self.batch_statistics = mean, var
        return normed

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        self.running_mean.zero_()
        self.running_var.fill_(1.0)
        self.num_batches_tracked.zero_()


@torch.no_grad()
def commit_statistics(norms: Iterable[BatchNorm]) -> None:
    """Moves running statistics towards those of the last training forward pass, averaged over ranks in one reduction.

    A collective where a process group exists: every rank's batch has the same size.
    """
    fresh = [(norm, norm.batch_statistics) for norm in norms if norm.batch_statistics is not None]
    if not fresh:
        return
    flat = torch.cat([tensor for _, statistics in fresh for tensor in statistics])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(flat)
        flat /= torch.distributed.get_world_size()
    parts = iter(flat.split([tensor.numel() for _, statistics in fresh for tensor in statistics]))
    for norm, _ in fresh:
        for running in (norm.running_mean, norm.running_var):
            running.lerp_(next(parts).to(running.dtype), BATCH_NORM_MOMENTUM)
        norm.num_batches_tracked += 1
        norm.batch_statistics = None
