"""Decoding against PIL and by the formats' own words, and hostile or damaged pictures. TIFF: see test_tiff."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipes.decode.picture import decode_image
from data_pipes.errors import DecodeError
from data_pipes.pack.reencode_picture import PictureOptions, prepare_picture
from tests.data_pipes.decode.picture_files import (
    GREY,
    GREY_ALPHA,
    PALETTE,
    RGB,
    RGBA,
    as_numpy,
    chunk,
    encode,
    noise,
    png,
)
from tests.data_pipes.tiny_shards import jpeg_header, png_header

RAMP = (np.indices((40, 56)).sum(0) * 2).astype(np.uint8)
COLOUR = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=2)


def with_pil(data: bytes, mode: str = "RGB") -> torch.Tensor:
    pixels = np.array(Image.open(io.BytesIO(data)).convert(mode))
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}])
def test_jpeg_equals_pil(options: dict[str, object]) -> None:
    data = encode(COLOUR, "JPEG", **options)
    assert torch.equal(decode_image(data, 3), with_pil(data))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM"])
def test_other_formats_equal_pil(kind: str) -> None:
    data = encode(COLOUR, kind)
    image = decode_image(data, 3)
    assert torch.equal(image, with_pil(data))
    assert image.stride() == (1, 56 * 3, 3)  # a view of [H, W, C] memory: resizes fastest


def test_photographs_equal_pil(shared_data: Path) -> None:
    with ZipFile(shared_data / "photos_300.zip") as photos:
        for name in photos.namelist()[:12]:
            data = photos.read(name)
            assert torch.equal(decode_image(data, 3), with_pil(data))


def test_channels() -> None:
    grey_jpeg, grey_png, colour_png = encode(RAMP, "JPEG"), encode(RAMP, "PNG"), encode(COLOUR, "PNG")
    assert decode_image(grey_jpeg, None).shape == decode_image(grey_png, None).shape == (1, 40, 56)
    assert decode_image(colour_png, None).shape == (3, 40, 56)
    assert torch.equal(decode_image(grey_png, 3), torch.from_numpy(RAMP).expand(3, -1, -1))
    assert torch.equal(decode_image(grey_jpeg, 3), decode_image(grey_jpeg, 1).expand(3, -1, -1))
    assert torch.equal(decode_image(colour_png, 1), with_pil(colour_png, "L"))
    difference = decode_image(encode(COLOUR, "JPEG"), 1).int() - with_pil(encode(COLOUR, "JPEG"), "L").int()
    assert difference.abs().max() <= 2  # the luma plane itself, against luma of rounded colours
    assert decode_image(colour_png, 4).shape == (4, 40, 56)
    for data, channels in ((colour_png, 2), (as_numpy(COLOUR), 5), (grey_jpeg, 7)):
        with pytest.raises(DecodeError, match=f"channels, the model takes {channels}") as caught:
            decode_image(data, channels)
        assert caught.value.cause == "channels"


def test_palette_alpha_and_cmyk() -> None:
    alpha = np.dstack([COLOUR, np.zeros_like(RAMP)])
    assert torch.equal(decode_image(encode(alpha, "PNG"), 3), torch.from_numpy(COLOUR).permute(2, 0, 1))  # dropped
    assert torch.equal(decode_image(encode(alpha, "PNG"), 4), torch.from_numpy(alpha).permute(2, 0, 1))
    palette = encode(COLOUR, "PNG", mode="P")
    assert torch.equal(decode_image(palette, None), with_pil(palette))
    transparent = io.BytesIO()
    Image.fromarray(COLOUR).convert("P").save(transparent, "PNG", transparency=bytes(range(256)))
    assert torch.equal(decode_image(transparent.getvalue(), 3), with_pil(palette))
    cmyk = encode(COLOUR, "JPEG", mode="CMYK")
    assert torch.equal(decode_image(cmyk, 3), with_pil(cmyk))
    assert decode_image(encode(RAMP > 50, "PNG"), None).unique().tolist() == [0, 255]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_stays(kind: str) -> None:
    values = (RAMP.astype(np.uint16) * 300) + 7
    image = decode_image(encode(values, kind), 1)
    assert image.dtype == torch.uint16
    assert np.array_equal(image[0].numpy(), values)
    assert decode_image(encode(values, kind), 3).shape == (3, 40, 56)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3), (5, 7, 12)])
def test_numpy_arrays(dtype: type, shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    for layout in (array, np.asfortranarray(array)):
        image = decode_image(as_numpy(layout), None)
        assert np.array_equal(image.permute(1, 2, 0).numpy(), array.reshape(5, 7, -1))
    assert decode_image(as_numpy(np.full((4, 4, 3), 1000, np.uint16)), 1).unique().tolist() == [1000]
    swapped = array.astype(np.dtype(dtype).newbyteorder(">"))
    assert np.array_equal(decode_image(as_numpy(swapped), None).permute(1, 2, 0).numpy(), array.reshape(5, 7, -1))


def test_exif_orientation_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to display
    for kind in ("JPEG", "PNG"):
        turned, plain = encode(COLOUR, kind, exif=exif), encode(COLOUR, kind)
        assert turned != plain
        assert torch.equal(decode_image(turned, 3), decode_image(plain, 3))


def pixels_of(data: bytes, channels: int | None) -> np.ndarray:
    return decode_image(data, channels).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_png_grey_of_every_depth(depth: int) -> None:
    values = noise(1, depth)
    scale = 1 if depth >= 8 else 255 // (2**depth - 1)
    found = pixels_of(png(values, GREY, depth), None)
    assert found.dtype == values.dtype
    assert np.array_equal(found, values * scale)


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_png_palettes_of_every_depth(depth: int) -> None:
    values, palette = noise(1, depth), noise(3, 8, 1, 256)[0, : 2**depth]
    data = png(values, PALETTE, depth, chunk(b"PLTE", palette.tobytes()))
    assert np.array_equal(pixels_of(data, None), palette[values[..., 0]])


@pytest.mark.parametrize("depth", [8, 16])
def test_png_colour_and_alpha(depth: int) -> None:
    """16 bits stay 16, in the order of bytes that PNG has; alpha goes, or comes where four channels are asked for."""
    full = 2**depth - 1
    grey, rgb, grey_alpha, rgba = (noise(channels, depth) for channels in (1, 3, 2, 4))
    cases = [
        (png(rgb, RGB, depth), rgb, np.dstack([rgb, np.full_like(grey, full)])),
        (png(rgba, RGBA, depth), rgba[..., :3], rgba),
        (png(grey_alpha, GREY_ALPHA, depth), grey_alpha[..., :1], grey_alpha[..., [0, 0, 0, 1]]),
        (png(grey, GREY, depth), grey, np.dstack([grey, grey, grey, np.full_like(grey, full)])),
    ]
    for data, plain, with_alpha in cases:
        assert pixels_of(data, None).dtype == plain.dtype
        assert np.array_equal(pixels_of(data, None), plain)
        assert np.array_equal(pixels_of(data, 3), np.broadcast_to(plain, (*plain.shape[:2], 3)))
        assert np.array_equal(pixels_of(data, 4), with_alpha)
        assert pixels_of(data, 1).shape == (23, 31, 1)
        with pytest.raises(DecodeError, match="the model takes 2"):
            decode_image(data, 2)


def test_png_of_16_bits_ignores_gamma_and_is_bounded() -> None:
    values = noise(3, 16)
    gamma, colour_key = chunk(b"gAMA", struct.pack(">I", 9000)), chunk(b"tRNS", values[0, 0].astype(">u2").tobytes())
    assert np.array_equal(pixels_of(png(values, RGB, 16, gamma + colour_key), None), values)
    for kind, channels in ((RGB, 3), (GREY_ALPHA, 2)):
        bomb = bytearray(png(noise(channels, 16), kind, 16))
        bomb[16:24] = struct.pack(">II", 60_000, 60_000)
        bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
        with pytest.raises(DecodeError, match=r"60000 x 60000|bomb") as caught:
            decode_image(bytes(bomb), 3)
        assert caught.value.cause == "pixels"


def numpy_header(shape: tuple[int, ...], dtype: type = np.uint8) -> bytes:
    data = as_numpy(np.zeros((1, 1, 1), dtype))
    old = b"(1, 1, 1), }"
    new = (str(shape) + ", }").encode()
    return data.replace(old + b" " * (len(new) - len(old)), new)


@pytest.mark.parametrize(
    "bomb",
    [
        png_header(60_000, 60_000),
        jpeg_header(60_000, 60_000),
        png_header(9_000, 10_000),
        jpeg_header(60, 60),
        png_header(60, 60),
    ],
)
def test_picture_bombs(bomb: bytes) -> None:
    with pytest.raises(DecodeError, match=r"pixels|bomb") as caught:
        decode_image(bomb, 3, max_pixels=3000)
    assert caught.value.cause == "pixels"


def test_array_bombs() -> None:
    assert b"60000" in numpy_header((60000, 60000, 3))
    with pytest.raises(DecodeError, match="60000 x 60000"):
        decode_image(numpy_header((60000, 60000, 3)), 3)
    with pytest.raises(DecodeError, match="bytes of data for an array"):
        decode_image(numpy_header((1, 1, 10**9)), 3)
    with pytest.raises(DecodeError, match="expected uint8 or uint16"):
        decode_image(as_numpy(np.zeros((2, 2), np.float32)), 1)
    with pytest.raises(DecodeError, match="expected uint8 or uint16"):
        decode_image(as_numpy(np.zeros((2, 2, 0), np.uint8)), None)
    for header in (b"-" * 9000, b"(" * 9000, b"{'a':" * 1500, b"'" * 3, b"\xff", b"{}"):
        with pytest.raises(DecodeError, match=r"not a readable \.npy picture"):
            decode_image(b"\x93NUMPY\x01\0" + len(header).to_bytes(2, "little") + header + bytes(8), None)
    objects = io.BytesIO()
    np.save(objects, np.array([[{}]], dtype=object), allow_pickle=True)
    with pytest.raises(DecodeError, match="expected uint8 or uint16"):
        decode_image(objects.getvalue(), 1)


def test_every_truncation_is_an_error() -> None:
    sixteen = png(noise(3, 16, 40, 56), RGB, 16)
    for data in (encode(COLOUR, "JPEG"), encode(COLOUR, "PNG"), sixteen, as_numpy(COLOUR)):
        end = len(data) - (22 if data.startswith(b"\x89") else 0)  # PNG: checksums and the end chunk may be absent
        for length in [*range(0, 60, 7), *range(60, end, 97), end - 1]:
            with pytest.raises(DecodeError) as caught:
                decode_image(data[:length], 3)
            assert caught.value.cause == "decode"


def test_damage_and_foreign_files() -> None:
    data = bytearray(encode(COLOUR, "JPEG"))
    data[len(data) // 2 :][:8] = b""
    data[len(data) // 2 : len(data) // 2 + 6] = b"\xff\x00\x13\xff\x55\x77"
    for broken in (bytes(data), b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"\x93NUMPY\x07"):
        with pytest.raises(DecodeError):
            decode_image(broken, 3)
    with pytest.raises(DecodeError, match="32-bit float"):
        decode_image(encode(np.zeros((4, 4), np.float32), "TIFF"), 1)
    with pytest.raises(DecodeError, match="beyond 16 bits"):
        decode_image(encode(np.full((4, 4), 70_000, np.int32), "TIFF"), 1)
    with pytest.raises(DecodeError, match="beyond 16 bits"):
        decode_image(encode(np.full((4, 4), -1, np.int32), "TIFF"), 1)


def test_damage_beside_the_pixels_of_a_png_costs_no_pixel() -> None:
    """Texts, profiles and times may be damaged or huge; what the pixels need may not."""
    values = noise(3, 8)
    plain = png(values, RGB, 8)
    wrong = bytearray(chunk(b"tEXt", b"Comment\0hello"))
    wrong[-1] ^= 1
    extras = {
        "wrong checksum": bytes(wrong),
        "2 MiB of text": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2 << 20))),
        "much text": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1 << 20))) * 70,
        "no profile": chunk(b"iCCP", b"x"),
        "no EXIF": chunk(b"eXIf", b"\xff" * 40),
        "no time": chunk(b"tIME", b"\0"),
    }
    for name, extra in extras.items():
        data = png(values, RGB, 8, extra)
        assert np.array_equal(pixels_of(data, 3), values), name
        assert np.array_equal(pixels_of(png(noise(2, 16), GREY_ALPHA, 16, extra), 4)[..., 3], noise(2, 16)[..., 1])
        assert prepare_picture(data, PictureOptions()) == (data, "png")
        small, _ = prepare_picture(data, PictureOptions(short_side=9))
        assert torch.equal(
            decode_image(small, 3), decode_image(prepare_picture(plain, PictureOptions(short_side=9))[0], 3)
        )
    broken = bytearray(plain)
    broken[plain.index(b"IDAT") + 40] ^= 255
    with pytest.raises(DecodeError, match="not a readable picture"):
        decode_image(bytes(broken), 3)


def test_png_cut_anywhere_in_its_header() -> None:
    whole = png(noise(3, 16), RGB, 16)
    for length in range(34):
        with pytest.raises(DecodeError, match=r"not a (readable )?picture"):
            decode_image(whole[:length], 3)
