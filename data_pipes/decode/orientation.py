"""How the frames of a video are turned and mirrored to be shown.

Enters: the display matrix of a container. Leaves: an `Orientation`. Why it exists: a matrix has eight ways to put a
rectangle upright, and an angle tells only four of them: of a mirrored video it gives a wrong one.
Source: ISO/IEC 14496-12, 6.2.2 (the matrix of a track); FFmpeg's libavutil/display.h.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_MATRIX_BYTES = 36


class Orientation(NamedTuple):
    """First a mirror, then quarter turns."""

    mirrored: bool = False
    """Whether left and right of the stored frame change places."""
    quarter_turns: int = 0
    """Counter-clockwise, 0 to 3."""

    def upright(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A stored frame [H, W, C] as it is shown: a view."""
        return np.rot90(pixels[:, ::-1] if self.mirrored else pixels, self.quarter_turns)


def orientation_of(frame: Any) -> Orientation:
    """What the display matrix of a decoded frame asks for; frames without one, or with one of zeros, are upright.

    Args:
        frame: of PyAV.
    """
    data = next((bytes(part) for part in frame.side_data if part.type.name == "DISPLAYMATRIX"), b"")
    if len(data) < _MATRIX_BYTES:
        return Orientation()
    # A pixel (x, y) goes to (a x + c y, b x + d y); y points down.
    a, b, _, c, d = (float(value) for value in np.frombuffer(data, np.int32, 5))
    mirrored = a * d - b * c < 0
    if mirrored:  # what remains when the mirror has gone before
        a, b = -a, -b
    across, down = math.hypot(a, c), math.hypot(b, d)  # scales are left out, as FFmpeg does
    if not across or not down:
        return Orientation()
    degrees = -math.degrees(math.atan2(b / down, a / across))
    return Orientation(mirrored, round(degrees / 90) % 4)
