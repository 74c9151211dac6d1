"""The transforms of training and evaluation, on integers.

Enters: a picture, decoded [C, H, W] uint8 or uint16 or as it is stored, and for training a fixed number of uniform
numbers. Leaves: a picture of the model's size, same type; normalising is left to the device. Why it exists: antialiased
bicubic resizing of uint8 takes a fifth of the time of the float32 recipe, a crop that is known before the picture is
decoded saves a part of the decoding, and transforms driven by given numbers are a pure function of the sample's
position. Sizes are (height, width) in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from data_pipes.decode import jpeg
from data_pipes.decode.limits import DEFAULT_MAX_PIXELS, check_pixels
from data_pipes.decode.picture import decode_image
from data_pipes.errors import SampleError

_TRIES = 10
"""Random parts that are tried, as in torchvision's RandomResizedCrop."""
MAX_ASPECT = 100
"""Longer over shorter side of a picture or frame in evaluation, at most: resizing the short side of a thinner one would
fill the memory."""


@dataclass(frozen=True)
class TrainTransform:
    """A random part of the picture, resized; then maybe mirrored."""

    size: tuple[int, int]
    """Height and width of the result, in pixels."""
    scale: tuple[float, float] = (0.2, 1.0)
    """Least and largest area of the part, as a fraction of the picture."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Least and largest width / height of the part, log-uniform."""
    flip: float = 0.5
    """Probability of a left-right flip."""
    scaled_decode: bool = True
    """Whether `load` decodes a part of a JPEG that will shrink to a half or less at 1/2, 1/4 or 1/8 of its size."""

    num_uniforms = 2 * _TRIES + 3
    """Uniform numbers per picture."""

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise ValueError(f"image size {self.size}; expected two positive numbers (height, width)")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"data.crop_scale is {self.scale}; expected 0 < low <= high <= 1 (fractions of the area)")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"data.crop_ratio is {self.ratio}; expected 0 < low <= high (width / height)")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"data.flip is {self.flip}; expected a probability, 0 to 1")

    def __call__(self, image: Tensor, uniforms: NDArray[Any] | Sequence[float]) -> Tensor:
        """Transforms a decoded picture.

        Args:
            image: uint8 or uint16 [C, H, W].
            uniforms: [num_uniforms] in [0, 1).

        Returns:
            [C, *size] of the same type.
        """
        top, left, height, width = self.crop_box(image.shape[1], image.shape[2], uniforms)
        part = resize(image[:, top : top + height, left : left + width], self.size)
        return part.flip(-1) if uniforms[2 * _TRIES + 2] < self.flip else part

    def load(
        self,
        data: bytes,
        uniforms: NDArray[Any] | Sequence[float],
        *,
        channels: int | None,
        max_pixels: int = DEFAULT_MAX_PIXELS,
    ) -> Tensor:
        """Decodes and transforms a picture in the cheapest way.

        The result equals `self(decode_image(data, channels, max_pixels), uniforms)` to the bit, unless a JPEG's part is
        decoded at 1 / n of its size: then the part's edges lie on the nearest multiples of n pixels, and the picture
        differs by 43 dB (median of 201 photographs; n = 2). For comparison: bilinear in place of bicubic resizing makes
        40 dB, storing the result as a JPEG of quality 95 makes 36 dB.

        Args:
            data: the bytes of the picture.
            uniforms: [num_uniforms] in [0, 1).
            channels: see `decode_image`.
            max_pixels: see `decode_image`.

        Returns:
            uint8 or uint16 [C, *size].

        Raises:
            DecodeError: see `decode_image`.
        """
        header = jpeg.read_header(data) if data.startswith(jpeg.JPEG_MAGIC) and channels in (None, 1, 3) else None
        if header is None:
            return self(decode_image(data, channels, max_pixels), uniforms)
        check_pixels(header.height, header.width, max_pixels)
        top, left, height, width = self.crop_box(header.height, header.width, uniforms)
        shrink = self._shrink(height, width) if self.scaled_decode else 1
        grey = channels == 1 or (channels is None and header.grey)
        pixels = jpeg.decode(data, header, 1 if grey else 3, shrink)
        rows, columns = _nearest(top, height, shrink), _nearest(left, width, shrink)
        part = resize(torch.from_numpy(pixels[rows, columns]).permute(2, 0, 1), self.size)
        return part.flip(-1) if uniforms[2 * _TRIES + 2] < self.flip else part

    def _shrink(self, height: int, width: int) -> int:
        """The largest of 1, 2, 4 and 8 by which a part can be divided and still be as large as the result."""
        most = min((height - 1) // self.size[0], (width - 1) // self.size[1])  # - 1: both edges are rounded
        return 8 if most >= 8 else 4 if most >= 4 else 2 if most >= 2 else 1

    def crop_box(self, height: int, width: int, uniforms: NDArray[Any] | Sequence[float]) -> tuple[int, int, int, int]:
        """The part of a picture, as torchvision's RandomResizedCrop.get_params draws it: ten tries, then the largest
        centred part of an allowed ratio.

        Args:
            height: of the picture, in pixels.
            width: of the picture, in pixels.
            uniforms: [num_uniforms] in [0, 1).

        Returns:
            Top, left, height and width, in pixels.
        """
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for attempt in range(_TRIES):
            area = height * width * (self.scale[0] + uniforms[attempt] * (self.scale[1] - self.scale[0]))
            ratio = math.exp(low + uniforms[_TRIES + attempt] * (high - low))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                top = int(uniforms[2 * _TRIES] * (height - h + 1))
                left = int(uniforms[2 * _TRIES + 1] * (width - w + 1))
                return top, left, h, w
        w, h = width, height
        if width / height < self.ratio[0]:
            h = max(1, round(width / self.ratio[0]))
        elif width / height > self.ratio[1]:
            w = max(1, round(height * self.ratio[1]))
        return (height - h) // 2, (width - w) // 2, h, w


@dataclass(frozen=True)
class EvalTransform:
    """The centre of the picture, after its short side was resized. A picture of the right size is left alone."""

    size: tuple[int, int]
    """Height and width of the result, in pixels."""
    short_side: int | None = None
    """Short side of the picture before the crop, in pixels; None: the longer side of `size` / 0.875 (256 for 224)."""

    def __post_init__(self) -> None:
        if min(self.size) < 1 or self._short_side < max(self.size):
            raise ValueError(
                f"a centre crop of {self.size} does not fit into a short side of {self._short_side} pixels; expected "
                "positive sizes and a short side of at least the crop's longer side"
            )

    @property
    def _short_side(self) -> int:
        return round(max(self.size) / 0.875) if self.short_side is None else self.short_side

    def __call__(self, image: Tensor) -> Tensor:
        """Transforms a decoded picture.

        Args:
            image: uint8 or uint16 [C, H, W].

        Returns:
            [C, *size] of the same type.

        Raises:
            SampleError: "aspect" for a picture that is over 100 times as long as wide.
        """
        height, width = image.shape[1:]
        if (height, width) == self.size:
            return image
        if max(height, width) > MAX_ASPECT * min(height, width):
            raise SampleError(
                "aspect", f"the picture of {height} x {width} pixels is too thin to resize its short side"
            )
        resized = size_of_short_side(height, width, self._short_side)
        image = resize(image, resized)
        top, left = (centre_start(full, crop) for full, crop in zip(resized, self.size, strict=True))
        return image[:, top : top + self.size[0], left : left + self.size[1]]


def _nearest(first: int, length: int, shrink: int) -> slice:
    """Where the pixels [first, first + length) of a picture are after its sides were divided by `shrink`."""
    return slice(round(first / shrink), round((first + length) / shrink))  # half to even: up and down alike


def size_of_short_side(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Height and width after the shorter side became `short_side` pixels; the longer one is rounded down."""
    long_side = short_side * max(height, width) // min(height, width)
    return (long_side, short_side) if height > width else (short_side, long_side)


def centre_start(full: int, crop: int) -> int:
    """The first pixel of a centre crop, rounded down where the room on both sides is odd.

    So does transformers. torchvision and timm round half to even, which is one pixel further where the room is 3, 7,
    11, ... pixels.

    Args:
        full: side of the picture, in pixels.
        crop: side of the crop, in pixels; at most `full`.
    """
    return (full - crop) // 2


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes bicubically with antialias, as torchvision and PIL do.

    [C, H, W] memory takes twice as long as [H, W, C].

    Args:
        image: uint8 or uint16 [C, H, W].
        size: height and width of the result, in pixels.

    Returns:
        [C, *size] of the same type. With 3 or 4 channels of uint8 it lies in memory as [H, W, C]: torch would need 0.06
        ms for the other order, a quarter of the whole at 224 pixels.
    """
    if tuple(image.shape[1:]) == size:
        return image
    if image.dtype == torch.uint8:
        pixels = image.permute(1, 2, 0)
        pixels = pixels.contiguous() if image.shape[0] in (3, 4) else pixels
        return functional.interpolate(pixels[None].permute(0, 3, 1, 2), size, mode="bicubic", antialias=True)[0]
    values = functional.interpolate(image[None].to(torch.float32), size, mode="bicubic", antialias=True)[0]
    return values.clamp_(0, 65535).round_().to(image.dtype)
