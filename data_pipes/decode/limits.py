"""The limit that every decoder checks before it decodes.

Enters: what a header declares. Leaves: nothing, or a `DecodeError`. Why it exists: a file of a few kilobytes may
declare gigabytes of pixels; the decoders of all formats refuse that in the same way.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from data_pipes.errors import DecodeError

Pixels = NDArray[Any]
"""uint8 or uint16 [H, W, C]."""

DEFAULT_MAX_PIXELS = 89_478_485
"""As PIL: 256 MB of RGB. PIL itself refuses twice as many, which is the largest limit that has an effect."""


def check_pixels(height: int, width: int, max_pixels: int) -> None:
    """Refuses a picture that is empty or too large.

    Args:
        height: as the header declares it.
        width: as the header declares it.
        max_pixels: height * width, at most.
    Raises:
        DecodeError: "decode" for an empty picture, "pixels" for one above the limit.
    """
    if height < 1 or width < 1:
        raise DecodeError("decode", f"the picture is empty: {height} x {width} pixels")
    if height * width > max_pixels:
        raise DecodeError(
            "pixels",
            f"the header declares {height} x {width} = {height * width:,} pixels, more than max_pixels = "
            f"{max_pixels:,}; raise data.max_pixels if such pictures are wanted",
        )
