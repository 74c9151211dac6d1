"""Augmentation of fine-tuning beyond crops and flips: RandAugment on stored pixels, mixup and cutmix on the input.

In: a batch and a seed. Out: another batch; the same for the same seed. A clip is augmented as one picture: all its
frames in the same way.

Legend: B batch, C channels, T frames, H/W pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor
from torchvision.transforms import v2


class RandAugment:
    """RandAugment (Cubuk et al., arXiv 1909.13719), torchvision's, on stored pixels.

    Its magnitudes count to 30, those in timm's names of recipes to 10: timm's m7 is 21 here, m9 is 27.
    """

    def __init__(self, num_ops: int, magnitude: int) -> None:
        """One policy for all samples.

        Args:
            num_ops: operations per sample.
            magnitude: from 0 to 30.
        """
        self.augment = v2.RandAugment(num_ops, magnitude, interpolation=v2.InterpolationMode.BILINEAR)

    def __call__(self, stored: Tensor, seed: int) -> Tensor:
        """Augments each sample on its own.

        Args:
            stored: uint8 images [B, C, H, W] or R clips of each video [B, R, C, T, H, W], C = 1 or 3, on the CPU.
            seed: the same seed gives the same result.

        Returns:
            A tensor of the same shape.
        """
        clips = stored[:, None, :, None] if stored.ndim == 4 else stored
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            augmented = [self.augment(clip.transpose(0, 1)) for sample in clips for clip in sample]  # [T, C, H, W]
        return torch.stack(augmented).transpose(1, 2).reshape(stored.shape)


class Mix:
    """timm's mixup (arXiv 1710.09412) or cutmix (1905.04899), one of them for a whole batch, and label smoothing."""

    def __init__(self, mixup: float, cutmix: float, smoothing: float, num_classes: int) -> None:
        """Without mixup and cutmix labels are still smoothed.

        Args:
            mixup: alpha of the Beta distribution of the shares; 0 = never.
            cutmix: the same, for cutmix.
            smoothing: share of a label that goes to all classes.
            num_classes: K.
        """
        self.smoothing, self.num_classes = smoothing, num_classes
        self.mixup: Mixup | None = None
        if mixup > 0 or cutmix > 0:
            self.mixup = Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=num_classes)

    def __call__(self, inputs: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Mixes a batch; a box of cutmix is cut from all frames.

        Args:
            inputs: normalised [B, C, H, W] or [B, C, T, H, W]; B is even where mixup or cutmix is on.
            labels: int64 [B].
            seed: the same seed gives the same result.

        Returns:
            (inputs of the same shape, soft targets [B, K]).
        """
        if self.mixup is None:
            return inputs, mixup_target(labels, self.num_classes, smoothing=self.smoothing)
        pictures = inputs.flatten(1, -3).clone(memory_format=torch.contiguous_format)  # timm mixes in place
        with _numpy_seed(seed):  # timm draws from numpy's own generator
            pictures, targets = self.mixup(pictures, labels)
        return pictures.view(inputs.shape), targets


@contextmanager
def _numpy_seed(seed: int) -> Iterator[None]:
    """Seeds numpy's global generator, and puts its state back."""
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002


def seed_of(*numbers: int) -> int:
    """A seed of 32 bits from several numbers, each at least 0; lists of one length differ where a number does."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
