"""From the bytes of a JPEG to RGB or grey, at its own size or at a fraction of it.

Enters: an encoded JPEG. Leaves: uint8 [H, W, C]. Why it exists: JPEGs are nearly all of what is trained on, and their
decoding costs more than all else that a loader does. libjpeg-turbo does it, by simplejpeg, without Python's lock. A
crop that is resized to half its size or less is decoded at 1/2, 1/4 or 1/8 by a smaller inverse transform.

The whole picture is always decoded, also for a crop: whether a picture is damaged never depends on the crop. Leaving
out the rows below the crop saved 5% of a sample's time, and the faults in them went unseen. What libjpeg warns of is
damage, unless the fault has nothing to do with the pixels (see data_pipes.decode.jpeg_repair).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from data_pipes.decode.jpeg_repair import MAX_REPAIRS, repaired
from data_pipes.decode.limits import check_pixels
from data_pipes.errors import DecodeError

JPEG_MAGIC = b"\xff\xd8\xff"


class JpegHeader(NamedTuple):
    """What the header declares."""

    height: int
    width: int
    grey: bool
    """Whether there is one component; else there are three."""


def read_header(data: bytes) -> JpegHeader | None:
    """The header of a JPEG; None: not one that `decode` takes (truncated, CMYK, a rare chroma subsampling): try PIL."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError):  # KeyError: chroma subsampling 4:4:1, which simplejpeg has no name for
        return None
    return None if colours in ("CMYK", "YCCK") else JpegHeader(height, width, colours == "Gray")


def check_cmyk(data: bytes, max_pixels: int) -> None:
    """Refuses a JPEG of four components that is damaged: PIL, which reads it, fills what is missing with grey.

    Args:
        data: a JPEG that `read_header` does not take.
        max_pixels: height * width, at most.
    Raises:
        DecodeError: "pixels" above max_pixels, "decode" where it is damaged.
    """
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError):
        return  # PIL says what it is
    if colours in ("CMYK", "YCCK"):
        check_pixels(height, width, max_pixels)
        decode(data, JpegHeader(height, width, False), 4)


def decode(data: bytes, header: JpegHeader, channels: int, shrink: int = 1) -> NDArray[np.uint8]:
    """The whole picture.

    Args:
        data: the file.
        header: of `read_header`.
        channels: 3 for RGB, 1 for the luma plane, 4 for CMYK of a file that is CMYK.
        shrink: 1, 2, 4 or 8.
    Returns:
        [ceil(H / shrink), ceil(W / shrink), channels].
    Raises:
        DecodeError: the picture is damaged.
    """
    pixels = np.empty((-(-header.height // shrink), -(-header.width // shrink), channels), np.uint8)
    better, num_repairs = data, 0
    while True:
        try:
            _decode_into(pixels, better, shrink)
            return pixels
        except ValueError as error:
            found = repaired(better, str(error)) if num_repairs < MAX_REPAIRS else None
            if found is None:
                cut = " (truncated)" if "remature end" in str(error) else ""
                raise DecodeError(
                    "decode", f"damaged JPEG of {header.height} x {header.width} pixels: {error}{cut}"
                ) from error
            better, num_repairs = found, num_repairs + 1


def _decode_into(pixels: NDArray[np.uint8], data: bytes, shrink: int) -> None:
    """Decodes to exactly the given size.

    Raises:
        ValueError: libjpeg failed, or only warned; after a warning the pixels are decoded.
    """
    height, width, channels = pixels.shape
    colours = {1: "GRAY", 3: "RGB", 4: "CMYK"}[channels]
    if shrink == 1:
        simplejpeg.decode_jpeg(data, colours, buffer=pixels)
    else:
        simplejpeg.decode_jpeg(
            data, colours, min_height=height, min_width=width, min_factor=float(shrink), buffer=pixels
        )
