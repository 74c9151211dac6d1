"""From images as they are stored to what models expect, and back to something to look at.

Enters: uint8 or uint16 images on any device. Leaves: float32 with zero mean and unit variance over the data set. Images
travel to the device as integers (a quarter of the bytes) and become floats there.
Legend: B batch, C channels, H/W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.models.statistics import shown_channels

_FULL_SCALE = {torch.uint8: 255.0, torch.uint16: 65535.0}
"""The largest value of each stored type, which becomes 1.0."""


class Normalise:
    """`(image / full scale - mean) / std`, per channel, on the images' device."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Takes the statistics of a data set.

        Args:
            mean: one number per channel, on the scale where the stored range is [0, 1].
            std: one number per channel, on the same scale; > 0.

        Raises:
            ValueError: their lengths differ, or a standard deviation is not positive.
        """
        if not mean or len(mean) != len(std) or min(std) <= 0.0:
            raise ValueError(
                f"mean is {list(mean)} and std is {list(std)}; expected one number per channel in each, std positive."
            )
        self.mean = tuple(mean)
        self.std = tuple(std)
        # Per device, because copying them from the host again each step would make the host wait.
        self._on_device: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, images: Tensor) -> Tensor:
        """Normalises stored images.

        Args:
            images: uint8 or uint16 [B, C, H, W].

        Returns:
            float32 [B, C, H, W], on the same device.

        Raises:
            ValueError: the images have another type or number of channels.
        """
        if images.dtype not in _FULL_SCALE:
            raise ValueError(f"The images are {images.dtype}; expected uint8 or uint16 as stored, not yet normalised.")
        if images.ndim != 4 or images.shape[1] != len(self.mean):
            raise ValueError(
                f"The images have shape {list(images.shape)}, and mean and std have {len(self.mean)} channels; "
                f"expected [batch, {len(self.mean)}, height, width]. Make in_channels, mean and std fit the data."
            )
        mean, std = self._statistics_on(images.device)
        return (images.to(torch.float32) / _FULL_SCALE[images.dtype] - mean) / std

    def to_uint8(self, normalised: Tensor) -> Tensor:
        """The inverse for showing: float [B, C, H, W] to uint8 of the same shape, clipped to the range."""
        mean, std = self._statistics_on(normalised.device)
        return ((normalised * std + mean) * 255.0).round().clamp(0.0, 255.0).to(torch.uint8)

    def to_picture(self, normalised: Tensor) -> Tensor:
        """The channels of `shown_channels` of float [B, C, H, W], as uint8 [B, 1 or 3, H, W] on the CPU."""
        return self.to_uint8(normalised)[:, : shown_channels(len(self.mean))].cpu()

    def _statistics_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, float32 [C, 1, 1] each."""
        if device not in self._on_device:
            self._on_device[device] = (
                torch.tensor(self.mean, device=device)[:, None, None],
                torch.tensor(self.std, device=device)[:, None, None],
            )
        return self._on_device[device]
