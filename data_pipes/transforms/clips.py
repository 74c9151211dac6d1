"""From a video to the clips that a model trains on: which frames, which part of them, at which size.

Enters: the bytes of a video and a fixed number of uniform numbers. Leaves: uint8 [R, C, T, H, W]; normalising is left
to the device. Why it exists: R clips of one decode cost little more than one (repeated sampling), and transforms driven
by given numbers are a pure function of the sample's position. Legend: R clips of a video, T frames of a clip, C
channels, H/W pixels.

The recipes of the papers:
- MAE-ST (arXiv 2205.09113): ClipSampling(16, 4, repeats=4), each clip from its own time; random crop of scale (0.5, 1),
  ratio (0.75, 1.33), flip.
- VideoMAE (2203.12602): ClipSampling(16, 4) (SSv2: 2), crop "multi_scale", no flip. VideoMAE v2 (2303.16727): the same
  with repeats=4, shared_window=True: four crops of one clip.
A video that is too short repeats its last frame. Resizing is antialiased: else the fine texture of a large crop would
turn into noise that a pixel target has to predict.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from data_pipes.decode.limits import DEFAULT_MAX_PIXELS
from data_pipes.decode.video import Video
from data_pipes.transforms.clip_sampling import ClipSampling, Uniforms
from data_pipes.transforms.image import TrainTransform

_SCALES = (1, 0.875, 0.75, 0.66)
"""Sides of a part in the "multi_scale" crop, as fractions of the frame's shorter side."""
_PLACES = [(y, x) for y in (0, 2, 4) for x in (0, 2, 4)] + [(y, x) for y in (1, 3) for x in (1, 3)]
"""The room above and left of such a part, in quarters of the free room: corners, edges, centre, and half-way to the
corners."""


@dataclass(frozen=True)
class ClipTransform:
    """Clips of a video, each with one random part and flip for all of its frames."""

    size: tuple[int, int]
    """Height and width of the result, in pixels."""
    scale: tuple[float, float] = (0.5, 1.0)
    """Least and largest area of a random part, as a fraction of the frame."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Least and largest width / height of a random part, log-uniform."""
    flip: float = 0.5
    """Probability of a left-right flip."""
    sampling: ClipSampling = field(default_factory=ClipSampling)
    """Which frames."""
    crop: Literal["random", "multi_scale"] = "random"
    """How the part is chosen: "random" goes by `scale` and `ratio`, as for pictures; "multi_scale" is VideoMAE's: sides
    of 1, 7/8, 3/4 or 0.66 of the shorter side at one of 13 places."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How parts are resized, with antialias; the papers' is bilinear."""
    channels: int = 3
    """3 for RGB, 1 for luma."""

    def __post_init__(self) -> None:
        TrainTransform(self.size, self.scale, self.ratio, self.flip)
        if self.crop not in ("random", "multi_scale"):
            raise ValueError(f"the crop of clips is {self.crop!r}; expected 'random' or 'multi_scale'")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise ValueError(f"the interpolation is {self.interpolation!r}; expected 'bilinear' or 'bicubic'")
        if self.channels not in (1, 3):
            raise ValueError(f"clips of {self.channels} channels; expected 3 (RGB) or 1 (luma)")

    @property
    def num_uniforms(self) -> int:
        """Uniform numbers per video; the kind of crop does not change it."""
        return self.sampling.num_uniforms + self.sampling.repeats * TrainTransform.num_uniforms

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """The shape [R, C, T, H, W] of the result."""
        return (self.sampling.repeats, self.channels, self.sampling.num_frames, *self.size)

    def load(
        self, data: bytes, uniforms: Uniforms, *, channels: int | None = None, max_pixels: int = DEFAULT_MAX_PIXELS
    ) -> Tensor:
        """The clips of an encoded video.

        Args:
            data: the bytes of the video.
            uniforms: [num_uniforms].
            channels: 3 or 1; None: the transform's.
            max_pixels: of a frame (height * width), at most.

        Returns:
            uint8 [R, C, T, H, W], a view of [R, T, H, W, C] memory.

        Raises:
            SampleError: see `Video`.
        """
        with Video(data, max_pixels=max_pixels) as video:
            return self(video, uniforms, channels=channels)

    def __call__(self, video: Video, uniforms: Uniforms, *, channels: int | None = None) -> Tensor:
        """The clips of an open video, as `load` gives them; all frames of all clips are decoded in one pass."""
        sampling, channels = self.sampling, self.channels if channels is None else channels
        windows = sampling.indices(video, uniforms[: sampling.num_uniforms])
        wanted, places = np.unique(windows, return_inverse=True)
        places = places.reshape(windows.shape)
        frames = torch.from_numpy(video.frames(wanted, channels)).permute(0, 3, 1, 2)
        clips = torch.empty((sampling.repeats, sampling.num_frames, *self.size, channels), dtype=torch.uint8)
        for number, clip in enumerate(clips.permute(0, 1, 4, 2, 3)):
            first = sampling.num_uniforms + number * TrainTransform.num_uniforms
            own = uniforms[first : first + TrainTransform.num_uniforms]
            clip.copy_(self._part(frames, places[0 if sampling.shared_window else number], own))
        return clips.permute(0, 4, 1, 2, 3)

    def crop_box(self, height: int, width: int, uniforms: Uniforms) -> tuple[int, int, int, int]:
        """The part of the frames that a clip shows.

        Args:
            height: of the frames, in pixels.
            width: of the frames, in pixels.
            uniforms: [TrainTransform.num_uniforms].

        Returns:
            Top, left, height and width, in pixels.
        """
        if self.crop == "multi_scale":
            return multi_scale_box(height, width, uniforms)
        return TrainTransform(self.size, self.scale, self.ratio).crop_box(height, width, uniforms)

    def _part(self, frames: Tensor, places: NDArray[np.intp], uniforms: Uniforms) -> Tensor:
        """One clip.

        Args:
            frames: the decoded frames of all clips, uint8 [all, C, H, W] of channels-last memory.
            places: [T], the clip's frames among them.
            uniforms: [TrainTransform.num_uniforms].

        Returns:
            uint8 [T, C, *size].
        """
        top, left, height, width = self.crop_box(frames.shape[2], frames.shape[3], uniforms)
        part = frames[:, :, top : top + height, left : left + width]
        if len(places) != len(frames) or (places != np.arange(len(frames))).any():
            part = part[torch.from_numpy(places)]
        if part.shape[2:] != self.size:  # all frames at once: half the time of one after the other
            part = functional.interpolate(part, self.size, mode=self.interpolation, antialias=True)
        return part.flip(-1) if uniforms[-1] < self.flip else part


def multi_scale_box(height: int, width: int, uniforms: Uniforms) -> tuple[int, int, int, int]:
    """A part whose sides are from `_SCALES`, equal or neighbours in it, at one of `_PLACES`.

    Source: VideoMAE, arXiv 2203.12602; the multi-scale crop with 13 fixed places is TSN's, arXiv 1608.00859.

    Args:
        height: of the frames, in pixels.
        width: of the frames, in pixels.
        uniforms: the first two of them are used.

    Returns:
        Top, left, height and width, in pixels.
    """
    sides = [max(1, int(min(height, width) * scale)) for scale in _SCALES]
    pairs = [(h, w) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1]
    part_height, part_width = pairs[int(uniforms[0] * len(pairs))]
    down, right = _PLACES[int(uniforms[1] * len(_PLACES))]
    return (height - part_height) // 4 * down, (width - part_width) // 4 * right, part_height, part_width
