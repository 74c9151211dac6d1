"""What a picture stores, and the channels that are asked for.

Enters: pixels as a file has them. Leaves: pixels of the wanted number of channels. Why it exists: packing keeps what is
stored, training takes what its model can use, and both have to begin with the same pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from data_pipes.decode.limits import Pixels
from data_pipes.errors import DecodeError


class Stored(NamedTuple):
    """All that a picture holds, unconverted, as it lies in the file."""

    pixels: Pixels
    """uint8 or uint16 [H, W, C]."""
    has_alpha: bool = False
    """Whether the last channel is alpha."""
    is_rgb: bool = False
    """Whether the first three channels are said to be red, green and blue."""
    is_premultiplied: bool = False
    """Whether the colours are multiplied by alpha."""


def settle_alpha(stored: Stored, channels: int | None) -> Pixels:
    """One policy for grey and RGB with and without alpha.

    Args:
        stored: the picture.
        channels: that are asked for; None: what the picture has.
    Returns:
        The pixels without alpha; RGBA where four channels are asked for of a grey or RGB picture.
    """
    pixels, has_alpha = stored.pixels, stored.has_alpha
    colours = pixels[..., :-1] if has_alpha else pixels
    if channels != 4 or colours.shape[2] not in (1, 3):
        return np.ascontiguousarray(colours)
    alpha = pixels[..., -1:] if has_alpha else np.full_like(pixels[..., :1], np.iinfo(pixels.dtype).max)
    return np.concatenate([np.broadcast_to(colours, (*colours.shape[:2], 3)), alpha], axis=2)


def convert_channels(pixels: Pixels, channels: int | None) -> Pixels:
    """[H, W, found] -> [H, W, channels].

    Raises:
        DecodeError: "channels", when there is no such conversion.
    """
    found = pixels.shape[2]
    if channels in (None, found):
        return pixels
    if found == 1 and channels == 3:
        return np.repeat(pixels, 3, axis=2)
    if found == 3 and channels == 1:  # PIL's weights of ITU-R 601, in 16-bit fixed point
        weighted = pixels.astype(np.uint64) @ np.array([19595, 38470, 7471], np.uint64)
        return ((weighted + np.uint64(0x8000)) >> np.uint64(16)).astype(pixels.dtype)[..., None]
    raise DecodeError("channels", f"the picture has {found} channels, the model takes {channels}")
