"""The motions of the built-in videos: their classes, how much moves, and how a plane lies after a part of the motion.

Enters: a class and uniform numbers. Leaves: a `Motion`, and the `Pose` of a plane at any moment of it. Why it exists:
the geometry is apart from what is drawn, and can be tested alone. Shifts are in pixels of the view, angles in radians.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from PIL import Image

_DIRECTIONS = {
    "right": (1, 0),
    "down_right": (1, 1),
    "down": (0, 1),
    "down_left": (-1, 1),
    "left": (-1, 0),
    "up_left": (-1, -1),
    "up": (0, -1),
    "up_right": (1, -1),
}
CAMERA_CLASSES = ("pan_left", "pan_right", "pan_up", "pan_down", "zoom_in", "zoom_out", "rotate_cw", "rotate_ccw")
"""Classes in which both planes move alike. In pan_left the view goes left, hence its content goes right; in rotate_cw
the content turns clockwise."""
CLASSES = (*CAMERA_CLASSES, *(f"digits_{direction}" for direction in _DIRECTIONS))
"""All classes; in those that are not the camera's, only the digits move."""
_TRAVEL = (0.25, 0.5)
"""Least and largest shift in a whole video, in sides of a frame."""
_TURN = (math.radians(30), math.radians(60))
"""Least and largest angle in a whole video, in radians."""
_ZOOM = (math.log(1.2), math.log(1.5))
"""Least and largest log of the enlargement in a whole video."""


class Motion(NamedTuple):
    """What happens to the content from the first frame to the last."""

    shift: tuple[float, float] = (0.0, 0.0)
    """To the right and down, in pixels of the view."""
    turn: float = 0.0
    """Clockwise, in radians."""
    zoom: float = 0.0
    """Log of the enlargement."""

    def without(self, other: Motion) -> Motion:
        """The shift and the zoom of this motion, each only where the other motion has none."""
        return Motion((0.0, 0.0) if any(other.shift) else self.shift, zoom=0.0 if other.zoom else self.zoom)


class Pose(NamedTuple):
    """How a plane lies under the view."""

    centre: tuple[float, float]
    """Point (x, y) of the plane that is seen in the middle of the view, in pixels of the plane."""
    turn: float
    """Angle of the content, clockwise, in radians."""
    scale: float
    """Pixels of the view per pixel of the plane."""

    def moved(self, motion: Motion, share: float) -> Pose:
        """The pose after a share of the motion; a negative share goes back."""
        cos, sin = math.cos(self.turn) * share / self.scale, math.sin(self.turn) * share / self.scale
        (x, y), (right, down) = self.centre, motion.shift
        centre = (x - cos * right - sin * down, y + sin * right - cos * down)
        return Pose(centre, self.turn + share * motion.turn, self.scale * math.exp(share * motion.zoom))

    def view(self, plane: Image.Image, size: int) -> Image.Image:
        """What is seen of the plane: a square of `size` pixels."""
        cos, sin, half = math.cos(self.turn) / self.scale, math.sin(self.turn) / self.scale, size / 2
        x, y = self.centre
        to_plane = (cos, sin, x - (cos + sin) * half, -sin, cos, y + (sin - cos) * half)
        return plane.transform((size, size), Image.Transform.AFFINE, to_plane, Image.Resampling.BICUBIC)


class Draws:
    """Uniform numbers, taken one after the other."""

    def __init__(self, numbers: list[float]) -> None:
        self._numbers = iter(numbers)

    def next(self) -> float:
        """The next number, in [0, 1)."""
        return next(self._numbers)

    def between(self, low: float, high: float) -> float:
        """The next number, stretched to [low, high)."""
        return low + (high - low) * self.next()


def motion_of(class_name: str, amount: float, size: int) -> Motion:
    """The motion of one class.

    Args:
        class_name: one of `CLASSES`.
        amount: in [0, 1), from the least motion to the largest.
        size: side of the view, in pixels.
    """
    travel, turn, zoom = (low + (high - low) * amount for low, high in (_TRAVEL, _TURN, _ZOOM))
    if class_name.startswith("zoom"):
        return Motion(zoom=zoom if class_name == "zoom_in" else -zoom)
    if class_name.startswith("rotate"):
        return Motion(turn=turn if class_name == "rotate_cw" else -turn)
    x, y = _DIRECTIONS[class_name.partition("_")[2]]
    reach = travel * size / math.hypot(x, y) * (-1 if class_name in CAMERA_CLASSES else 1)
    return Motion((x * reach, y * reach))


def any_motion(draws: Draws, size: int) -> Motion:
    """A shift as long as in some video with a shift, in any direction, with the zoom of some video with a zoom."""
    turn, reach = draws.between(0, 2 * math.pi), draws.between(*_TRAVEL) * size
    return Motion((reach * math.cos(turn), reach * math.sin(turn)), zoom=draws.between(*_ZOOM))
