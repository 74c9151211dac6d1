"""From images as they are stored to what models expect, and back to something to look at.

Enters: uint8 or uint16 images on any device. Leaves: float32 with zero mean and unit variance over the data set. Images
travel to the device as integers (a quarter of the bytes) and become floats there.
Legend: B batch, C channels, H/W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# The largest value of each stored type, which becomes 1.0.
_FULL_SCALE = {torch.uint8: 255.0, torch.uint16: 65535.0}


def default_mean(in_channels: int) -> tuple[float, ...]:
    """ImageNet's for 3 channels, else 0.5 each."""
    return IMAGENET_MEAN if in_channels == 3 else (0.5,) * in_channels


def default_std(in_channels: int) -> tuple[float, ...]:
    """ImageNet's for 3 channels, else 0.5 each."""
    return IMAGENET_STD if in_channels == 3 else (0.5,) * in_channels


def check_statistics(mean: tuple[float, ...], std: tuple[float, ...], channels: int) -> None:
    """Raises ValueError unless there is one number per channel in each, and every std is positive."""
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise ValueError(
                f"{name} has {len(values)} numbers and the model {channels} channels; expected one number per "
                f"channel. Set {name} to {channels} numbers, or to [] for the default."
            )
    if min(std) <= 0.0:
        raise ValueError(f"std is {list(std)}; expected positive numbers.")


def shown_channels(in_channels: int) -> int:
    """How many of the first channels a picture shows: 3 as red, green and blue, or the first alone in grey."""
    return 3 if in_channels >= 3 else 1


class Normalise:
    """`(image / full scale - mean) / std`, per channel, on the images' device."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """mean, std: one number per channel, on the scale where the stored range is [0, 1]; std > 0.

        Raises ValueError when their lengths differ or a std is not positive.
        """
        if not mean or len(mean) != len(std) or min(std) <= 0.0:
            raise ValueError(
                f"mean is {list(mean)} and std is {list(std)}; expected one number per channel in each, std positive."
            )
        self.mean = tuple(mean)
        self.std = tuple(std)
        # Per device, because copying them from the host again each step would make the host wait.
        self._constants: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, images: Tensor) -> Tensor:
        """images: uint8 or uint16 [B, C, H, W]. Returns float32 of the same shape.

        Raises ValueError for another type or number of channels.
        """
        if images.dtype not in _FULL_SCALE:
            raise ValueError(f"The images are {images.dtype}; expected uint8 or uint16 as stored, not yet normalised.")
        if images.ndim != 4 or images.shape[1] != len(self.mean):
            raise ValueError(
                f"The images have shape {list(images.shape)}, and mean and std have {len(self.mean)} channels; "
                f"expected [batch, {len(self.mean)}, height, width]. Make in_channels, mean and std fit the data."
            )
        mean, std = self._on(images.device)
        return (images.to(torch.float32) / _FULL_SCALE[images.dtype] - mean) / std

    def to_uint8(self, normalised: Tensor) -> Tensor:
        """The inverse for showing: float [B, C, H, W] -> uint8, clipped to the range."""
        mean, std = self._on(normalised.device)
        return ((normalised * std + mean) * 255.0).round().clamp(0.0, 255.0).to(torch.uint8)

    def to_picture(self, normalised: Tensor) -> Tensor:
        """The channels of `shown_channels` of float [B, C, H, W], as uint8 [B, 1 or 3, H, W] on the CPU."""
        return self.to_uint8(normalised)[:, : shown_channels(len(self.mean))].cpu()

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._constants:
            self._constants[device] = (
                torch.tensor(self.mean, device=device)[:, None, None],
                torch.tensor(self.std, device=device)[:, None, None],
            )
        return self._constants[device]
