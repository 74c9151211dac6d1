"""From the bytes of one video to chosen frames, without trusting the bytes.

Enters: an encoded video (mp4, mov, webm, mkv, avi; told by its first bytes). Leaves: uint8 [T, H, W, C]. Why it exists:
decoding is nearly all of the CPU time of loading clips, and most of it goes into frames that nobody asked for. Here the
packets are listed once (5 us each, nothing is decoded), so every frame's index and time are exact whatever the header
claims. Then decoding starts at the keyframe before a wanted frame, passes over frames that no other frame refers to
(H.264 and MPEG-4: a third of the time), and stops at the last wanted one without waiting for the decoder's delay.

Definitions. Frame i is the i-th in order of presentation, however long each is shown (variable frame rate). Its time
counts from the first frame's. Frames that an edit list hides, and those before the first keyframe, do not count. A file
without usable presentation times (AVI) counts the frames as they come out of the decoder; with B-frames, from the
file's beginning. Rotation that the container asks for (phones) is applied, in quarter turns, as FFmpeg's own tools do;
mirroring is not. A frame whose size differs from the declared one is scaled to it. One thread, as the workers of a
loader fill the cores: two slice threads cost 6% more CPU per clip, two frame threads 28%.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from data_pipes.decode.limits import DEFAULT_MAX_PIXELS
from data_pipes.decode.video_container import AVI, container_of
from data_pipes.decode.video_frames import FrameTable, Run, list_frames
from data_pipes.errors import SampleError
from data_pipes.order.hashing import Int64s

if TYPE_CHECKING:
    from av import VideoFrame
    from av.packet import Packet
    from av.video.stream import VideoStream

Frame = TypeVar("Frame")
VIDEO_EXTENSIONS = ("mp4", "webm", "mkv", "mov", "m4v", "avi")
"""Members that are videos, in the order of preference where a sample has several."""

DEFAULT_MAX_DECODED_FRAMES = 10_000
"""Per read: five minutes of video without a keyframe, or 3 s of decoding at 320x240."""

_MAX_PACKETS = 1_000_000
# of one file, 9 hours of video
_MAX_DECODED_PIXELS = 1 << 34
# per read; 8,000 frames of 1920x1080
_MAX_READ_PIXELS = 1 << 29
# of one result: 1.6 GB of RGB, 64 frames of 3840x2160
_CODECS = frozenset((
    "h264", "hevc", "vp8", "vp9", "libvpx", "libvpx-vp9", "av1", "libdav1d", "mpeg4", "mjpeg", "mpeg1video",
    "mpeg2video", "h263", "msmpeg4v2", "msmpeg4v3", "wmv1", "wmv2", "wmv3", "vc1", "theora", "prores", "dvvideo",
    "ffv1", "huffyuv", "rawvideo", "png",
))  # fmt: skip
# FFmpeg has 250 decoders, many written for one forgotten game; the fewer a hostile file can reach, the better
_SKIPPABLE = ("h264", "mpeg4")
# codecs in which passing over unreferenced frames leaves all others as they are; in HEVC a frame without references
# from its own layer may have some from a higher one
_VP8_SHOWN = 16
# bit of a VP8 packet's first byte (RFC 6386, 9.1); the others only refresh a reference
_NOMINAL_S = 0.04
# of a frame, where neither times nor a rate are known
_CLOCK_S = 0.000501
# Matroska rounds times to 1 ms: frame 2 of 30 per second is stored at 0.067 s and asked for at 0.0667
_FORMATS = {1: "gray", 3: "rgb24"}


@dataclass(frozen=True)
class VideoInfo:
    """What a video is, by its packets and its first frame."""

    num_frames: int
    # that can be asked for
    fps: float
    # mean, frames per second
    duration_s: float
    # from the first frame's appearance to the last one's end
    height: int
    # as shown, after rotation
    width: int
    rotation: int
    # degrees counter-clockwise that the stored frames are turned by
    codec: str
    longest_gop: int
    # frames from one keyframe to the next, at most; over 32, re-encode and halve the time of loading


def probe(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> VideoInfo:
    """Decodes the first frame. Raises SampleError as `Video` does."""
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
        """max_pixels: height * width, checked in the header. max_decoded_frames: that one read may take.

        Raises SampleError: cause "video" (unreadable, cut short), "no_video" (sound only), "codec" (not a known video
        codec), "pixels" (too many), "frames" (no frame, too many). Raises ImportError without PyAV.
        """
        self._av, self._max_pixels, self._max_decoded_frames = import_av(), max_pixels, max_decoded_frames
        container = container_of(data)
        try:
            self._container = self._av.open(
                io.BytesIO(data),
                "r",
                format=container,
                options={"max_pixels": str(max_pixels)},
                metadata_errors="replace",
                io_open=_refuse,
            )
        except (self._av.FFmpegError, ValueError, OverflowError) as error:
            raise SampleError(
                "video", f"not a readable {container} file of {len(data):,} bytes: {_text(error)}"
            ) from error
        try:
            self._stream = self._choose_stream()
            context = self._stream.codec_context
            self._height, self._width = context.height, context.width  # the decoder may change its own
            self._packets = self._list_packets()
            self._table = self._list_frames()
        except BaseException:
            self.close()
            raise
        self._reformatter: Any = self._av.video.reformatter.VideoReformatter()
        self._rotation: int | None = None

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
        return len(self._table.label)

    @property
    def times_s(self) -> NDArray[np.float64]:
        """When each frame appears [num_frames], seconds from the first one."""
        return self._table.times_s

    @property
    def duration_s(self) -> float:
        """From the first frame's appearance to the last one's end."""
        return float(self._table.times_s[-1]) + self._table.last_s

    @property
    def fps(self) -> float:
        """Mean frame rate, frames per second."""
        return self.num_frames / self.duration_s

    def info(self) -> VideoInfo:
        """Decodes the first frame where nothing was decoded yet."""
        if self._rotation is None:
            self.frames(np.zeros(1, np.int64))
        context, rotation = self._stream.codec_context, self._rotation or 0
        height, width = (self._width, self._height) if rotation % 180 else (self._height, self._width)
        codec, gop = context.codec.name, self._table.longest_gop
        return VideoInfo(self.num_frames, self.fps, self.duration_s, height, width, rotation, codec, gop)

    def frame_at(self, times_s: NDArray[np.float64]) -> Int64s:
        """Indices of the frames that are shown at times [T] (seconds from the first frame)."""
        shown = np.searchsorted(self.times_s, np.asarray(times_s) + _CLOCK_S, side="right") - 1
        return shown.clip(0).astype(np.int64)

    def frames(self, indices: Int64s | Sequence[int], channels: int = 3) -> NDArray[np.uint8]:
        """Frames [T, H, W, channels]. indices: [T], ascending, from 0 to num_frames - 1; repeats are decoded once.

        channels: 3 (RGB) or 1 (luma). Raises SampleError "frames" (a frame is missing or damaged, or finding it takes
        too much decoding), "pixels" (the result would be too large), "channels".
        """
        wanted, inverse = np.unique(np.asarray(indices, np.int64), return_inverse=True)
        if not len(wanted) or wanted[0] < 0 or wanted[-1] >= self.num_frames:
            raise ValueError(
                f"frames {indices} of a video of {self.num_frames}; expected 0 <= index < {self.num_frames}"
            )
        if channels not in _FORMATS:
            raise SampleError("channels", f"videos have 1 or 3 channels, the model takes {channels}")
        runs = self._table.runs(wanted)
        self._check_effort(len(wanted), sum(run.last - run.first + 1 for run in runs))
        out: NDArray[np.uint8] | None = None
        for slot, pixels in self._each(runs, lambda frame: self._pixels(frame, channels)):
            out = np.empty((len(wanted), *pixels.shape), np.uint8) if out is None else out
            out[slot] = pixels
        assert out is not None
        return out if len(wanted) == len(inverse) else out[inverse]

    def each_frame(self, indices: Int64s, convert: Callable[[VideoFrame], Frame]) -> Iterator[Frame]:
        """Frames one at a time, through `convert`, which sees them as they are stored: in the file's own pixel format,
        not turned. indices: as for `frames`, each once. Decoding is not limited. Raises SampleError "frames".
        """
        for number, (slot, frame) in enumerate(self._each(self._table.runs(indices), convert)):
            if slot != number:
                raise SampleError("frames", f"damaged video: frame {slot} comes out as number {number}")
            yield frame

    def _each(self, runs: list[Run], convert: Callable[[VideoFrame], Frame]) -> Iterator[tuple[int, Frame]]:
        """(slot, converted frame) of all slots of the runs."""
        for run in runs:
            missing = set(run.slots)
            try:
                for frame, label in self._decode(run, missing):
                    yield run.slots[label], convert(frame)
                    missing.discard(label)
            except self._av.FFmpegError as error:
                raise SampleError("frames", f"damaged video, from packet {run.first} on: {_text(error)}") from error
            finally:
                self._stream.codec_context.flush_buffers()
            if missing:
                raise SampleError(
                    "frames", f"damaged video: {len(missing)} of the {len(run.slots)} frames asked for do not come out"
                )

    def _choose_stream(self) -> VideoStream:
        streams = self._container.streams.video
        pictures = self._av.stream.Disposition.attached_pic
        streams = [stream for stream in streams if not stream.disposition & pictures]  # cover art
        if not streams:
            raise SampleError("no_video", "the file has no video stream")
        stream: VideoStream = streams[0]
        if stream.codec_context is None or stream.codec_context.codec.name not in _CODECS:
            found = None if stream.codec_context is None else stream.codec_context.codec.name
            raise SampleError("codec", f"the video's codec is {found or 'unknown'}; expected h264, hevc, vp9, av1, ...")
        context = stream.codec_context
        if context.height < 1 or context.width < 1:
            raise SampleError("video", f"the video declares {context.height} x {context.width} pixels")
        if context.height * context.width > self._max_pixels:
            raise SampleError(
                "pixels",
                f"the header declares frames of {context.height} x {context.width} = "
                f"{context.height * context.width:,} pixels, more than max_pixels = {self._max_pixels:,}; raise "
                "data.max_pixels if such videos are wanted",
            )
        context.thread_count = 1
        context.options = {"max_pixels": str(self._max_pixels)}  # for sizes that change on the way
        return stream

    def _list_packets(self) -> list[Packet[VideoStream]]:
        packets: list[Packet[VideoStream]] = []
        try:
            for packet in self._container.demux(self._stream):
                if packet.is_corrupt:
                    raise SampleError("video", "the file is damaged: a packet is cut short or has a wrong checksum")
                if packet.size:  # an empty one ends the stream
                    packets.append(packet)
                if len(packets) > _MAX_PACKETS:
                    raise SampleError("frames", f"more than {_MAX_PACKETS:,} packets; cut the video into shorter ones")
        except self._av.FFmpegError as error:
            raise SampleError("video", f"damaged file: {_text(error)}") from error
        expected = len(self._stream.index_entries)  # mp4 lists all of its frames, the others some or none
        if expected > len(packets):
            raise SampleError("video", f"the file is damaged: {len(packets)} of the {expected} frames in its index")
        return packets

    def _list_frames(self) -> FrameTable:
        if not self._packets:
            raise SampleError("frames", "the video has no frames")
        has_hidden = self._stream.codec_context.codec.name == "vp8"
        shown = [not (p.is_discard or (has_hidden and not bytes(p)[0] & _VP8_SHOWN)) for p in self._packets]
        rate, tick = self._stream.average_rate, self._stream.time_base
        # AVI has no times of presentation, and FFmpeg makes some up that are in the order of the file
        tick_s = None if tick is None or self._container.format.name == AVI else float(tick)
        frame_s = 1 / float(rate) if rate else _NOMINAL_S
        reorders = bool(self._stream.codec_context.has_b_frames)
        table = list_frames(self._packets, shown, tick_s, frame_s, reorders)
        if not len(table.label):
            raise SampleError("frames", f"none of the {len(self._packets)} packets gives a frame to see")
        return table

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

    def _decode(self, run: Run, missing: set[int]) -> Iterator[tuple[VideoFrame, int]]:
        """(frame, label) of the labels `missing`, which the caller removes."""
        context = self._stream.codec_context
        if self._table.counted:
            yield from self._decode_counting(run, missing)
            return
        skips = context.codec.name in _SKIPPABLE
        for packet in [*self._packets[run.first : run.last + 1], None]:  # None: whatever the decoder still holds
            if skips and packet is not None:
                context.skip_frame = "DEFAULT" if packet.pts in missing else "NONREF"
            for frame in context.decode(packet):
                _check_frame(frame)
                if frame.pts in missing:
                    yield frame, frame.pts

    def _decode_counting(self, run: Run, missing: set[int]) -> Iterator[tuple[VideoFrame, int]]:
        """The same where frames have no times and are counted from the keyframe on, until the last one is out."""
        label = int(self._table.label[np.searchsorted(self._table.position, run.first)])
        for packet in [*self._packets[run.first :], None]:
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
        if self._rotation is None:
            self._rotation = round(frame.rotation / 90) * 90 % 360
        if channels == 1:
            pixels = pixels[..., None]
        return np.rot90(pixels, self._rotation // 90) if self._rotation else pixels


def _check_frame(frame: VideoFrame) -> None:
    if frame.is_corrupt:
        raise SampleError("frames", f"damaged video: the frame at pts {frame.pts} could not be decoded whole")


def _refuse(url: str, *_: object) -> Any:
    raise PermissionError(f"a video may not open other files: {url}")


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def import_av() -> Any:
    """PyAV. Raises ImportError with what to install."""
    try:
        import av
        import av.stream
        import av.video.reformatter
    except ImportError as error:
        raise ImportError(
            "reading videos needs PyAV, which is not installed: pip install 'tessera-pretrain[video]'"
        ) from error
    return av
