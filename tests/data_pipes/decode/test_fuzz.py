"""All decoders against damaged files: a picture, or a bad sample that is counted; nothing else, and within the limits.

The default suite takes a slice of each format; `pytest -m slow` takes 1,000 mutations of each.
"""

from __future__ import annotations

import io
import resource
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest

from data_pipes.decode.picture import decode_image
from data_pipes.decode.video import Video
from data_pipes.errors import CAUSES, SampleError
from data_pipes.inspect.stats import picture_header
from data_pipes.pack.reencode_picture import PictureOptions, UnreadableFile, prepare_picture
from data_pipes.shards.reader import RawSample
from tests.data_pipes.pack.test_reencode_picture import PICTURES, by_pil
from tests.data_pipes.tiny_videos import video

MAX_PIXELS = 100_000
NUM_DEFAULT, NUM_SLOW = 60, 1000
MAX_GROWTH_BYTES = 256 << 20
"""Of the whole process in one test: far more than MAX_PIXELS need, far less than a size that a header makes up."""


def formats() -> dict[str, list[bytes]]:
    """By the first word of their names."""
    found: dict[str, list[bytes]] = {}
    for name, data in PICTURES.items():
        found.setdefault(name.split()[0], []).append(data)
    return found


VIDEOS = {"mp4": "libx264", "matroska": "libx264", "webm": "libvpx-vp9", "avi": "libx264"}
_WORDS = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\xff\xff", b"\0\1\0\0")


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """With one to four faults, half of them in the first 200 bytes: bits, sizes, bytes gone or added, an early end."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        place = int(rng.integers(max(1, len(changed) if rng.integers(2) else min(len(changed), 200))))
        kind = rng.integers(5)
        if kind == 0 and changed:
            changed[min(place, len(changed) - 1)] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            changed[place : place + 4] = _WORDS[rng.integers(len(_WORDS))]
        elif kind == 2:
            del changed[place : place + int(rng.integers(1, 40))]
        elif kind == 3:
            changed[place:place] = rng.bytes(int(rng.integers(1, 40)))
        elif rng.integers(3) == 0:
            del changed[place:]
    return bytes(changed)


def peak_bytes() -> int:
    """The most memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def try_all(documents: list[bytes], num: int, read: Callable[[bytes], None]) -> Counter[str]:
    """How often each cause was met; "read" where there was none."""
    rng, causes, before = np.random.Generator(np.random.PCG64(len(documents))), Counter[str](), peak_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about damaged parts
        for number in range(num):
            data = mutated(documents[number % len(documents)], rng)
            try:
                read(data)
                causes["read"] += 1
            except SampleError as error:
                causes[error.cause] += 1
    assert peak_bytes() - before < MAX_GROWTH_BYTES
    assert causes.keys() <= {"read", *CAUSES}
    return causes


def read_picture(data: bytes) -> None:
    """By all that reads pictures; with an error if training would count it as bad."""
    bad: SampleError | None = None
    try:
        assert decode_image(data, None, MAX_PIXELS).numel() <= 4 * MAX_PIXELS
    except SampleError as error:
        bad = error
    with suppress(SampleError):
        kind, height, width = picture_header(RawSample("a", {"png": data}, ("png",)))
        assert kind
        assert height >= 0
        assert width >= 0
    if bad is None or bad.cause != "pixels":  # packing, which makes pictures smaller, takes larger ones
        for options in (PictureOptions(), PictureOptions(short_side=20)):
            with suppress(UnreadableFile):
                prepare_picture(data, options)
    if bad is not None:
        raise bad


def read_video(data: bytes) -> None:
    with Video(data, max_pixels=MAX_PIXELS) as opened:
        opened.info()
        assert opened.frames([0, opened.num_frames - 1]).size <= 2 * 3 * MAX_PIXELS


@pytest.mark.parametrize("name", formats())
@pytest.mark.parametrize("num", [NUM_DEFAULT, pytest.param(NUM_SLOW, marks=pytest.mark.slow)])
def test_damaged_pictures(name: str, num: int) -> None:
    causes = try_all(formats()[name], num, read_picture)
    assert causes["read"] > 0
    assert causes["decode"] > num / 10


@pytest.mark.parametrize("kind", VIDEOS)
@pytest.mark.parametrize("num", [NUM_DEFAULT, pytest.param(NUM_SLOW, marks=pytest.mark.slow)])
def test_damaged_videos(kind: str, num: int) -> None:
    causes = try_all([video(12, kind, VIDEOS[kind])], num, read_video)
    assert causes["read"] > 0
    assert causes["video"] > num / 10


def canvas(data: bytes, kind: str, side: int) -> bytes:
    """A file whose header declares a square of that side."""
    changed = bytearray(data)
    if kind == "GIF":
        changed[6:10] = struct.pack("<HH", side, side)
    elif kind == "BMP":
        changed[18:26] = struct.pack("<ii", side, side)
    elif kind == "QOI":
        changed[4:12] = struct.pack(">II", side, side)
    elif kind == "TGA":
        changed[12:16] = struct.pack("<HH", side, side)
    elif kind == "PPM":
        return data.replace(b"56 40", b"%d %d" % (side, side), 1)
    elif kind == "PNG":
        changed[16:24] = struct.pack(">II", side, side)
        changed[29:33] = zlib.crc32(changed[12:29]).to_bytes(4, "big")
    elif kind == "WEBP":
        size = (side - 1).to_bytes(3, "little")
        body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + bytes(4) + size + size + data[12:]
        return b"RIFF" + struct.pack("<I", len(body)) + body
    return bytes(changed)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "QOI", "TGA", "PPM", "PNG", "WEBP"])
def test_a_declared_size_takes_no_memory(kind: str) -> None:
    """225 million pixels, behind a few hundred bytes."""
    bomb, before = canvas(by_pil(kind, "RGB" if kind != "GIF" else "P"), kind, 15_000), peak_bytes()
    with pytest.raises(SampleError) as caught:
        decode_image(bomb, 3)
    assert caught.value.cause in ("pixels", "decode")
    with pytest.raises(UnreadableFile):
        prepare_picture(bomb, PictureOptions(short_side=20))
    assert peak_bytes() - before < MAX_GROWTH_BYTES
    assert io.BytesIO(bomb).getbuffer().nbytes < 20_000
