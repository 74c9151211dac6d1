"""From the bytes of one video to chosen frames, without trusting the bytes.

Enters: an encoded video (mp4, mov, webm, mkv, avi; told by its first bytes). Leaves: uint8 [T, H, W, C]. Why it exists:
decoding is nearly all of the CPU time of loading clips, and most of it goes into frames that nobody asked for. Here the
packets are listed once (5 us each, nothing is decoded), so every frame's index and time are exact whatever the header
claims. Then decoding starts at the keyframe before a wanted frame, passes over frames that no other frame refers to
(H.264 and MPEG-4: a third of the time), and stops at the last wanted one without waiting for the decoder's delay.

Definitions. Frame i is the i-th in order of presentation, however long each is shown (variable frame rate). Its time
counts from the first frame's. Frames that an edit list hides, and those before the first keyframe, do not count. A file
without usable presentation times (AVI) counts the frames as they come out of the decoder; with B-frames, from the
file's beginning. What the container asks for (phones) is applied, quarter turns and mirrors, as FFmpeg's own tools do.
A frame whose size differs from the declared one is scaled to it. One thread, as the workers of a
loader fill the cores: two slice threads cost 6% more CPU per clip, two frame threads 28%.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from data_pipes.decode.limits import DEFAULT_MAX_PIXELS
from data_pipes.decode.orientation import Orientation, orientation_of
from data_pipes.decode.video_frames import PacketRange
from data_pipes.decode.video_stream import choose_stream, frames_of, import_av, list_packets, open_container
from data_pipes.errors import SampleError
from data_pipes.order.hashing import Int64s

if TYPE_CHECKING:
    from av import VideoFrame

Frame = TypeVar("Frame")
VIDEO_EXTENSIONS = ("mp4", "webm", "mkv", "mov", "m4v", "avi")
"""Members that are videos, in the order of preference where a sample has several."""

DEFAULT_MAX_DECODED_FRAMES = 10_000
"""Per read: five minutes of video without a keyframe, or 3 s of decoding at 320x240."""

_MAX_DECODED_PIXELS = 1 << 34
"""Per read: 8,000 frames of 1920x1080."""
_MAX_READ_PIXELS = 1 << 29
"""Of one result: 1.6 GB of RGB, 64 frames of 3840x2160."""
_SKIPPABLE = ("h264", "mpeg4")
"""Codecs in which passing over unreferenced frames leaves all others as they are; in HEVC a frame without references
from its own layer may have some from a higher one."""
_CLOCK_S = 0.000501
"""Matroska rounds times to 1 ms: frame 2 of 30 per second is stored at 0.067 s and asked for at 0.0667."""
_FORMATS = {1: "gray", 3: "rgb24"}
"""By channels, FFmpeg's name of the pixel format."""


@dataclass(frozen=True)
class VideoInfo:
    """What a video is, by its packets and its first frame."""

    num_frames: int
    """Frames that can be asked for."""
    fps: float
    """Mean, frames per second."""
    duration_s: float
    """Seconds from the first frame's appearance to the last one's end."""
    height: int
    """As shown, after rotation."""
    width: int
    """As shown, after rotation."""
    rotation: int
    """Degrees counter-clockwise that the stored frames are turned by, after they were mirrored."""
    codec: str
    """FFmpeg's name of the decoder."""
    longest_gop: int
    """Frames from one keyframe to the next, at most; over 32, re-encode and halve the time of loading."""
    mirrored: bool = False
    """Whether left and right of the stored frames change places before they are turned."""

    @property
    def orientation(self) -> Orientation:
        """How stored frames become upright."""
        return Orientation(self.mirrored, self.rotation // 90)


def probe(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> VideoInfo:
    """What a video is; decodes its first frame.

    Args:
        data: the file.
        max_pixels: height * width of a frame, checked in the header.
    Raises:
        SampleError: as `Video` raises it.
    """
    with Video(data, max_pixels=max_pixels) as video:
        return video.info()


class Video:
    """An open video, from which frames are read as often as needed. For one thread at a time."""

    def __init__(
        self,
        data: bytes,
        *,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        max_decoded_frames: int = DEFAULT_MAX_DECODED_FRAMES,
    ) -> None:
        """
        Args:
            data: the file.
            max_pixels: height * width of a frame, checked in the header.
            max_decoded_frames: frames that one read may decode.
        Raises:
            SampleError: "video" (unreadable, cut short), "no_video" (sound only), "codec" (not a known video codec),
                "pixels" (too many), "frames" (no frame, too many).
            ImportError: PyAV is not installed.
        """
        self._av, self._max_decoded_frames = import_av(), max_decoded_frames
        self._container = open_container(data, max_pixels)
        try:
            self._stream = choose_stream(self._container, max_pixels)
            context = self._stream.codec_context
            self._height, self._width = context.height, context.width  # the decoder may change its own
            self._packets = list_packets(self._container, self._stream)
            self._table = frames_of(self._container, self._stream, self._packets)
        except BaseException:
            self.close()
            raise
        self._reformatter: Any = self._av.video.reformatter.VideoReformatter()
        self._orientation: Orientation | None = None

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the decoder and the packets."""
        self._packets = []
        self._container.close()

    @property
    def num_frames(self) -> int:
        """Frames that can be asked for."""
        return len(self._table.label)

    @property
    def times_s(self) -> NDArray[np.float64]:
        """When each frame appears [num_frames], seconds from the first one."""
        return self._table.times_s

    @property
    def duration_s(self) -> float:
        """Seconds from the first frame's appearance to the last one's end."""
        return float(self._table.times_s[-1]) + self._table.last_s

    @property
    def fps(self) -> float:
        """Mean frame rate, frames per second."""
        return self.num_frames / self.duration_s

    def info(self) -> VideoInfo:
        """What the video is; decodes the first frame where nothing was decoded yet."""
        if self._orientation is None:
            self.frames(np.zeros(1, np.int64))
        codec, (mirrored, turns) = self._stream.codec_context.codec.name, self._orientation or Orientation()
        height, width = (self._width, self._height) if turns % 2 else (self._height, self._width)
        gop = self._table.longest_gop
        return VideoInfo(self.num_frames, self.fps, self.duration_s, height, width, 90 * turns, codec, gop, mirrored)

    def frame_at(self, times_s: NDArray[np.float64]) -> Int64s:
        """Indices of the frames that are shown at times [T] (seconds from the first frame)."""
        shown = np.searchsorted(self.times_s, np.asarray(times_s) + _CLOCK_S, side="right") - 1
        return shown.clip(0).astype(np.int64)

    def frames(self, indices: Int64s | Sequence[int], channels: int = 3) -> NDArray[np.uint8]:
        """Decodes frames.

        Args:
            indices: [T], ascending, from 0 to num_frames - 1; repeats are decoded once.
            channels: 3 (RGB) or 1 (luma).
        Returns:
            [T, H, W, channels].
        Raises:
            SampleError: "frames" (a frame is missing or damaged, or finding it takes too much decoding), "pixels" (the
                result would be too large), "channels" (neither 3 nor 1).
            ValueError: there is no such frame.
        """
        wanted, inverse = np.unique(np.asarray(indices, np.int64), return_inverse=True)
        if not len(wanted) or wanted[0] < 0 or wanted[-1] >= self.num_frames:
            raise ValueError(
                f"frames {indices} of a video of {self.num_frames}; expected 0 <= index < {self.num_frames}"
            )
        if channels not in _FORMATS:
            raise SampleError("channels", f"videos have 1 or 3 channels, the model takes {channels}")
        ranges = self._table.packet_ranges(wanted)
        self._check_effort(len(wanted), sum(packets.last - packets.first + 1 for packets in ranges))
        out: NDArray[np.uint8] | None = None
        for slot, pixels in self._each(ranges, lambda frame: self._pixels(frame, channels)):
            out = np.empty((len(wanted), *pixels.shape), np.uint8) if out is None else out
            out[slot] = pixels
        assert out is not None
        return out if len(wanted) == len(inverse) else out[inverse]

    def each_frame(self, indices: Int64s, convert: Callable[[VideoFrame], Frame]) -> Iterator[Frame]:
        """Frames one at a time. How much is decoded for them is not limited.

        Args:
            indices: [T], ascending, from 0 to num_frames - 1, each once.
            convert: gets each frame as it is stored: in the file's own pixel format, not turned.
        Yields:
            What `convert` returns.
        Raises:
            SampleError: "frames", when one is missing or damaged.
        """
        for number, (slot, frame) in enumerate(self._each(self._table.packet_ranges(indices), convert)):
            if slot != number:
                raise SampleError("frames", f"damaged video: frame {slot} comes out as number {number}")
            yield frame

    def _each(self, ranges: list[PacketRange], convert: Callable[[VideoFrame], Frame]) -> Iterator[tuple[int, Frame]]:
        """(slot, converted frame) of all wanted frames."""
        for packets in ranges:
            missing = set(packets.slots)
            try:
                for frame, label in self._decode(packets, missing):
                    yield packets.slots[label], convert(frame)
                    missing.discard(label)
            except self._av.FFmpegError as error:
                raise SampleError(
                    "frames", f"damaged video, from packet {packets.first} on: {type(error).__name__}: {error}"
                ) from error
            finally:
                self._stream.codec_context.flush_buffers()
            if missing:
                raise SampleError(
                    "frames",
                    f"damaged video: {len(missing)} of the {len(packets.slots)} frames asked for do not come out",
                )

    def _check_effort(self, num_wanted: int, num_decoded: int) -> None:
        pixels = self._height * self._width
        if num_wanted * pixels > _MAX_READ_PIXELS:
            raise SampleError(
                "pixels",
                f"{num_wanted} frames of {pixels:,} pixels are more than {_MAX_READ_PIXELS:,}; store the "
                "videos smaller, or ask for fewer frames",
            )
        if num_decoded > self._max_decoded_frames or num_decoded * pixels > _MAX_DECODED_PIXELS:
            raise SampleError(
                "frames",
                f"{num_decoded:,} frames of {pixels:,} pixels would have to be decoded to get {num_wanted}; expected "
                f"at most {self._max_decoded_frames:,} frames and {_MAX_DECODED_PIXELS:,} pixels: encode the video "
                "again with a keyframe every 32 frames, or cut it",
            )

    def _decode(self, packets: PacketRange, missing: set[int]) -> Iterator[tuple[VideoFrame, int]]:
        """Decodes a range of packets.

        Args:
            packets: which ones.
            missing: labels of the frames that are still wanted; the caller takes out what it got.
        Yields:
            (frame, label) of those that are missing.
        """
        context = self._stream.codec_context
        if self._table.counted:
            yield from self._decode_counting(packets, missing)
            return
        skips = context.codec.name in _SKIPPABLE
        for packet in [
            *self._packets[packets.first : packets.last + 1],
            None,
        ]:  # None: whatever the decoder still holds
            if skips and packet is not None:
                context.skip_frame = "DEFAULT" if packet.pts in missing else "NONREF"
            for frame in context.decode(packet):
                _check_frame(frame)
                if frame.pts in missing:
                    yield frame, frame.pts

    def _decode_counting(self, packets: PacketRange, missing: set[int]) -> Iterator[tuple[VideoFrame, int]]:
        """The same where frames have no times and are counted from the keyframe on, until the last one is out."""
        label = int(self._table.label[np.searchsorted(self._table.position, packets.first)])
        for packet in [*self._packets[packets.first :], None]:
            for frame in self._stream.codec_context.decode(packet):
                _check_frame(frame)
                if label in missing:
                    yield frame, label
                label += 1
            if not missing:
                return

    def _pixels(self, frame: VideoFrame, channels: int) -> NDArray[np.uint8]:
        """[H, W, channels], turned upright."""
        converted = self._reformatter.reformat(frame, self._width, self._height, _FORMATS[channels], threads=1)
        pixels: NDArray[np.uint8] = converted.to_ndarray()
        if self._orientation is None:
            self._orientation = orientation_of(frame)
        return self._orientation.upright(pixels[..., None] if channels == 1 else pixels)


def _check_frame(frame: VideoFrame) -> None:
    if frame.is_corrupt:
        raise SampleError("frames", f"damaged video: the frame at pts {frame.pts} could not be decoded whole")
