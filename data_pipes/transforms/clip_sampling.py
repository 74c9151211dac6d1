"""Which frames and crops of a video become clips: the settings, and the frames' numbers.

Kept apart from the transform, so that a configuration is read and checked without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_pipes.bounds import bounded
from data_pipes.decode.video import Video
from data_pipes.order.hashing import Int64s

Uniforms = NDArray[Any] | Sequence[float]
"""Uniform numbers in [0, 1)."""


@dataclass(frozen=True)
class ClipSampling:
    """Which frames of a video become clips."""

    num_frames: int = bounded(16, least=1)
    """T, frames of a clip."""
    stride: int = bounded(4, least=1)
    """Frames from one frame of a dense clip to the next."""
    mode: Literal["dense", "segments"] = "dense"
    """How frames are chosen: "dense" takes a window at a random time, "segments" one random frame of each of
    `num_frames` equal parts of the video (TSN, arXiv 1608.00859)."""
    fps: float | None = bounded(None, above=0)
    """Frames per second in which `stride` counts, whatever the video's own rate; null counts the video's own frames."""
    repeats: int = bounded(1, least=1)
    """R, clips per decoded video."""
    shared_window: bool = False
    """Whether the clips of a video show the same frames and differ in their crops only; else each has its own time."""
    short: Literal["last", "loop"] = "last"
    """How a video that is shorter than a dense clip goes on: "last" repeats its last frame, "loop" starts again."""

    def __post_init__(self) -> None:
        if min(self.num_frames, self.stride, self.repeats) < 1:
            raise ValueError(
                f"num_frames is {self.num_frames}, stride {self.stride}, repeats {self.repeats}; expected 1 or more"
            )
        if self.mode not in ("dense", "segments"):
            raise ValueError(f"the clip mode is {self.mode!r}; expected 'dense' or 'segments'")
        if self.short not in ("last", "loop"):
            raise ValueError(f"short videos are to be continued by {self.short!r}; expected 'last' or 'loop'")
        if self.fps is not None and (self.mode == "segments" or not 0 < self.fps < 1000):
            raise ValueError(f"fps is {self.fps} in mode {self.mode}; expected more than 0 and 'dense', or null")

    @property
    def num_windows(self) -> int:
        """Different sets of frames per video."""
        return 1 if self.shared_window else self.repeats

    @property
    def num_uniforms(self) -> int:
        """Uniform numbers that `indices` takes."""
        return self.num_windows * (self.num_frames if self.mode == "segments" else 1)

    def indices(self, video: Video, uniforms: Uniforms) -> Int64s:
        """Chooses the frames of a video's clips.

        Args:
            video: the open video.
            uniforms: [num_uniforms].

        Returns:
            The numbers of the frames, int64 [num_windows, T]; each row ascends unless it loops.
        """
        values = np.asarray(uniforms, np.float64).reshape(self.num_windows, -1)
        steps, frames = np.arange(self.num_frames), video.num_frames
        if self.mode == "segments":
            return ((steps + values) * (frames / self.num_frames)).astype(np.int64).clip(0, frames - 1)
        if self.fps is not None:
            step_s = self.stride / self.fps
            room_s = video.duration_s - step_s * (self.num_frames - 1)
            times_s = steps * step_s + values * max(0.0, room_s)
            return video.frame_at(times_s % video.duration_s if self.short == "loop" else times_s)
        room = frames - (self.num_frames - 1) * self.stride
        indices = steps * self.stride + (values * max(1, room)).astype(np.int64)
        return indices % frames if self.short == "loop" else indices.clip(0, frames - 1)
