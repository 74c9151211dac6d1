"""JPEG decoding in part and at a fraction of the size, against the whole."""

from __future__ import annotations

import io
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
from PIL import Image

from data_pipes.decode import jpeg
from data_pipes.decode.jpeg import JpegHeader, decode, decode_top, read_header
from data_pipes.errors import DecodeError

Pixels = np.ndarray


def picture(height: int, width: int, seed: int = 0) -> Pixels:
    """[H, W, 3]: smooth colours with some noise, so that every row differs."""
    rng = np.random.default_rng(seed)
    rows, columns = np.indices((height, width))
    waves = [np.sin(rows / period) + np.cos(columns / (period + 3)) for period in (7, 11, 17)]
    return np.clip(np.stack(waves, axis=2) * 50 + 128 + rng.normal(0, 6, (height, width, 3)), 0, 255).astype(np.uint8)


def encode(pixels: Pixels, mode: str = "RGB", **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "JPEG", **{"quality": 90, **options})
    return file.getvalue()


def header_of(data: bytes) -> JpegHeader:
    header = read_header(data)
    assert header is not None
    return header


def test_headers() -> None:
    pixels = picture(40, 56)
    assert read_header(encode(pixels)) == (40, 56, False)
    assert read_header(encode(pixels, "L")) == (40, 56, True)
    for other in (encode(pixels, "CMYK"), encode(pixels)[:100], b"\xff\xd8\xff", b"", b"\x89PNG"):
        assert read_header(other) is None


@pytest.mark.parametrize(("height", "width"), [(64, 48), (61, 47), (9, 200), (1, 1)])
@pytest.mark.parametrize("shrink", [1, 2, 4, 8])
@pytest.mark.parametrize("channels", [1, 3])
def test_sizes(height: int, width: int, shrink: int, channels: int) -> None:
    data = encode(picture(height, width))
    shape = decode(data, header_of(data), channels, shrink).shape
    assert shape == (-(-height // shrink), -(-width // shrink), channels)


@pytest.mark.parametrize("shrink", [2, 4, 8])
def test_shrunk_pictures_are_means(shrink: int) -> None:
    data = encode(picture(96, 128), subsampling=0)
    means = decode(data, header_of(data), 3).reshape(96 // shrink, shrink, 128 // shrink, shrink, 3).mean((1, 3))
    shrunk = decode(data, header_of(data), 3, shrink)
    assert np.abs(shrunk - means).mean() < 3
    assert np.abs(shrunk[1:] - means[:-1]).mean() > 5  # one pixel off would show


@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"optimize": True}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(("height", "width"), [(128, 80), (121, 83)])
def test_rows_above_the_cut_keep_every_bit(mode: str, options: dict[str, object], height: int, width: int) -> None:
    data = encode(picture(height, width), mode, **options)
    header = header_of(data)
    for channels, shrink in ((3, 1), (1, 1), (3, 2), (3, 8)):
        whole = decode(data, header, channels, shrink)
        for num_rows in (1, 7, 8, 15, 16, 17, 63, 100, height - 1, height):
            top, needed = decode_top(data, header, channels, num_rows, shrink), -(-num_rows // shrink)
            assert needed <= len(top) <= len(whole)
            assert len(top) <= -(-(num_rows + 17) // shrink)  # else nothing was saved
            assert np.array_equal(top[:needed], whole[:needed])


def test_photographs(shared_data: Path) -> None:
    with ZipFile(shared_data / "photos_300.zip") as photos:
        cut = 0
        for name in photos.namelist()[:40]:
            data = photos.read(name)
            header = header_of(data)
            half = header.height // 2
            top = decode_top(data, header, 3, half)
            assert np.array_equal(top[:half], decode(data, header, 3)[:half])
            cut += len(top) < header.height
    assert cut > 20  # some are progressive


@pytest.mark.parametrize("options", [{"progressive": True}, {"restart_marker_rows": 1}])
def test_decoded_whole(options: dict[str, object]) -> None:
    data = encode(picture(96, 64), **options)
    assert jpeg._cut(data, header_of(data), 20) is None
    assert decode_top(data, header_of(data), 3, 20).shape == (96, 64, 3)


def test_several_scans_are_decoded_whole() -> None:
    """Each component in a scan of its own: lowering the height would lose two of them."""
    data = encode(picture(96, 64), subsampling=0)
    scan = data.index(b"\xff\xda\x00\x0c\x03")
    assert jpeg._cut(data, header_of(data), 20) is not None
    alone = data[:scan] + b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" + data[scan + 14 :]
    assert jpeg._cut(alone, JpegHeader(96, 64, False), 20) is None


def test_truncation_is_an_error() -> None:
    data = encode(picture(160, 120))
    header = header_of(data)
    for length in range(len(data) - 1, 700, -211):
        if read_header(data[:length]) is None:
            continue
        with pytest.raises(DecodeError, match="damaged JPEG of 160 x 120"):
            decode_top(data[:length], header, 3, 40)


def test_damage_above_and_below() -> None:
    data = encode(picture(160, 120))
    header, begin = header_of(data), data.index(b"\xff\xda") + 14
    early, late = (begin + int((len(data) - begin) * part) for part in (0.1, 0.8))
    above = data[:early] + b"\xff\x00\x13\xff\x55\x77" + data[early + 6 :]
    below = data[:late] + b"\x55" * 200 + data[late:]
    for damaged in (above, below):
        with pytest.raises(DecodeError, match="damaged JPEG"):
            decode(damaged, header, 3)
    with pytest.raises(DecodeError, match="damaged JPEG"):
        decode_top(above, header, 3, 40)
    assert np.array_equal(decode_top(below, header, 3, 40)[:40], decode(data, header, 3)[:40])


def test_unusual_subsampling_is_left_to_pil() -> None:
    data = encode(picture(32, 32), subsampling=0)
    factors = data.index(b"\xff\xc0") + 11
    for unusual in (0x14, 0x31):  # 4:4:1, which simplejpeg cannot name, and one that libjpeg-turbo does not know
        assert read_header(data[:factors] + bytes([unusual]) + data[factors + 1 :]) is None


def test_mutations_never_change_what_an_undamaged_picture_gives() -> None:
    """Whatever the bytes: an error, or the rows that the whole decoding gives, where that finds no fault."""
    data = encode(picture(96, 80))
    rng = np.random.default_rng(0)
    usable = 0
    for _ in range(600):
        mutated = bytearray(data)
        for place in rng.integers(2, len(data) if rng.random() < 0.5 else 640, rng.integers(1, 4)):
            mutated[place] = rng.integers(256)
        header = read_header(bytes(mutated))
        if header is None or header.height * header.width > 1 << 20:
            continue
        num_rows = min(header.height, 40)
        try:
            whole = decode(bytes(mutated), header, 3)
        except DecodeError:
            whole = None
        try:
            top = decode_top(bytes(mutated), header, 3, num_rows)
        except DecodeError:
            assert whole is None
            continue
        assert len(top) >= num_rows
        if whole is not None:
            usable += 1
            assert np.array_equal(top[:num_rows], whole[:num_rows])
    assert usable > 50


def test_segments_that_lead_nowhere() -> None:
    data = encode(picture(96, 80))
    header = header_of(data)
    frame = data.index(b"\xff\xc0")
    for broken in (
        data[:2] + b"\xff\xe0\x00\x00" * 50 + data[2:],  # segments of no length
        data[:2] + b"\xff\xfe\xff\xff" + data[2:],  # one that passes the end
        data[: frame + 5] + b"\x00\x11" + data[frame + 7 :],  # another height than the header that was read
        data[:30],
    ):
        assert jpeg._cut(broken, header, 20) is None
