"""A sample's picture as a tensor, of the number of bits that a run asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from data_pipes.decode.picture import decode_image
from data_pipes.errors import SampleError
from data_pipes.shards.members import encoded_picture
from data_pipes.shards.reader import RawSample


def with_bit_depth(image: Tensor, dtype: torch.dtype) -> Tensor:
    """A picture in the bit depth of its data set; 8 bits are widened to 16 where they must.

    Args:
        image: uint8 or uint16, of any shape.
        dtype: torch.uint8 or torch.uint16.

    Raises:
        SampleError: "bit_depth": 16 bits would have to be cut to 8.
    """
    if image.dtype == dtype:
        return image
    if dtype == torch.uint8:
        raise SampleError("bit_depth", "16-bit picture in a data set of 8 bits; set data.bit_depth=16")
    return (image.to(torch.int32) * 257).to(dtype)


def picture_of(
    raw: RawSample, channels: int | None, dtype: torch.dtype, max_pixels: int, member: str | None = None
) -> Tensor:
    """The decoded picture of a sample.

    Args:
        raw: the sample.
        channels: see `decode_image`.
        dtype: torch.uint8 or torch.uint16.
        max_pixels: see `decode_image`.
        member: see `encoded_picture`.

    Returns:
        [C, H, W] of `dtype`.

    Raises:
        SampleError: "no_image", "bit_depth", or see `decode_image`.
    """
    return with_bit_depth(decode_image(encoded_picture(raw, member), channels, max_pixels), dtype)
