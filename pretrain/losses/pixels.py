"""Pixel targets of masked autoencoders.

Enters: normalised images, predictions and masks. Leaves: patches and losses. Pure functions, float32 in any autocast.
Legend: B batch, N patches (row-major over the grid), C channels, H/W pixels, p/q patch height/width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.losses.reconstruction import at_least_float32

TARGET_EPS = 1e-6
"""Added to a patch's variance, as in the original MAE."""


def patchify(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Cuts images into patches with values in the order (p, q, c).

    Args:
        images: [B, C, H, W].
        patch_size: (p, q), divides (H, W).

    Returns:
        [B, N, p*q*C].
    """
    return split_patches(images, patch_size).permute(0, 1, 2, 4, 5, 3).flatten(1, 2).flatten(2)


def split_patches(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Views images [B, C, H, W] as patches [B, rows, columns, C, p, q] without a copy."""
    grid: Tensor = images.unflatten(3, (-1, patch_size[1])).unflatten(2, (-1, patch_size[0]))
    return grid.permute(0, 2, 4, 1, 3, 5)  # from [B, C, rows, p, columns, q]


def unpatchify(patches: Tensor, grid_size: tuple[int, int], patch_size: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`.

    Args:
        patches: [B, N, p*q*C].
        grid_size: (rows, columns), whose product is N.
        patch_size: (p, q).

    Returns:
        [B, C, H, W].
    """
    grid: Tensor = patches.unflatten(2, (*patch_size, -1)).unflatten(1, grid_size)  # [B, rows, columns, p, q, C]
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each patch over all its values jointly.

    Args:
        patches: [B, N, p*q*C].

    Returns:
        (mean, sqrt(unbiased variance + 1e-6)), each [B, N, 1], at least float32.
    """
    patches = at_least_float32(patches)
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + TARGET_EPS).sqrt()


def normalise_patches(patches: Tensor) -> Tensor:
    """The "normalised pixels" target of He et al. (arXiv 2111.06377): [B, N, p*q*C], at least float32."""
    mean, std = patch_statistics(patches)
    return (patches - mean) / std


def masked_patch_loss(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over the values of the hidden patches alone, as in He et al. (arXiv 2111.06377).

    Args:
        prediction: [B, N, p*q*C].
        target: [B, N, p*q*C].
        mask: bool [B, N], True = hidden; at least one hidden patch in the batch.

    Returns:
        0-d, at least float32.
    """
    patch_loss = (at_least_float32(prediction) - target).square().mean(dim=-1)  # [B, N]
    return (patch_loss * mask).sum() / mask.sum()
