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
from typing import Literal

import numpy as np
from PIL import Image, ImageStat

from data_pipes.decode.video_stream import import_av
from data_pipes.order.hashing import hash_uniform
from data_pipes.pack import builtin_pictures
from data_pipes.pack.h264 import PIXELS, H264Options, encode_h264
from data_pipes.pack.motion import CAMERA_CLASSES, CLASSES, Draws, Motion, Pose, any_motion, motion_of
from data_pipes.pack.sources import Source, SourceFile

_PHOTOGRAPHS = {
    "train": ("astronaut.png", "brick.png", "chelsea.png", "coffee.png", "grass.png", "ihc.png", "rocket.jpg"),
    "val": ("camera.png", "coins.png", "gravel.png", "motorcycle_left.png"),
}
"""Files of scikit-image, by split."""
_VAL_DIGIT_EVERY = 5
"""Every fifth of scikit-learn's digits is shown in validation only."""
_SHORT_SIDE = 3.2
"""Short side of a photograph, in sides of a frame."""
_SCALES = (1.0, 2.0)
"""Least and largest scale of the planes in the middle of the video."""
_REACH = 1.13
"""How far from its middle a video looks, in sides of the view: half its diagonal when it is largest, and half the
longest travel."""
_MIN_CONTRAST = 12.0
"""Standard deviation of the grey levels that each quarter of the view needs: over a clear sky, a pan would look like
moving digits."""
_NUM_TRIES = 32
"""Places of a photograph that are tried for that contrast; then the best of them is taken."""
_CELLS_PER_SIDE = 7
"""Cells along each side of the plane of digits; a cell has one digit or none."""
_CELL_SIDE = 0.5
"""Side of a cell, in sides of a frame."""
_DIGIT_SIDE = 0.36
"""Side of a digit, in sides of a frame."""
_USED_CELLS = 0.9
"""Probability that a cell has a digit."""
_COLOURS = ((200, 256), (0, 56))
"""Range of each channel of the digits' colour, [low, high): over a dark ground, over a bright one."""
_NUM_DRAWS = 512
"""Uniform numbers per video; at most 1 + 4 + 4 + 2 * 32 + 4 * 49 + 2 + 3 are used."""
_RATE = 24
"""Frames per second."""
_ENCODER = H264Options(gop=12, crf=12, preset="veryfast")
_BYTES_PER_PIXEL = 0.2
"""Size of an encoded video: a guess, by which shards are cut."""
_VERSION = 1
"""Goes into the checksums of the files: to be raised when the same options give other videos."""


@dataclass(frozen=True)
class MotionOptions:
    """How many videos, and what they are like."""

    videos: int = 2000
    """Number of training videos; the classes take turns."""
    val_videos: int = 400
    """Number of validation videos."""
    size: int = 64
    """Height and width, in pixels; an even number."""
    frames: int = 24
    """Frames of a video; more of them make the same motion slower."""
    seed: int = 0
    """Another seed gives other videos."""

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
        """The options of a text like "videos=400,size=96"; an empty text means the defaults.

        Raises:
            ValueError: an unknown name, or a value that is no number or out of range.
        """
        known = [field.name for field in fields(cls)]
        values: dict[str, int] = {}
        for part in filter(None, text.split(",")):
            name, _, value = part.partition("=")
            if name not in known or not value.isascii() or not value.isdigit():
                raise ValueError(f"builtin:motion: found {part!r}; expected name=number with {', '.join(known)}")
            values[name] = int(value)
        return cls(**values)


class MotionSource(Source):
    """The videos as files in class folders, each made when it is read."""

    sizes_are_exact = False

    def __init__(self, options: MotionOptions | None = None, split: Literal["train", "val"] = "train") -> None:
        """Prepares the photographs and the digits of one split.

        Args:
            options: None means the defaults.
            split: which of the two sets.

        Raises:
            ValueError: scikit-image or scikit-learn is missing.
            ImportError: PyAV is missing.
        """
        super().__init__("builtin:motion" if split == "train" else "builtin:motion, validation")
        self.options, self._split = options or MotionOptions(), split
        import_av()
        short_side = round(_SHORT_SIDE * self.options.size)
        self._photographs = [builtin_pictures.photograph(name, short_side) for name in _PHOTOGRAPHS[split]]
        side = round(_DIGIT_SIDE * self.options.size)
        self._digits = [
            Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
            for number, pixels in enumerate(builtin_pictures.digits()[0])
            if (number % _VAL_DIGIT_EVERY == 0) == (split == "val")
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
        """The RGB frames of a video; its class is `number` modulo the number of classes.

        The planes do not lie where they were drawn: each is moved by a part of some shift and zoom (`offset`), where
        its own motion has none, so that a frame of a still plane looks like one of a moving plane.
        """
        size, class_name = self.options.size, CLASSES[number % len(CLASSES)]
        draws = Draws(hash_uniform(self.options.seed, [number], int(self._split == "val"), _NUM_DRAWS)[0].tolist())
        motion = motion_of(class_name, draws.next(), size)
        camera_moves = class_name in CAMERA_CLASSES
        offset, moment = any_motion(draws, size), draws.between(-0.5, 0.5)
        ground_offset, digits_offset = offset.without(motion if camera_moves else Motion()), offset.without(motion)
        ground_turn, digits_turn = draws.between(0, 2 * math.pi), draws.between(0, 2 * math.pi)
        ground_scale, digits_scale = (math.exp(draws.between(*map(math.log, _SCALES))) for _ in range(2))
        ground = self._photographs[number // len(CLASSES) % len(self._photographs)]
        view = size / ground_scale * math.exp(-ground_offset.zoom * moment)
        centre, brightness = _place(ground, view, draws)
        ground_pose = Pose(centre, ground_turn, ground_scale).moved(ground_offset, moment)
        digits, cell = self._digits_plane(draws), _CELL_SIDE * size
        centre = (
            digits.width / 2 + draws.between(-cell / 2, cell / 2),
            digits.height / 2 + draws.between(-cell / 2, cell / 2),
        )
        digits_pose = Pose(centre, digits_turn, digits_scale).moved(digits_offset, moment)
        levels = _COLOURS[brightness > 128]
        colour = Image.new("RGB", (size, size), tuple(int(draws.between(*levels)) for _ in "RGB"))
        frames = []
        for moment in np.linspace(-0.5, 0.5, self.options.frames).tolist():
            below = ground_pose.moved(motion, moment) if camera_moves else ground_pose
            mask = digits_pose.moved(motion, moment).view(digits, size)
            frames.append(Image.composite(colour, below.view(ground, size), mask))
        return frames

    def _digits_plane(self, draws: Draws) -> Image.Image:
        """A grey picture, 255 where a digit is: one digit per used cell, anywhere in it."""
        cell, side = _CELL_SIDE * self.options.size, self._digits[0].width
        plane = Image.new("L", (round(_CELLS_PER_SIDE * cell), round(_CELLS_PER_SIDE * cell)))
        for row in range(_CELLS_PER_SIDE):
            for column in range(_CELLS_PER_SIDE):
                used, which, right, down = (draws.next() for _ in range(4))
                if used < _USED_CELLS:
                    x, y = (column * cell + right * (cell - side), row * cell + down * (cell - side))
                    plane.paste(self._digits[int(which * len(self._digits))], (int(x), int(y)))
        return plane


def _place(ground: Image.Image, view: float, draws: Draws) -> tuple[tuple[float, float], float]:
    """Where in a photograph a video looks: a place with some texture around, from which the view never leaves it.

    Args:
        ground: the photograph.
        view: side of the part of it that is under the view, in pixels of the photograph.
        draws: the video's uniform numbers; two of them are used per try.

    Returns:
        The point (x, y), in pixels of the photograph, and its brightness there, 0 to 255.
    """
    reach, half = view * _REACH, int(view / 2)
    best = (-1.0, (0.0, 0.0), 0.0)
    for _ in range(_NUM_TRIES):
        x, y = draws.between(reach, ground.width - reach), draws.between(reach, ground.height - reach)
        corners = [(int(x) + right, int(y) + down) for right in (-half, 0) for down in (-half, 0)]
        quarters = [ImageStat.Stat(ground.crop((x, y, x + half, y + half)).convert("L")) for x, y in corners]
        contrast = min(quarter.stddev[0] for quarter in quarters)
        best = max(best, (contrast, (x, y), sum(quarter.mean[0] for quarter in quarters) / 4))
        if contrast > _MIN_CONTRAST:
            break
    return best[1], best[2]
