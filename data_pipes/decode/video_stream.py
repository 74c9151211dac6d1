"""The video stream of a file: opened without trusting the bytes, its packets, and the frames that they give.

Enters: the bytes of one video. Leaves: the stream, its packets in the order of the file, and a `FrameTable`. Why it
exists: all that can be wrong with a file shows here, before anything is decoded.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from data_pipes.decode.video_container import AVI, container_of
from data_pipes.decode.video_frames import FrameTable, list_frames
from data_pipes.errors import SampleError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.stream import VideoStream

_MAX_PACKETS = 1_000_000
"""Of one file: 9 hours of video."""
_CODECS = frozenset((
    "h264", "hevc", "vp8", "vp9", "libvpx", "libvpx-vp9", "av1", "libdav1d", "mpeg4", "mjpeg", "mpeg1video",
    "mpeg2video", "h263", "msmpeg4v2", "msmpeg4v3", "wmv1", "wmv2", "wmv3", "vc1", "theora", "prores", "dvvideo",
    "ffv1", "huffyuv", "rawvideo", "png",
))  # fmt: skip
"""FFmpeg has 250 decoders, many written for one forgotten game; the fewer a hostile file can reach, the better."""
_VP8_SHOWN = 16
"""Bit of a VP8 packet's first byte (RFC 6386, 9.1): the frame is shown; the others only refresh a reference."""
_NOMINAL_S = 0.04
"""Seconds of a frame, where neither times nor a rate are known."""


def import_av() -> Any:
    """PyAV.

    Raises:
        ImportError: it is not installed; the message says what to do.
    """
    try:
        import av
        import av.stream
        import av.video.reformatter
    except ImportError as error:
        raise ImportError(
            "reading videos needs PyAV, which is not installed: pip install 'tessera-pretrain[video]'"
        ) from error
    return av


def open_container(data: bytes, max_pixels: int) -> InputContainer:
    """Opens a file in the format that its first bytes say, which may open no other files.

    Args:
        data: the file.
        max_pixels: height * width of a frame, at most; FFmpeg checks it too.
    Raises:
        SampleError: "video", when it is unreadable or cut short.
    """
    av, container = import_av(), container_of(data)
    try:
        opened: InputContainer = av.open(
            io.BytesIO(data),
            "r",
            format=container,
            options={"max_pixels": str(max_pixels)},
            metadata_errors="replace",
            io_open=_refuse,
        )
    except (av.FFmpegError, ValueError, OverflowError) as error:
        raise SampleError(
            "video", f"not a readable {container} file of {len(data):,} bytes: {type(error).__name__}: {error}"
        ) from error
    return opened


def choose_stream(container: InputContainer, max_pixels: int) -> VideoStream:
    """The first video stream that is no cover art, ready to be decoded by one thread.

    Raises:
        SampleError: "no_video", "codec" (not a known video codec), "video" (no size), "pixels" (too many).
    """
    av = import_av()
    cover_art = av.stream.Disposition.attached_pic
    stream = next((stream for stream in container.streams.video if not stream.disposition & cover_art), None)
    if stream is None:
        raise SampleError("no_video", "the file has no video stream")
    if stream.codec_context is None or stream.codec_context.codec.name not in _CODECS:
        found = None if stream.codec_context is None else stream.codec_context.codec.name
        raise SampleError("codec", f"the video's codec is {found or 'unknown'}; expected h264, hevc, vp9, av1, ...")
    context = stream.codec_context
    if context.height < 1 or context.width < 1:
        raise SampleError("video", f"the video declares {context.height} x {context.width} pixels")
    if context.height * context.width > max_pixels:
        raise SampleError(
            "pixels",
            f"the header declares frames of {context.height} x {context.width} = "
            f"{context.height * context.width:,} pixels, more than max_pixels = {max_pixels:,}; raise "
            "data.max_pixels if such videos are wanted",
        )
    context.thread_count = 1
    context.options = {"max_pixels": str(max_pixels)}  # for sizes that change on the way
    return stream


def list_packets(container: InputContainer, stream: VideoStream) -> list[Packet[VideoStream]]:
    """All packets of a stream, in the order of the file.

    Raises:
        SampleError: "video" (damaged, cut short), "frames" (too many).
    """
    packets: list[Packet[VideoStream]] = []
    try:
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise SampleError("video", "the file is damaged: a packet is cut short or has a wrong checksum")
            if packet.size:  # an empty one ends the stream
                packets.append(packet)
            if len(packets) > _MAX_PACKETS:
                raise SampleError("frames", f"more than {_MAX_PACKETS:,} packets; cut the video into shorter ones")
    except import_av().FFmpegError as error:
        raise SampleError("video", f"damaged file: {type(error).__name__}: {error}") from error
    expected = len(stream.index_entries)  # mp4 lists all of its frames, the others some or none
    if expected > len(packets):
        raise SampleError("video", f"the file is damaged: {len(packets)} of the {expected} frames in its index")
    return packets


def frames_of(container: InputContainer, stream: VideoStream, packets: list[Packet[VideoStream]]) -> FrameTable:
    """The frames that the packets of a stream give.

    Raises:
        SampleError: "frames", when there is none.
    """
    if not packets:
        raise SampleError("frames", "the video has no frames")
    has_hidden = stream.codec_context.codec.name == "vp8"
    shown = [not (p.is_discard or (has_hidden and not bytes(p)[0] & _VP8_SHOWN)) for p in packets]
    rate, tick = stream.average_rate, stream.time_base
    # AVI has no times of presentation, and FFmpeg makes some up that are in the order of the file
    tick_s = None if tick is None or container.format.name == AVI else float(tick)
    frame_s = 1 / float(rate) if rate else _NOMINAL_S
    reorders = bool(stream.codec_context.has_b_frames)
    table = list_frames(packets, shown, tick_s, frame_s, reorders)
    if not len(table.label):
        raise SampleError("frames", f"none of the {len(packets)} packets gives a frame to see")
    return table


def _refuse(url: str, *_: object) -> Any:
    raise PermissionError(f"a video may not open other files: {url}")
