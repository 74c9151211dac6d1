"""What a sample becomes: from its members to one tensor, driven by given uniform numbers.

Enters: a `RawSample` and uniform numbers. Leaves: a tensor of a shape that all samples of a run share. Why it exists:
order, storage, workers and substitution are the same for pictures and for clips; this is all that differs.
Legend: C channels, H/W pixels, T frames, R clips of one video.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipes.decode.limits import DEFAULT_MAX_PIXELS
from data_pipes.decode.video import VIDEO_EXTENSIONS
from data_pipes.shards.members import IMAGE_EXTENSIONS, encoded_picture, encoded_video
from data_pipes.shards.reader import RawSample
from data_pipes.transforms.clips import ClipTransform
from data_pipes.transforms.image import TrainTransform
from data_pipes.transforms.pictures import picture_of, with_bit_depth

DTYPES = {8: torch.uint8, 16: torch.uint16}
"""Bit depth -> type of a sample's tensor."""


class Recipe(ABC):
    """A pure function of a sample's bytes and of `num_uniforms` numbers in [0, 1)."""

    @property
    @abstractmethod
    def extensions(self) -> tuple[str, ...]:
        """The extensions of the members that it reads, in the order of preference."""

    @property
    @abstractmethod
    def num_uniforms(self) -> int:
        """Uniform numbers per sample."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the result."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The type of the result."""

    @abstractmethod
    def __call__(self, raw: RawSample, uniforms: Sequence[float]) -> Tensor:
        """Makes the tensor of a sample.

        Args:
            raw: the sample.
            uniforms: [num_uniforms] in [0, 1).

        Raises:
            SampleError: the sample cannot be used.
        """

    def empty_batch(self, size: int) -> Tensor:
        """Memory for a batch, [size, *shape], in the order in which the results lie: transposing them into another one
        would cost 5% of all.
        """
        return torch.empty((size, *self.shape), dtype=self.dtype)


@dataclass(frozen=True)
class ImageRecipe(Recipe):
    """A picture, decoded, cropped, resized and maybe mirrored: uint8 or uint16 [C, H, W]."""

    transform: TrainTransform
    channels: int = 3
    """C."""
    bit_depth: int = 8
    """8 or 16; in a data set of 16 bits, 8-bit pictures are widened."""
    max_pixels: int = DEFAULT_MAX_PIXELS
    """Pixels of an encoded picture (height * width), at most."""
    member: str | None = None
    """Which member is the picture, a name or a pattern; None: the first that is known as one."""

    def __post_init__(self) -> None:
        if self.bit_depth not in DTYPES:
            raise ValueError(f"data.bit_depth is {self.bit_depth}; expected 8 or 16")

    @property
    def extensions(self) -> tuple[str, ...]:
        return tuple(IMAGE_EXTENSIONS) if self.member is None else (self.member,)

    @property
    def num_uniforms(self) -> int:
        return self.transform.num_uniforms

    @property
    def shape(self) -> tuple[int, ...]:
        return self.channels, *self.transform.size

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.bit_depth]

    def __call__(self, raw: RawSample, uniforms: Sequence[float]) -> Tensor:
        if self.bit_depth == 16:  # widened before it is resized: 8-bit rounding would stay visible
            wide = picture_of(raw, self.channels, torch.uint16, self.max_pixels, self.member)
            return self.transform(wide, uniforms)
        data = encoded_picture(raw, self.member)
        image = self.transform.load(data, uniforms, channels=self.channels, max_pixels=self.max_pixels)
        return with_bit_depth(image, self.dtype)

    def empty_batch(self, size: int) -> Tensor:
        return _channels_last(size, self.shape, self.dtype, axis=0)


@dataclass(frozen=True)
class ClipRecipe(Recipe):
    """R clips of one decoded video: uint8 [R, C, T, H, W]."""

    transform: ClipTransform
    max_pixels: int = DEFAULT_MAX_PIXELS
    """Pixels of a frame (height * width), at most."""
    member: str | None = None
    """Which member is the video, a name or a pattern; None: the first that is known as one."""

    @property
    def extensions(self) -> tuple[str, ...]:
        return tuple(VIDEO_EXTENSIONS) if self.member is None else (self.member,)

    @property
    def num_uniforms(self) -> int:
        return self.transform.num_uniforms

    @property
    def shape(self) -> tuple[int, ...]:
        return self.transform.shape

    @property
    def dtype(self) -> torch.dtype:
        return torch.uint8

    def __call__(self, raw: RawSample, uniforms: Sequence[float]) -> Tensor:
        return self.transform.load(encoded_video(raw, self.member), uniforms, max_pixels=self.max_pixels)

    def empty_batch(self, size: int) -> Tensor:
        return _channels_last(size, self.shape, self.dtype, axis=1)


def _channels_last(size: int, shape: tuple[int, ...], dtype: torch.dtype, axis: int) -> Tensor:
    """Memory of the shape [size, *shape] in which the channels, `axis` of the shape, are the innermost dimension."""
    others = shape[:axis] + shape[axis + 1 :]
    return torch.empty((size, *others, shape[axis]), dtype=dtype).movedim(-1, axis + 1)
