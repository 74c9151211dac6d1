"""Holds out a share of the training images, on which protocols make their choices.

In: labels. Out: a bool mask, True = held out: a pure function of (labels, fraction, seed), stratified by class. It
exists so that no head, learning rate or k is ever chosen on the images that the reported figure is measured on.
"""

from __future__ import annotations

import torch
from torch import Tensor


def held_out_mask(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Holds out a share of every class, and at least one image of each class that has two or more.

    Args:
        labels: int64 [n], >= 0.
        fraction: in (0, 1).
        seed: of the random choice within each class.

    Returns:
        Bool [n], True = held out.

    Raises:
        ValueError: fraction outside (0, 1), or no class has two images.
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"held_out_fraction={fraction}: it must lie strictly between 0 and 1, e.g. 0.1")
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]  # classes in order, random order within each
    counts = torch.bincount(labels)
    first_row = torch.cumsum(counts, 0) - counts
    rank_in_class = torch.arange(len(labels)) - first_row[labels[by_class]]
    quota = (counts * fraction).round().long().clamp(min=1)
    quota[counts < 2] = 0
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[by_class] = rank_in_class < quota[labels[by_class]]
    if not mask.any():
        raise ValueError(f"no class among {len(labels)} training images has two: none can be held out to choose on")
    return mask
