"""From the bytes of a JPEG to RGB or grey: all of it, or no more than a crop needs.

Enters: an encoded JPEG. Leaves: uint8 [H, W, C]. Why it exists: JPEGs are nearly all of what is trained on, and their
decoding costs more than all else that a loader does. libjpeg-turbo does it, by simplejpeg, without Python's lock. Two
savings, for a crop that is known before the picture is decoded:

- Rows below the crop (13% of the rows of a RandomResizedCrop) are not decoded, which takes 10% off. The height in the
  header is lowered, and libjpeg stops there: the rows above keep every bit. Entropy coding has no other place to leave.
- A crop that is resized to half its size or less is decoded at 1/2, 1/4 or 1/8 by a smaller inverse transform.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from data_pipes.errors import DecodeError

JPEG_MAGIC = b"\xff\xd8\xff"

_SEQUENTIAL = (0xC0, 0xC1)
"""Markers that start a frame whose picture comes top down, Huffman coded."""
_OTHER_FRAMES = {*range(0xC2, 0xD0)} - {0xC4, 0xC8, 0xCC}
"""Markers that start any other frame: progressive, lossless, arithmetic coded."""
_SCAN, _RESTART_INTERVAL = 0xDA, 0xDD
_REST_IS_LEFT = "extraneous bytes before marker 0xd9"
"""libjpeg's first warning, when it had nothing else to say and found more data than the lowered height accounts for."""


class JpegHeader(NamedTuple):
    """What the header declares."""

    height: int
    width: int
    grey: bool
    """Whether there is one component; else there are three."""


def read_header(data: bytes) -> JpegHeader | None:
    """The header of a JPEG; None: not one that `decode` takes (truncated, CMYK, a rare chroma subsampling): try PIL."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except (ValueError, KeyError):  # KeyError: chroma subsampling 4:4:1, which simplejpeg has no name for
        return None
    return None if colours in ("CMYK", "YCCK") else JpegHeader(height, width, colours == "Gray")


def decode(data: bytes, header: JpegHeader, channels: int, shrink: int = 1) -> NDArray[np.uint8]:
    """The whole picture.

    Args:
        data: the file.
        header: of `read_header`.
        channels: 3 for RGB, 1 for the luma plane.
        shrink: 1, 2, 4 or 8.
    Returns:
        [ceil(H / shrink), ceil(W / shrink), channels].
    Raises:
        DecodeError: the picture is damaged.
    """
    pixels = _empty(header.height, header.width, channels, shrink)
    try:
        _decode_into(pixels, data, shrink)
    except ValueError as error:
        cut = " (truncated)" if "remature end" in str(error) else ""
        found = f"damaged JPEG of {header.height} x {header.width} pixels: {error}{cut}"
        raise DecodeError("decode", found) from error
    return pixels


def decode_top(data: bytes, header: JpegHeader, channels: int, num_rows: int, shrink: int = 1) -> NDArray[np.uint8]:
    """As `decode`, but for the first `num_rows` rows of the picture, or more, whichever is cheaper.

    Truncation is always noticed. Damage below these rows is not, nor is damage above that only shows by data left over
    at the end (blocks of zeros); PIL overlooks that too. Progressive pictures and ones with restart markers are decoded
    whole.

    Args:
        data: the file.
        header: of `read_header`.
        channels: 3 for RGB, 1 for the luma plane.
        num_rows: rows of the picture that are needed, before it is shrunk.
        shrink: 1, 2, 4 or 8.
    Returns:
        [rows, ceil(W / shrink), channels], at least ceil(num_rows / shrink) rows where the picture has as many.
    Raises:
        DecodeError: the picture is damaged.
    """
    cut = _cut(data, header, num_rows)
    if cut is None:
        return decode(data, header, channels, shrink)
    height, shorter = cut
    pixels = _empty(height, header.width, channels, shrink)
    try:
        _decode_into(pixels, shorter, shrink)
    except ValueError as error:
        if not str(error).endswith(_REST_IS_LEFT):
            return decode(data, header, channels, shrink)
    return pixels


def _empty(height: int, width: int, channels: int, shrink: int) -> NDArray[np.uint8]:
    return np.empty((-(-height // shrink), -(-width // shrink), channels), np.uint8)


def _decode_into(pixels: NDArray[np.uint8], data: bytes, shrink: int) -> None:
    """Decodes to exactly the given size.

    Raises:
        ValueError: libjpeg failed, or only warned; after a warning the pixels are decoded.
    """
    height, width, channels = pixels.shape
    colours = "GRAY" if channels == 1 else "RGB"
    if shrink == 1:
        simplejpeg.decode_jpeg(data, colours, buffer=pixels)
    else:
        simplejpeg.decode_jpeg(
            data, colours, min_height=height, min_width=width, min_factor=float(shrink), buffer=pixels
        )


def _cut(data: bytes, header: JpegHeader, num_rows: int) -> tuple[int, bytes] | None:
    """The same JPEG, declared to end at or below the row `num_rows`. Takes 4 us.

    Returns:
        (height, data); None: there is nothing to gain, or it is no such simple picture.
    """
    if num_rows + 1 >= header.height:
        return None
    place, end = 2, len(data) - 20
    frame, num_components, rows_per_unit = 0, 0, 8
    while place < end:
        if data[place] != 0xFF:
            return None
        marker, length = data[place + 1], data[place + 2] << 8 | data[place + 3]
        if marker in _SEQUENTIAL:
            frame, num_components = place, data[place + 9]
            size = data[place + 5] << 8 | data[place + 6], data[place + 7] << 8 | data[place + 8]
            if num_components not in (1, 3) or size != header[:2]:
                return None
            if num_components == 3:  # one component: its sampling factors mean nothing
                rows_per_unit = 8 * max(data[place + 11 + 3 * component] & 15 for component in range(3))
        elif marker in _OTHER_FRAMES or marker == _RESTART_INTERVAL:
            return None
        elif marker == _SCAN:
            break
        place += 2 + length
    if not frame or data[place + 4] != num_components:  # several scans
        return None
    # one row more than needed: interpolating the chroma of a row takes the one below
    height = -(-(num_rows + 1) // rows_per_unit) * rows_per_unit
    if height >= header.height:
        return None
    return height, b"".join((data[: frame + 5], height.to_bytes(2, "big"), data[frame + 7 :]))
