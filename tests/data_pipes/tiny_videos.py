"""Small videos for the tests, made with PyAV from generated pictures: every frame differs from every other."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

SIZE = (48, 64)
"""(height, width)."""


def pictures(count: int, height: int = SIZE[0], width: int = SIZE[1]) -> NDArray[np.uint8]:
    """[count, height, width, 3]: a texture that moves, over a ramp that turns."""
    rng = np.random.default_rng(0)
    texture = np.kron(rng.integers(0, 120, (height // 4 + 1, width // 4 + 1, 3)), np.ones((4, 4, 1), np.int64))
    y, x = np.mgrid[:height, :width]
    frames = []
    for number in range(count):
        ramp = 60 + 60 * np.sin(number / 3 + y / 9 + np.cos(number / 5) * x / 7)
        frames.append(np.roll(texture[:height, :width], (number, 2 * number), (0, 1)) + ramp[..., None])
    return np.stack(frames).clip(0, 255).astype(np.uint8)


@lru_cache(maxsize=64)
def video(
    num_frames: int = 40,
    kind: str = "mp4",
    codec: str = "libx264",
    gop: int = 12,
    b_frames: int = 2,
    rate: int = 25,
    size: tuple[int, int] = SIZE,
    options: tuple[tuple[str, str], ...] = (),
    pix_fmt: str = "yuv420p",
) -> bytes:
    """One encoded video, see `encode`."""
    return encode(pictures(num_frames, *size), None, kind, codec, gop, b_frames, rate, dict(options), pix_fmt)


def encode(
    frames: NDArray[np.uint8],
    times: Sequence[int] | None = None,
    kind: str = "mp4",
    codec: str = "libx264",
    gop: int = 12,
    b_frames: int = 2,
    rate: int = 25,
    options: Mapping[str, str] | None = None,
    pix_fmt: str = "yuv420p",
) -> bytes:
    """A video of the given frames.

    Args:
        frames: [T, H, W, C].
        times: of the frames, in 1/1000 s; None: one after another at `rate`.
        kind: FFmpeg's name of the container.
        codec: FFmpeg's name of the encoder.
        gop: frames from one keyframe to the next.
        b_frames: in a row, at most.
        rate: frames per second.
        options: of the encoder.
        pix_fmt: FFmpeg's name of the pixel format.
    """
    with tempfile.TemporaryDirectory() as folder:  # ffmpeg moves an mp4's index to the front by reading its own file
        path = Path(folder) / "video"
        _write(path, frames, times, kind, codec, gop, b_frames, rate, options or {}, pix_fmt)
        return path.read_bytes()


def _write(
    path: Path,
    frames: NDArray[np.uint8],
    times: Sequence[int] | None,
    kind: str,
    codec: str,
    gop: int,
    b_frames: int,
    rate: int,
    options: Mapping[str, str],
    pix_fmt: str,
) -> None:
    container_options = {"movflags": "faststart"} if kind == "mp4" else {}
    with av.open(path, "w", format=kind, options=container_options) as container:
        stream = container.add_stream(codec, rate=rate, options={**_OPTIONS.get(codec, {}), **options})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pix_fmt
        stream.codec_context.gop_size, stream.codec_context.thread_count = gop, 1
        if codec in ("libx264", "mpeg4"):
            stream.codec_context.max_b_frames = b_frames
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


_OPTIONS = {
    "libx264": {"preset": "veryfast", "crf": "23", "sc_threshold": "0"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
}


def sound() -> bytes:
    """An mp4 with sound only."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate, frame.pts = 16000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def decode_all(data: bytes) -> NDArray[np.uint8]:
    """The slow reference: every frame [N, H, W, 3], in PyAV's plainest words."""
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def rotated(data: bytes, quarter_turns: int) -> bytes:
    """An mp4 with the matrix that turns the picture clockwise when it is shown, as phones write it."""
    matrices = {1: (0, 1, -1, 0), 2: (-1, 0, 0, -1), 3: (0, -1, 1, 0)}
    return with_matrix(data, *matrices[quarter_turns])


def with_matrix(data: bytes, a: float, b: float, c: float, d: float) -> bytes:
    """An mp4 whose pixel (x, y) is shown at (a x + c y, b x + d y)."""
    a, b, c, d = (round(value * 65536) for value in (a, b, c, d))
    place = data.index(b"tkhd") + 4 + 4 + 4 * 5 + 8 + 8  # version 0: times, id, reserved, duration; layer .. volume
    matrix = b"".join((value % (1 << 32)).to_bytes(4, "big") for value in (a, b, 0, c, d, 0, 0, 0, 1 << 30))
    return data[:place] + matrix + data[place + 36 :]


def cut(data: bytes, start_s: float, kind: str = "matroska") -> bytes:
    """The packets from the keyframe before a time on, in another container, as `ffmpeg -ss -c copy` writes them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video"
        with av.open(io.BytesIO(data)) as source, av.open(path, "w", format=kind) as target:
            stream = source.streams.video[0]
            copied = target.add_stream_from_template(stream)
            source.seek(round(start_s / stream.time_base), stream=stream, backward=True)
            first: int | None = None
            for packet in source.demux(stream):
                if packet.dts is None or (first is None and not packet.is_keyframe):
                    continue
                first = packet.pts if first is None else first
                packet.pts, packet.dts, packet.stream = packet.pts - first, packet.dts - first, copied
                target.mux(packet)
        return path.read_bytes()
