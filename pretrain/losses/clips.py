"""Pixel targets of masked autoencoders for video.

Enters: clips, predictions and masks. Leaves: tubelets and losses. Pure functions, float32 in any autocast.
Legend: B batch, N tokens (time-major, then row by row), M predicted tokens, C channels, T frames, H/W pixels, t/p/q a
tubelet's frames and its height/width in pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.losses.reconstruction import at_least_float32

CHANNEL_EPS = 1e-6
"""Added to a channel's standard deviation, as in VideoMAE."""


def tubelets(clips: Tensor, token_size: tuple[int, int, int]) -> Tensor:
    """Cuts clips into tubelets with values in the order (t, p, q, c).

    Args:
        clips: [B, C, T, H, W], of any type.
        token_size: (t, p, q), divides (T, H, W).

    Returns:
        [B, N, t*p*q, C].
    """
    return split_tubelets(clips, token_size).permute(0, 1, 2, 3, 5, 6, 7, 4).flatten(4, 6).flatten(1, 3)


def split_tubelets(clips: Tensor, token_size: tuple[int, int, int]) -> Tensor:
    """Views clips [B, C, T, H, W] as tubelets [B, steps, rows, columns, C, t, p, q] without a copy."""
    frames, height, width = token_size
    grid: Tensor = clips.unflatten(4, (-1, width)).unflatten(3, (-1, height)).unflatten(2, (-1, frames))
    return grid.permute(0, 2, 4, 6, 1, 3, 5, 7)  # from [B, C, steps, t, rows, p, columns, q]


def from_tubelets(values: Tensor, grid_size: tuple[int, int, int], token_size: tuple[int, int, int]) -> Tensor:
    """The inverse of `tubelets`.

    Args:
        values: [B, N, t*p*q, C].
        grid_size: (steps, rows, columns), whose product is N.
        token_size: (t, p, q).

    Returns:
        [B, C, T, H, W].
    """
    grid: Tensor = values.unflatten(2, token_size).unflatten(1, grid_size)  # [B, steps, rows, columns, t, p, q, C]
    return grid.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def predicted_frames(num_frames: int, num_predicted: int) -> list[int]:
    """The frames of a clip that are predicted: evenly spread from the first to the last, rounded down (MAE-ST, arXiv
    2205.09113: 8 of 16). Exact in integers, where a float linspace may round an exact frame down to the one before.
    """
    if num_predicted == 1:
        return [0]
    return [number * (num_frames - 1) // (num_predicted - 1) for number in range(num_predicted)]


def channel_statistics(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of each tubelet.

    VideoMAE's targets (arXiv 2203.12602) are the z-scores that these give.

    Args:
        values: [B, M, t*p*q, C].

    Returns:
        (mean, unbiased deviation + 1e-6), each [B, M, 1, C], at least float32.
    """
    variance, mean = torch.var_mean(at_least_float32(values), dim=-2, keepdim=True)
    return mean, variance.sqrt() + CHANNEL_EPS


def clip_loss(prediction: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    """Mean over the clips of each clip's mean squared error over the tokens that count.

    Where equally many count in all clips, as in the papers' settings, this is the mean over all counted tokens; where
    they do not, every clip weighs the same, so that splitting a batch changes nothing.

    Args:
        prediction: [B, M, t*p*q*C].
        target: [B, M, t*p*q*C].
        counted: bool [B, M], at least one per clip.

    Returns:
        0-d, at least float32.
    """
    token_loss = (at_least_float32(prediction) - target).square().mean(dim=-1)  # [B, M]
    return ((token_loss * counted).sum(dim=1) / counted.sum(dim=1)).mean()
