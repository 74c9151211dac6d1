"""JPEG decoding at a fraction of the size, faults that cost no pixel, and those that do."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipes.decode.jpeg import JpegHeader, decode, read_header
from data_pipes.decode.jpeg_repair import repaired
from data_pipes.decode.picture import decode_image
from data_pipes.errors import DecodeError
from data_pipes.pack.reencode_picture import PictureOptions, UnreadableFile, prepare_picture
from data_pipes.transforms.image import TrainTransform

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


def test_unusual_subsampling_is_left_to_pil() -> None:
    data = encode(picture(32, 32), subsampling=0)
    factors = data.index(b"\xff\xc0") + 11
    for unusual in (0x14, 0x31):  # 4:4:1, which simplejpeg cannot name, and one that libjpeg-turbo does not know
        assert read_header(data[:factors] + bytes([unusual]) + data[factors + 1 :]) is None


def changed(data: bytes, place: int, part: bytes) -> bytes:
    return data[:place] + part + data[place + len(part) :]


def scan_end(data: bytes) -> int:
    """Behind the header of the last scan."""
    scan = data.rindex(b"\xff\xda")
    return scan + 2 + int.from_bytes(data[scan + 2 : scan + 4], "big")


def filled(data: bytes, filling: bytes) -> bytes:
    return data[:-2] + filling + data[-2:]


ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"
HARMLESS = {
    "scan header 0, 0, 0": lambda data: changed(data, scan_end(data) - 3, bytes(3)),
    "scan header 0, 0, 0x11": lambda data: changed(data, scan_end(data) - 3, b"\0\0\x11"),
    "64 zeros": lambda data: filled(data, bytes(64)),
    "one zero": lambda data: filled(data, b"\0"),
    "5,000 times 255": lambda data: filled(data, b"\xff" * 5000),
    "100 blanks": lambda data: filled(data, b" " * 100),
    "bytes between two segments": lambda data: data[:20] + b"no marker" + data[20:],
    "another revision of JFIF": lambda data: changed(data, 11, b"\x07\x00"),
    "an unknown transform": lambda data: data[:20] + ADOBE + b"\x05" + data[20:],
    "scan header and zeros": lambda data: filled(changed(data, scan_end(data) - 3, bytes(3)), bytes(9)),
    "all of them": lambda data: filled(
        changed(data[:11] + b"\x07\x00" + data[13:20] + b"no marker" + data[20:], scan_end(data) + 6, bytes(3)),
        bytes(64),
    ),
    "a trailer": lambda data: data + b"SEFT and more of a phone" * 50,
}
"""Faults that leave every pixel as it is."""
KINDS: dict[str, dict[str, object]] = {
    "RGB": {},
    "L": {},
    "4:4:4": {"subsampling": 0},
    "restarts": {"restart_marker_rows": 1},
    "progressive": {"progressive": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", HARMLESS)
def test_harmless_faults_change_no_pixel_of_any_crop(kind: str, fault: str) -> None:
    if kind == "progressive" and (fault == "all of them" or "scan header" in fault):
        pytest.skip("the numbers in a progressive scan header mean something")
    plain = encode(picture(120, 90), "L" if kind == "L" else "RGB", **KINDS[kind])
    data = HARMLESS[fault](plain)
    assert data != plain
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(Image.open(io.BytesIO(plain))))
    for channels in (None, 1, 3):
        assert torch.equal(decode_image(data, channels), decode_image(plain, channels))
    transform, rng = TrainTransform((16, 16)), np.random.default_rng(0)
    for _ in range(30):
        uniforms = rng.random(transform.num_uniforms).tolist()
        good, found = (transform.load(file, uniforms, channels=3) for file in (plain, data))
        assert torch.equal(good, found)
    assert prepare_picture(data, PictureOptions(verify="decode")) == (data, "jpg")


def pixels_from(data: bytes, part: float) -> int:
    """A place in the compressed pixels."""
    begin = scan_end(data)
    return begin + int((len(data) - begin) * part)


MISSING = {
    "cut": lambda data: data[: pixels_from(data, 0.7)],
    "cut, with an end": lambda data: data[: pixels_from(data, 0.7)] + b"\xff\xd9",
    "cut, filled, with an end": lambda data: data[: pixels_from(data, 0.7)] + bytes(500) + b"\xff\xd9",
    "cut within the end": lambda data: data[:-1],
    "without the end": lambda data: data[:-2],
    "without the end and some pixels": lambda data: data[:-4],
    "bytes replaced above": lambda data: changed(data, pixels_from(data, 0.2), b"\xff\x00\x13\xff\x55\x77"),
    "bytes replaced below": lambda data: changed(data, pixels_from(data, 0.9), b"\xff\x00\x13\xff\x55\x77"),
    "bytes added below": lambda data: data[: pixels_from(data, 0.8)] + b"\x55" * 200 + data[pixels_from(data, 0.8) :],
    "rest of the pixels twice": lambda data: data[:-2] + data[pixels_from(data, 0.9) :],
}
"""Faults of the pixels; Pillow overlooks most of them."""


@pytest.mark.parametrize("scan_header", [False, True])
@pytest.mark.parametrize("fault", MISSING)
def test_damage_is_damage_whatever_the_crop(fault: str, scan_header: bool) -> None:
    """Also behind a harmless fault, which is all that libjpeg reports of such a file."""
    data = MISSING[fault](encode(picture(160, 120)))
    if scan_header:
        data = HARMLESS["scan header 0, 0, 0"](data)
    with pytest.raises(DecodeError, match="damaged JPEG of 160 x 120"):
        decode_image(data, 3)
    transform, rng = TrainTransform((16, 16)), np.random.default_rng(0)
    for _ in range(60):
        with pytest.raises(DecodeError, match="damaged JPEG of 160 x 120"):
            transform.load(data, rng.random(transform.num_uniforms).tolist(), channels=3)
    with pytest.raises(UnreadableFile, match="damaged JPEG of 160 x 120"):
        prepare_picture(data, PictureOptions(verify="decode"))


def test_damage_of_cmyk_is_seen_and_harmless_faults_are_not() -> None:
    """PIL, which reads CMYK, fills what is missing with grey."""
    plain = encode(picture(160, 120), "CMYK")
    for fault in MISSING.values():
        with pytest.raises(DecodeError, match=r"damaged JPEG of 160 x 120|truncated"):
            decode_image(fault(plain), 3)
        with pytest.raises(UnreadableFile):
            prepare_picture(fault(plain), PictureOptions(short_side=20))
    for name in ("scan header 0, 0, 0", "64 zeros", "a trailer"):
        assert torch.equal(decode_image(HARMLESS[name](plain), 3), decode_image(plain, 3))


def test_every_cut_is_an_error() -> None:
    data = encode(picture(160, 120))
    header = header_of(data)
    for length in range(len(data) - 1, 700, -211):
        with pytest.raises(DecodeError, match="damaged JPEG of 160 x 120"):
            decode(data[:length], header, 3)


def test_repairs_of_hostile_files_end() -> None:
    """Segments of no length, and ones that pass the end."""
    data = encode(picture(96, 80))
    for broken in (
        data[:2] + b"\xff\xe0\x00\x00" * 50 + data[2:],
        data[:2] + b"\xff\xfe\xff\xff" + data[2:],
        data[:30],
    ):
        for warning in ("Invalid SOS parameters for sequential JPEG", "9 extraneous bytes before marker 0xd9"):
            assert repaired(broken, warning) is None
    assert repaired(data, "Corrupt JPEG data: bad Huffman code") is None
    assert repaired(data, "Corrupt JPEG data: 9 extraneous bytes before marker 0xd9") is None
