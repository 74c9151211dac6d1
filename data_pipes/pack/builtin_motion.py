"""The built-in videos: motions of a camera and of digits over photographs, labelled by the motion.

Enters: options and the number of a video. Leaves: the bytes of a small H.264 file. Why it exists: a video encoder needs
something temporal to learn, without a download, with the texture of real pictures.

A video shows two planes: a photograph of scikit-image, and over it handwritten digits of scikit-learn. In the camera's
classes both planes move alike; in the digits' classes only the digits move. Each frame is cut from the planes by one
affine map, which follows from where the middle of the video looks, how much it moves, and the class.

One frame must say nothing about the class. So the planes, the places, the angle (all of the circle), the scale, the
amount of motion and the colour of the digits come from the same distributions in all classes; the motion is symmetrical
about the middle of the video, and every class has a twin that is its reversal in time; classes without a zoom or a pan
look as at some moment of one. Photographs and digits of the validation set are others than those of training.
Left-right flips change the class: train with data.flip=0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import PurePosixPath
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageStat

from data_pipes.decode.video import import_av
from data_pipes.order.hashing import hash_uniform
from data_pipes.pack import builtin_pictures
from data_pipes.pack.h264 import PIXELS, H264Options, encode_h264
from data_pipes.pack.sources import Source, SourceFile

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
_CAMERA = ("pan_left", "pan_right", "pan_up", "pan_down", "zoom_in", "zoom_out", "rotate_cw", "rotate_ccw")
# pan_left: the view goes left, hence its content right; rotate_cw: the content turns clockwise
CLASSES = (*_CAMERA, *(f"digits_{direction}" for direction in _DIRECTIONS))

_PHOTOGRAPHS = {
    "train": ("astronaut.png", "brick.png", "chelsea.png", "coffee.png", "grass.png", "ihc.png", "rocket.jpg"),
    "val": ("camera.png", "coins.png", "gravel.png", "motorcycle_left.png"),
}
_VAL_DIGITS = 5
# every fifth digit is shown in validation only
_SHORT_SIDE = 3.2
# of a photograph, in sizes of a frame
_TRAVEL, _TURN, _ZOOM = (0.25, 0.5), (math.radians(30), math.radians(60)), (math.log(1.2), math.log(1.5))
# least and most motion in a whole video: sizes of a frame, angle, log of the scale
_SCALES = (1.0, 2.0)
# of the planes in the middle of the video
_REACH = 1.13
# how far from its middle a video looks, in sides of the view: half its diagonal when it is largest, and half the
# longest travel
_MIN_CONTRAST = 12.0
# standard deviation of the grey levels in each quarter of the view: over a clear sky, a pan would look like moving
# digits
_TRIES = 32
_CELLS, _CELL, _DIGIT, _SHARE = 7, 0.5, 0.36, 0.9
# of the plane of digits: cells along a side, the size of a cell and of a digit in sizes of a frame, share of cells used
_COLOURS = ((200, 256), (0, 56))
# of the digits, each channel: over a dark ground, over a bright one
_NUM_DRAWS = 512
# uniform numbers per video; at most 1 + 4 + 4 + 2 * 32 + 4 * 49 + 2 + 3 are used
_RATE = 24
# frames per second
_ENCODER = H264Options(gop=12, crf=12, preset="veryfast")
_BYTES_PER_PIXEL = 0.2
# of an encoded video: a guess, by which shards are cut
_VERSION = 1


@dataclass(frozen=True)
class MotionOptions:
    """How many videos, and what they are like."""

    videos: int = 2000
    # of training, in turns of the classes
    val_videos: int = 400
    # of validation
    size: int = 64
    # pixels, height and width
    frames: int = 24
    # of a video; more of them make the same motion slower
    seed: int = 0
    # another seed gives other videos

    def __post_init__(self) -> None:
        if min(self.videos, self.val_videos) < 1 or self.frames < 2:
            raise ValueError(
                f"builtin:motion with {self.videos} videos, {self.val_videos} for validation, of {self.frames} frames; "
                "expected 1 or more videos of each and 2 or more frames"
            )
        if self.size < 16 or self.size % 2:
            raise ValueError(f"builtin:motion with size={self.size}; expected an even number of pixels, 16 or more")
        if self.seed < 0:
            raise ValueError(f"builtin:motion with seed={self.seed}; expected 0 or more")

    @classmethod
    def parse(cls, text: str) -> MotionOptions:
        """From "videos=400,size=96"; "" means the defaults. Raises ValueError."""
        known = [field.name for field in fields(cls)]
        values: dict[str, int] = {}
        for part in filter(None, text.split(",")):
            name, _, value = part.partition("=")
            if name not in known or not value.isascii() or not value.isdigit():
                raise ValueError(f"builtin:motion: found {part!r}; expected name=number with {', '.join(known)}")
            values[name] = int(value)
        return cls(**values)


class Motion(NamedTuple):
    """What happens to the content from the first frame to the last."""

    shift: tuple[float, float] = (0.0, 0.0)
    # right and down, pixels of the view
    turn: float = 0.0
    # clockwise, radians
    zoom: float = 0.0
    # log of the enlargement

    def without(self, other: Motion) -> Motion:
        """Only that of which the other has nothing."""
        return Motion((0.0, 0.0) if any(other.shift) else self.shift, zoom=0.0 if other.zoom else self.zoom)


class Pose(NamedTuple):
    """How a plane lies under the view."""

    centre: tuple[float, float]
    # point (x, y) of the plane that is seen in the middle of the view, pixels of the plane
    turn: float
    # of the content, clockwise, radians
    scale: float
    # pixels of the view per pixel of the plane

    def moved(self, motion: Motion, share: float) -> Pose:
        """After a share of the motion; a negative one goes back."""
        cos, sin = math.cos(self.turn) * share / self.scale, math.sin(self.turn) * share / self.scale
        (x, y), (right, down) = self.centre, motion.shift
        centre = (x - cos * right - sin * down, y + sin * right - cos * down)
        return Pose(centre, self.turn + share * motion.turn, self.scale * math.exp(share * motion.zoom))

    def view(self, plane: Image.Image, size: int) -> Image.Image:
        """The square of `size` pixels that is seen."""
        cos, sin, half = math.cos(self.turn) / self.scale, math.sin(self.turn) / self.scale, size / 2
        x, y = self.centre
        to_plane = (cos, sin, x - (cos + sin) * half, -sin, cos, y + (sin - cos) * half)
        return plane.transform((size, size), Image.Transform.AFFINE, to_plane, Image.Resampling.BICUBIC)


class MotionSource(Source):
    """The videos as files in class folders, each made when it is read."""

    sizes_are_exact = False

    def __init__(self, options: MotionOptions | None = None, split: Literal["train", "val"] = "train") -> None:
        """Raises ValueError where scikit-image or scikit-learn is missing, ImportError without PyAV."""
        super().__init__("builtin:motion" if split == "train" else "builtin:motion, validation")
        self.options, self._split = options or MotionOptions(), split
        import_av()
        short_side = round(_SHORT_SIDE * self.options.size)
        self._photographs = [builtin_pictures.photograph(name, short_side) for name in _PHOTOGRAPHS[split]]
        side = round(_DIGIT * self.options.size)
        self._digits = [
            Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
            for number, pixels in enumerate(builtin_pictures.digits()[0])
            if (number % _VAL_DIGITS == 0) == (split == "val")
        ]

    def validation(self) -> MotionSource:
        return MotionSource(self.options, "val")

    def files(self) -> Iterator[SourceFile]:
        options = self.options
        size_bytes = int(options.size**2 * options.frames * _BYTES_PER_PIXEL)
        checksum = f"motion {_VERSION}: {options.size} pixels, {options.frames} frames, seed {options.seed}"
        for number in range(options.videos if self._split == "train" else options.val_videos):
            yield SourceFile(f"{CLASSES[number % len(CLASSES)]}/{number:06d}.mp4", size_bytes, checksum)

    def read(self, name: str) -> bytes:
        av, frames = import_av(), []
        reformatter = av.video.reformatter.VideoReformatter()
        for number, image in enumerate(self.draw(int(PurePosixPath(name).stem))):
            frames.append(reformatter.reformat(av.VideoFrame.from_image(image), format=PIXELS, threads=1))
            frames[-1].pts, frames[-1].time_base = number, Fraction(1, _RATE)
        return encode_h264(frames, _ENCODER)

    def draw(self, number: int) -> list[Image.Image]:
        """The frames of a video; its class is `number` modulo their count."""
        size, kind = self.options.size, CLASSES[number % len(CLASSES)]
        draws = _Draws(hash_uniform(self.options.seed, [number], int(self._split == "val"), _NUM_DRAWS)[0].tolist())
        motion = _motion(kind, draws.next(), size)
        stray, moment = _any_motion(draws, size), draws.between(-0.5, 0.5)
        strays = stray.without(motion if kind in _CAMERA else Motion()), stray.without(motion)
        turns = draws.between(0, 2 * math.pi), draws.between(0, 2 * math.pi)
        scales = [math.exp(draws.between(*map(math.log, _SCALES))) for _ in turns]
        ground = self._photographs[number // len(CLASSES) % len(self._photographs)]
        centre, brightness = _place(ground, size / scales[0] * math.exp(-strays[0].zoom * moment), draws)
        below = Pose(centre, turns[0], scales[0]).moved(strays[0], moment)
        digits, cell = self._digits_plane(draws), _CELL * size
        centre = (
            digits.width / 2 + draws.between(-cell / 2, cell / 2),
            digits.height / 2 + draws.between(-cell / 2, cell / 2),
        )
        above = Pose(centre, turns[1], scales[1]).moved(strays[1], moment)
        span = _COLOURS[brightness > 128]
        colour = Image.new("RGB", (size, size), tuple(int(draws.between(*span)) for _ in "RGB"))
        frames = []
        for moment in np.linspace(-0.5, 0.5, self.options.frames).tolist():
            under = below.moved(motion, moment) if kind in _CAMERA else below
            mask = above.moved(motion, moment).view(digits, size)
            frames.append(Image.composite(colour, under.view(ground, size), mask))
        return frames

    def _digits_plane(self, draws: _Draws) -> Image.Image:
        """Grey, 255 where a digit is: one per used cell, anywhere in it."""
        cell, side = _CELL * self.options.size, self._digits[0].width
        plane = Image.new("L", (round(_CELLS * cell), round(_CELLS * cell)))
        for row in range(_CELLS):
            for column in range(_CELLS):
                used, which, right, down = (draws.next() for _ in range(4))
                if used < _SHARE:
                    x, y = (column * cell + right * (cell - side), row * cell + down * (cell - side))
                    plane.paste(self._digits[int(which * len(self._digits))], (int(x), int(y)))
        return plane


class _Draws:
    """Uniform numbers, one after the other."""

    def __init__(self, numbers: list[float]) -> None:
        self._numbers = iter(numbers)

    def next(self) -> float:
        return next(self._numbers)

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.next()


def _motion(kind: str, amount: float, size: int) -> Motion:
    """amount: in [0, 1), from the least motion to the most."""
    travel, turn, zoom = (low + (high - low) * amount for low, high in (_TRAVEL, _TURN, _ZOOM))
    if kind.startswith("zoom"):
        return Motion(zoom=zoom if kind == "zoom_in" else -zoom)
    if kind.startswith("rotate"):
        return Motion(turn=turn if kind == "rotate_cw" else -turn)
    x, y = _DIRECTIONS[kind.partition("_")[2]]
    reach = travel * size / math.hypot(x, y) * (-1 if kind in _CAMERA else 1)
    return Motion((x * reach, y * reach))


def _any_motion(draws: _Draws, size: int) -> Motion:
    """As much as in some video with a shift, and in some with a zoom."""
    turn, reach = draws.between(0, 2 * math.pi), draws.between(*_TRAVEL) * size
    return Motion((reach * math.cos(turn), reach * math.sin(turn)), zoom=draws.between(*_ZOOM))


def _place(ground: Image.Image, view: float, draws: _Draws) -> tuple[tuple[float, float], float]:
    """A point of the photograph from which the view never leaves it, with some texture around, and how bright it is
    there (0 to 255). view: pixels of the photograph under it.
    """
    reach, half = view * _REACH, int(view / 2)
    best = (-1.0, (0.0, 0.0), 0.0)
    for _ in range(_TRIES):
        x, y = draws.between(reach, ground.width - reach), draws.between(reach, ground.height - reach)
        corners = [(int(x) + right, int(y) + down) for right in (-half, 0) for down in (-half, 0)]
        quarters = [ImageStat.Stat(ground.crop((x, y, x + half, y + half)).convert("L")) for x, y in corners]
        contrast = min(quarter.stddev[0] for quarter in quarters)
        best = max(best, (contrast, (x, y), sum(quarter.mean[0] for quarter in quarters) / 4))
        if contrast > _MIN_CONTRAST:
            break
    return best[1], best[2]
