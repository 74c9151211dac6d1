"""What can be wrong with one sample, and the limit that every decoder checks first.

Enters: nothing. Leaves: `SampleError` and `DecodeError`, and the check of a header's size. Why it exists: the decoders
of each format and the module that chooses between them share these, and a bad sample must be told from a bad shard: the
one is replaced and counted, the other stops the run.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from data_pipes.errors import DecodeError

Pixels = NDArray[Any]
# uint8 or uint16 [H, W, C]

DEFAULT_MAX_PIXELS = 89_478_485
"""As PIL: 256 MB of RGB. PIL itself refuses twice as many, which is the largest limit that has an effect."""


def check_pixels(height: int, width: int, max_pixels: int) -> None:
    """Raises DecodeError "decode" for an empty picture, "pixels" for one above the limit."""
    if height < 1 or width < 1:
        raise DecodeError("decode", f"the picture is empty: {height} x {width} pixels")
    if height * width > max_pixels:
        raise DecodeError(
            "pixels",
            f"the header declares {height} x {width} = {height * width:,} pixels, more than max_pixels = "
            f"{max_pixels:,}; raise data.max_pixels if such pictures are wanted",
        )
