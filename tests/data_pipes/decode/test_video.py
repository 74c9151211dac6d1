"""Frames of videos against decoding everything; damaged and hostile files; memory."""

from __future__ import annotations

import gc
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from data_pipes.decode.video import Video, probe
from data_pipes.decode.video_container import container_of
from data_pipes.decode.video_frames import list_frames
from data_pipes.errors import SampleError
from data_pipes.pack.reencode_video import VideoOptions, prepare_video
from tests.data_pipes.tiny_videos import cut, decode_all, encode, pictures, rotated, sound, video, with_matrix

KINDS: dict[str, dict[str, Any]] = {
    "h264 mp4": {},
    "h264 mp4, one group": {"gop": 250, "b_frames": 3},
    "h264 mp4, open groups": {"gop": 8, "b_frames": 3, "options": (("x264-params", "open-gop=1:b-pyramid=normal"),)},
    "h264 mov, keyframes only": {"kind": "mov", "gop": 1, "b_frames": 0},
    "h264 mkv": {"kind": "matroska", "b_frames": 3},
    "h264 avi": {"kind": "avi", "b_frames": 2},
    "mpeg4 avi": {"kind": "avi", "codec": "mpeg4", "b_frames": 0},
    "mpeg4 avi, b": {"kind": "avi", "codec": "mpeg4", "b_frames": 2},
    "mjpeg avi": {"kind": "avi", "codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "vp8 webm": {"kind": "webm", "codec": "libvpx"},
    "vp8 webm, hidden frames": {
        "kind": "webm",
        "codec": "libvpx",
        "options": (("auto-alt-ref", "1"), ("lag-in-frames", "16"), ("deadline", "good")),
    },
    "vp9 webm": {"kind": "webm", "codec": "libvpx-vp9"},
    "hevc mp4": {"codec": "libx265", "options": (("x265-params", "log-level=none:pools=1"), ("preset", "ultrafast"))},
    "odd size": {"codec": "libx264", "size": (45, 67), "pix_fmt": "yuv444p"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_those_of_decoding_everything(kind: str) -> None:
    data = video(**KINDS[kind])
    expected = decode_all(data)
    assert len(expected) == 40
    rng = np.random.default_rng(0)
    with Video(data) as opened:
        assert opened.num_frames == 40
        assert np.array_equal(opened.frames(np.arange(40)), expected)
        for _ in range(8):
            indices = np.sort(rng.integers(0, 40, rng.integers(1, 9)))
            assert np.array_equal(opened.frames(indices), expected[indices]), indices
        for index in (39, 0, 13):
            assert np.array_equal(opened.frames([index])[0], expected[index])


def test_only_what_is_needed_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    from data_pipes.decode import video as module

    monkeypatch.setattr(module, "_check_frame", lambda frame: decoded.append(frame.pts))
    data = video(80, gop=20, b_frames=2)
    with Video(data) as opened:
        opened.frames([41, 45, 49, 41])
        assert len(decoded) <= 10
        assert len(set(decoded)) == len(decoded)
        decoded.clear()
        opened.frames([1, 62])
        assert len(decoded) <= 8  # two short runs, nothing between


def test_info() -> None:
    info = probe(video(40, rate=20))
    assert (info.num_frames, info.height, info.width, info.rotation) == (40, 48, 64, 0)
    assert (info.codec, info.longest_gop) == ("h264", 12)
    assert info.fps == pytest.approx(20)
    assert info.duration_s == pytest.approx(2)


@pytest.mark.parametrize("kind", ["mp4", "matroska"])
def test_variable_frame_rate(kind: str) -> None:
    times = [0, 40, 80, 400, 440, 1000, 1040, 1080]  # milliseconds
    data = encode(pictures(8), times, kind, b_frames=0, rate=25)
    with Video(data) as opened:
        assert np.allclose(opened.times_s, np.array(times) / 1000, atol=1e-3)
        assert opened.frame_at(np.array([0.0, 0.1, 0.399, 0.401, 0.9, 5.0])).tolist() == [0, 2, 2, 3, 4, 7]
        assert np.array_equal(opened.frames([3, 5]), decode_all(data)[[3, 5]])


@pytest.mark.parametrize("quarter_turns", [1, 2, 3])
def test_rotation_is_applied(quarter_turns: int) -> None:
    data = rotated(video(), quarter_turns)
    expected = np.rot90(decode_all(data), -quarter_turns, (1, 2))
    with Video(data) as opened:
        assert np.array_equal(opened.frames([3, 20]), expected[[3, 20]])
        info = opened.info()
    assert (info.height, info.width) == expected.shape[1:3]
    assert info.rotation == (360 - 90 * quarter_turns) % 360


EIGHT = [
    (1, 0, 0, 1),
    (0, 1, -1, 0),
    (-1, 0, 0, -1),
    (0, -1, 1, 0),
    (-1, 0, 0, 1),
    (0, 1, 1, 0),
    (1, 0, 0, -1),
    (0, -1, -1, 0),
]
"""a, b, c, d of the ways to lay a rectangle upon a rectangle; the last four are mirrored."""


def shown(frames: np.ndarray, a: int, b: int, c: int, d: int) -> np.ndarray:
    """[T, H, W, C] by the words of the standard: pixel (x, y) goes to (a x + c y, b x + d y), from the corner on."""
    y, x = np.indices(frames.shape[1:3])
    right, down = a * x + c * y, b * x + d * y
    right, down = right - right.min(), down - down.min()
    out = np.zeros((len(frames), down.max() + 1, right.max() + 1, 3), np.uint8)
    out[:, down, right] = frames
    return out


@pytest.mark.parametrize("matrix", EIGHT)
def test_every_display_matrix_is_applied(matrix: tuple[int, int, int, int]) -> None:
    plain = video(20)
    expected = shown(decode_all(plain), *matrix)
    for scale in (1, 2, 0.5):  # a scale is no orientation
        with Video(with_matrix(plain, *(scale * value for value in matrix))) as opened:
            assert np.array_equal(opened.frames([3, 12]), expected[[3, 12]])
            assert np.array_equal(opened.frames([3], channels=1).shape[1:3], expected.shape[1:3])
            assert (opened.info().height, opened.info().width) == expected.shape[1:3]
            assert opened.info().mirrored == (matrix[0] * matrix[3] < matrix[1] * matrix[2])


@pytest.mark.parametrize("matrix", [(0, 0, 0, 0), (1, 0, 0, 0), (0.9, 0.4, -0.4, 0.9)])
def test_matrices_that_lay_no_rectangle(matrix: tuple[float, float, float, float]) -> None:
    """Of zeros or flat: as it is stored; by an angle of its own: the nearest quarter turn."""
    with Video(with_matrix(video(20), *matrix)) as opened:
        assert np.array_equal(opened.frames([3]), decode_all(video(20))[[3]])


OPEN = {
    "libx264": {"preset": "ultrafast", "x264-params": "keyint=12:open-gop=1:bframes=3:b-adapt=0:scenecut=0"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none:keyint=12:open-gop=1:bframes=3:pools=1"},
    "mpeg2video": {"bf": "2", "g": "12"},
}


@pytest.mark.parametrize("codec", OPEN)
@pytest.mark.parametrize("kind", ["matroska", "mp4"])
def test_a_cut_open_group_counts_the_frames_that_come_out(codec: str, kind: str) -> None:
    """Frames that were shown before the first keyframe are not counted, so every index is the frame that it says."""
    whole = encode(pictures(60), codec=codec, b_frames=3, options=OPEN[codec])
    data = cut(whole, 0.6, kind)
    with Video(data) as opened, Video(whole) as reference:
        first = reference.num_frames - opened.num_frames
        assert first in (12, 24)
        expected = reference.frames(range(first, 60))
        assert np.array_equal(opened.frames(range(opened.num_frames)), expected)
        for index in (0, 1, 7, opened.num_frames - 1):
            assert np.array_equal(opened.frames([index])[0], expected[index])
    assert prepare_video(data, VideoOptions(verify="decode"))[0] == data


def test_luma() -> None:
    with Video(video()) as opened:
        grey, colour = opened.frames([5], channels=1)[0, ..., 0], opened.frames([5])[0].astype(float)
        assert np.abs(colour @ [0.299, 0.587, 0.114] - grey).mean() < 3
        with pytest.raises(SampleError, match="1 or 3 channels"):
            opened.frames([5], channels=4)


def test_indices_out_of_range() -> None:
    with Video(video()) as opened:
        for wrong in ([40], [-1, 3], []):
            with pytest.raises(ValueError, match="of a video of 40"):
                opened.frames(wrong)


def _cause(data: bytes, **limits: int) -> str:
    with pytest.raises(SampleError) as caught, Video(data, **limits) as opened:
        opened.frames(np.arange(opened.num_frames))
    return caught.value.cause


def test_files_that_are_no_videos() -> None:
    assert _cause(b"") == "video"
    assert _cause(b"not a video at all, but long enough to look at") == "video"
    assert _cause(b"#EXTM3U\nhttp://127.0.0.1/x.ts\n") == "video"
    assert _cause(b"ffconcat version 1.0\nfile /etc/passwd\n") == "video"
    assert _cause(bytes(1000)) == "video"
    assert _cause(sound()) == "no_video"


@pytest.mark.parametrize("kind", ["mp4", "webm", "avi"])
def test_every_cut_is_found(kind: str) -> None:
    codec = {"mp4": "libx264", "webm": "libvpx", "avi": "mpeg4"}[kind]
    data = video(40, kind, codec, b_frames=0)
    for length in [8, 60, len(data) // 3, len(data) // 2, len(data) - 1]:
        assert _cause(data[:length]) in ("video", "frames", "no_video"), length


def test_cut_in_spite_of_a_consistent_container() -> None:
    data = video(40)  # the last box made as short as the file: the index still lists 40 frames
    place = data.index(b"mdat") - 4
    cut = data[: place + 4000]
    cut = cut[:place] + struct.pack(">I", len(cut) - place) + cut[place + 4 :]
    assert container_of(cut) == "mov"
    assert _cause(cut) == "video"


@pytest.mark.parametrize("kind", ["h264 mp4", "h264 mkv", "mpeg4 avi", "vp9 webm"])
def test_damage_ends_in_an_error_or_a_picture(kind: str) -> None:
    data = video(**KINDS[kind])
    rng = np.random.default_rng(1)
    causes: list[str] = []
    for _ in range(40):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), rng.integers(1, 30)):
            damaged[place] = rng.integers(0, 256)
        try:
            with Video(bytes(damaged), max_pixels=1 << 20) as opened:
                opened.frames(np.arange(min(40, opened.num_frames)))
        except SampleError as error:
            causes.append(error.cause)
    assert len(causes) > 5
    assert set(causes) <= {"video", "no_video", "codec", "pixels", "frames"}


def test_damage_in_mid_file_is_found() -> None:
    data = bytearray(video(40, b_frames=0, gop=40))
    middle = data.index(b"mdat") + (len(data) - data.index(b"mdat")) // 2
    data[middle : middle + 2000] = np.random.default_rng(0).bytes(2000)
    with Video(bytes(data)) as opened:
        opened.frames([0, 1])
        with pytest.raises(SampleError, match="damaged"):
            opened.frames([39])
        opened.frames([0, 1])  # the decoder is usable afterwards


def test_declared_sizes_are_checked_before_decoding() -> None:
    assert _cause(video(), max_pixels=48 * 64 - 1) == "pixels"
    motion_jpeg = bytearray(video(4, "avi", "mjpeg", pix_fmt="yuvj420p"))
    for place in [match.start() for match in re.finditer(b"\xff\xc0", bytes(motion_jpeg))]:
        motion_jpeg[place + 5 : place + 9] = struct.pack(">HH", 60000, 60000)
    before = psutil.Process().memory_info().rss
    assert _cause(bytes(motion_jpeg), max_pixels=1 << 22) in ("pixels", "frames", "video")
    assert psutil.Process().memory_info().rss - before < 64 << 20


def test_sizes_that_change_on_the_way_are_limited_and_scaled() -> None:
    small = encode(pictures(1, 48, 64), None, "avi", "mjpeg", pix_fmt="yuvj420p")
    large = encode(pictures(1, 96, 128), None, "avi", "mjpeg", pix_fmt="yuvj420p")
    first, second = (
        each[each.index(b"\xff\xd8", each.index(b"movi")) : each.index(b"idx1")] for each in (small, large)
    )
    data = small[: small.index(b"movi")]
    two = b"movi" + b"".join(b"00dc" + struct.pack("<I", len(part)) + part for part in (first, second))
    data = data[:-4] + struct.pack("<I", len(two)) + two
    data = data[:4] + struct.pack("<I", len(data) - 8) + data[8:]
    with Video(data) as opened:
        assert opened.frames([0, 1]).shape == (2, 48, 64, 3)
    with pytest.raises(SampleError), Video(data, max_pixels=48 * 64) as opened:
        opened.frames([0, 1])


def test_effort_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = video(40, gop=40)
    with Video(data, max_decoded_frames=30) as opened:
        opened.frames([3])
        with pytest.raises(SampleError, match="keyframe every 32 frames"):
            opened.frames([39])
    monkeypatch.setattr("data_pipes.decode.video._MAX_READ_PIXELS", 10 * 48 * 64)
    with Video(data) as opened, pytest.raises(SampleError) as caught:
        opened.frames(np.arange(11))
    assert caught.value.cause == "pixels"


def test_unusual_codecs_are_refused() -> None:
    data = encode(pictures(4), None, "avi", "flv")
    assert _cause(data) == "codec"


def test_wrong_frame_counts_in_headers() -> None:
    data = bytearray(video(40, "avi", "mpeg4", b_frames=0))
    for name, offset in ((b"avih", 8 + 16), (b"strh", 8 + 32)):  # dwTotalFrames, dwLength
        place = data.index(name) + offset
        data[place : place + 4] = struct.pack("<I", 7)
    with Video(bytes(data)) as opened:
        assert opened.num_frames == 40
        assert np.array_equal(opened.frames([39]), decode_all(bytes(data))[[39]])


def test_table_of_packets_without_times() -> None:
    class Packet:
        def __init__(self, pts: int | None, key: bool) -> None:
            self.pts, self.is_keyframe = pts, key

    packets = [Packet(None, n % 5 == 2) for n in range(12)]
    table = list_frames(packets, [n != 4 for n in range(12)], 0.1, 0.04, reorders=False)
    assert table.counted
    assert table.position.tolist() == [2, 3, 5, 6, 7, 8, 9, 10, 11]  # nothing before the first keyframe, not the hidden
    assert table.start.tolist() == [2, 2, 2, 2, 7, 7, 7, 7, 7]
    assert table.longest_gop == 5
    assert set(list_frames(packets, [True] * 12, 0.1, 0.04, reorders=True).start.tolist()) == {2}


def test_nothing_leaks() -> None:
    data, broken = video(40, gop=12), video(40)[:-500]
    process = psutil.Process()

    def work(count: int) -> None:
        for number in range(count):
            with Video(data) as opened:
                opened.frames(np.arange(0, 16) + number % 20)
            with pytest.raises(SampleError):
                Video(broken)

    work(50)
    gc.collect()
    before, files = process.memory_info().rss, process.num_fds()
    work(250)
    gc.collect()
    assert process.memory_info().rss - before < 12 << 20
    assert process.num_fds() == files


def test_without_pyav(tmp_path: Path, root: Path) -> None:
    (tmp_path / "av.py").write_text("raise ImportError('no such thing')")
    code = "from data_pipes.decode.video import Video; Video(b'')"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert "pip install 'tessera-pretrain[video]'" in done.stderr
