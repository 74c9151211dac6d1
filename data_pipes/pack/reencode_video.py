"""Checks a video before it is packed and, if asked, encodes it again.

Enters: the bytes of a video file. Leaves: the bytes to pack and their extension. Why it exists: a broken file is found
once, when packing, and not in every epoch; and nearly all of the time of loading clips is decoding, which a short side
of the training's size and a keyframe every 32 frames shorten several times (docs/benchmarks.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from data_pipes.decode.orientation import Orientation
from data_pipes.decode.video import Video, VideoInfo
from data_pipes.decode.video_container import extension_of
from data_pipes.decode.video_stream import import_av
from data_pipes.errors import SampleError
from data_pipes.order.hashing import Int64s
from data_pipes.pack.h264 import PIXELS, H264Options, encode_h264

if TYPE_CHECKING:
    from av import VideoFrame

_GOP, _CRF, _PRESET = 32, 20, "fast"
"""How videos are encoded where the options do not say it; see `H264Options`."""
_TICKS_PER_S = 90_000
"""Ticks per second in which the frames keep their own times; MPEG's clock."""
_SAME_RATE = 1.001
"""Rates with a ratio up to this are one rate, as 30 and 30000/1001 frames per second are."""


@dataclass(frozen=True)
class VideoOptions:
    """How videos are checked and re-encoded. One that is already as asked keeps its bytes, sound included."""

    short_side: int | None = None
    """In pixels: a video whose short side is longer is made smaller, to an even number of pixels (H.264 needs that);
    None keeps the size."""
    gop: int | None = None
    """Frames from keyframe to keyframe: a video with longer groups is encoded again; None keeps the groups, and makes
    groups of 32 where a video is re-encoded for something else."""
    fps: float | None = None
    """Frames per second: of a video with more, frames are left out; None keeps the rate."""
    crf: int | None = None
    """x264's constant rate factor of re-encoded videos, 0 to 51; None means 20."""
    verify: Literal["header", "decode"] = "header"
    """What is checked of videos that keep their bytes: "header" lists the packets and decodes the first frame,
    "decode" decodes all frames."""

    def __post_init__(self) -> None:
        if self.short_side is not None and self.short_side < 1:
            raise ValueError(f"short_side is {self.short_side}; expected 1 or more pixels")
        if self.gop is not None and self.gop < 1:
            raise ValueError(f"gop is {self.gop}; expected 1 or more frames from keyframe to keyframe")
        if self.fps is not None and not 0 < self.fps < 1000:
            raise ValueError(f"fps is {self.fps}; expected more than 0 frames per second")
        if self.crf is not None and not 0 <= self.crf <= 51:
            raise ValueError(f"crf is {self.crf}; expected 0 (lossless) to 51")
        if self.crf is not None and not self.reencodes:
            raise ValueError("crf is the quality of re-encoded videos; say what to change, with short_side, gop or fps")
        if self.verify not in ("header", "decode"):
            raise ValueError(f"verify is {self.verify!r}; expected header or decode")

    @property
    def reencodes(self) -> bool:
        """Whether any video may be encoded again."""
        return (self.short_side, self.gop, self.fps) != (None, None, None)

    def change(self, info: VideoInfo) -> bool:
        """Whether this video has to be encoded again."""
        return (
            (self.short_side is not None and min(info.height, info.width) > self.short_side)
            or (self.gop is not None and info.longest_gop > self.gop)
            or self.lowers_rate(info.fps)
        )

    def lowers_rate(self, fps: float) -> bool:
        """Whether frames are left out of a video with that many frames per second."""
        return self.fps is not None and fps > self.fps * _SAME_RATE


def prepare_video(data: bytes, options: VideoOptions) -> tuple[bytes, str]:
    """Checks a video, and encodes it again where the options ask for it.

    Encoding again gives an mp4 of H.264 without sound, upright, with even sides. The frames keep their times, also
    where these are irregular, unless `fps` leaves some out.

    Args:
        data: the bytes of the file.
        options: what is checked and changed.

    Returns:
        The bytes to pack and their extension, which follows from the content and not from the file's name.

    Raises:
        SampleError: see `Video`; with the cause "encode" where frames get lost.
    """
    with Video(data) as video:
        info = video.info()
        if options.change(info):
            return _encode(video, info, options), "mp4"
        if options.verify == "decode":
            for _ in video.each_frame(np.arange(video.num_frames), lambda frame: None):
                pass
    return data, extension_of(data)


def _encode(video: Video, info: VideoInfo, options: VideoOptions) -> bytes:
    indices, ticks, time_base = _kept_frames(video, info, options)
    height, width = _target_size(info, options)
    encoder = H264Options(options.gop or _GOP, _CRF if options.crf is None else options.crf, _PRESET)
    convert = _Converter(height, width, info.orientation)

    def frames() -> Iterator[VideoFrame]:
        for frame, tick in zip(video.each_frame(indices, convert), ticks, strict=True):
            frame.pts, frame.time_base = tick, time_base
            yield frame

    data = encode_h264(frames(), encoder)
    with Video(data) as encoded:
        if encoded.num_frames != len(indices):
            raise SampleError("encode", f"{len(indices)} frames were encoded and {encoded.num_frames} came out")
    return data


def _kept_frames(video: Video, info: VideoInfo, options: VideoOptions) -> tuple[Int64s, list[int], Fraction]:
    """Which frames are encoded, and when they are shown.

    Returns:
        The numbers of the frames, each once; their times in ticks, ascending; the length of a tick in seconds.
    """
    if options.fps is None or not options.lowers_rate(info.fps):
        ticks = np.rint(video.times_s * _TICKS_PER_S).astype(np.int64)
        ticks = np.maximum.accumulate(ticks - np.arange(len(ticks))) + np.arange(len(ticks))  # each its own
        return np.arange(video.num_frames), ticks.tolist(), Fraction(1, _TICKS_PER_S)
    rate = Fraction(options.fps).limit_denominator(1001)
    moments = np.arange(max(1, int(np.ceil(info.duration_s * float(rate) - 1e-6))))
    # where the video has no frame for so long (irregular rates), the one that is still shown is not repeated
    indices, first = np.unique(video.frame_at(moments / float(rate)), return_index=True)
    return indices, moments[first].tolist(), 1 / rate


def _target_size(info: VideoInfo, options: VideoOptions) -> tuple[int, int]:
    """Height and width of the encoded frames, upright; both are even."""
    short = min(info.height, info.width)
    scale = min(1.0, (options.short_side or short) // 2 * 2 / short)
    height, width = (max(2, 2 * round(side * scale / 2)) for side in (info.height, info.width))
    return height, width


class _Converter:
    """From frames as they come out of the decoder to frames as they are encoded: resized (bicubic; FFmpeg widens the
    filter with the factor, which is antialias), mirrored and turned upright.
    """

    def __init__(self, height: int, width: int, orientation: Orientation) -> None:
        """Prepares the conversion.

        Args:
            height: of the result, in pixels.
            width: of the result, in pixels.
            orientation: of the stored frames.
        """
        self._height, self._width, self._orientation = height, width, orientation
        self._av = import_av()
        self._reformatter: Any = self._av.video.reformatter.VideoReformatter()

    def __call__(self, frame: VideoFrame) -> VideoFrame:
        if self._orientation != Orientation():
            upright = self._orientation.upright(self._resized(frame, "rgb24").to_ndarray())
            frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(upright), "rgb24")
            return self._reformatter.reformat(frame, format=PIXELS, threads=1)
        return self._resized(frame, PIXELS)

    def _resized(self, frame: VideoFrame, pixels: str) -> VideoFrame:
        """The frame in its new size, before it is turned, in the pixel format `pixels`."""
        height, width = self._height, self._width
        if self._orientation.quarter_turns % 2:
            height, width = width, height
        return self._reformatter.reformat(frame, width, height, pixels, interpolation="BICUBIC", threads=1)
