"""Pictures that Pillow reads, and those of 16 bits per channel that it would cut to 8.

Enters: the bytes of a file. Leaves: what a caller makes of the open picture, or its pixels. Why it exists: Pillow reads
most formats, but raises nearly anything on damaged input, refuses whole pictures for a fault in a part that is not
needed, turns some and cuts others to 8 bits without a word.
"""

from __future__ import annotations

import io
import threading
import zlib
from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from data_pipes.decode.formats import refuse_unread
from data_pipes.decode.limits import Pixels, check_pixels
from data_pipes.decode.stored import Stored, settle_alpha
from data_pipes.errors import DecodeError

Result = TypeVar("Result")
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
"""The first bytes of a PNG."""
_PNG_RGB, _PNG_GREY_ALPHA = 2, 4
"""PNG's colour types."""
FLOAT_PICTURE = "32-bit float picture; expected 8 or 16 bits per channel"
"""What is said of Pillow's mode F."""
_REFUSED_FORMATS = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}
"""EPS starts Ghostscript and WMF the system's renderer; the others are stubs without a decoder."""
_registering = threading.Lock()
_J2K_SIZES = b"\xff\x4f\xff\x51"
"""JPEG 2000: the start of the codestream, and of the segment with the sizes."""


def open_picture(data: bytes, max_pixels: int, read: Callable[[Image.Image], Result]) -> Result:
    """What `read` makes of the open picture, which is not turned by any tag.

    Args:
        data: the file.
        max_pixels: height * width, checked in the header.
        read: gets the picture.
    Raises:
        DecodeError: any failure of Pillow; "pixels" above max_pixels; a format that is not read, or that Pillow would
            cut to 8 bits.
    """
    refuse_unread(data)
    try:
        return _open(data, max_pixels, read)
    except DecodeError as error:
        needed = _needed_of_png(data) if error.cause == "decode" and data.startswith(PNG_MAGIC) else data
        if needed == data:
            raise
        return _open(needed, max_pixels, read)  # a text or a profile may be damaged or huge, and the pixels intact


def _open(data: bytes, max_pixels: int, read: Callable[[Image.Image], Result]) -> Result:
    try:
        with Image.open(io.BytesIO(data), formats=pil_formats()) as picture:
            check_pixels(picture.height, picture.width, max_pixels)
            if picture.mode in ("L", "LA", "RGB", "RGBA"):
                _refuse_to_cut(picture, data)
            if picture.format == "TIFF":  # the only format that Pillow would turn, by a tag or by its XMP
                picture.getexif()[ExifTags.Base.Orientation] = 1
            return read(picture)
    except (DecodeError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DecodeError("pixels", f"picture bomb: {error}") from error
    except UnidentifiedImageError as error:
        found = f"{len(data):,} bytes that begin with {data[:12]!r}" if data else "a file of 0 bytes"
        raise DecodeError("decode", f"{found}: not a picture of a format that is read") from error
    except Exception as error:  # Pillow's parsers raise nearly anything on damaged input
        raise DecodeError(
            "decode", f"not a readable picture ({len(data):,} bytes): {type(error).__name__}: {error}"
        ) from error


def _needed_of_png(data: bytes) -> bytes:
    """The same PNG without the chunks that its pixels do not need, as far as these can be followed."""
    parts, start = [data[: len(PNG_MAGIC)]], len(PNG_MAGIC)
    while start + 8 <= len(data):
        name, end = data[start + 4 : start + 8], start + 12 + int.from_bytes(data[start : start + 4], "big")
        if is_needed_chunk(name):
            parts.append(data[start:end])
        start = end
    return b"".join(parts)


def is_needed_chunk(name: bytes) -> bool:
    """Whether the pixels of a PNG depend on the chunks of that name."""
    return name[:1].isupper() or name == b"tRNS"


@lru_cache(maxsize=1)
def pil_formats() -> tuple[str, ...]:
    """The formats that Pillow may open; threads that ask first wait until all of them are registered."""
    with _registering:
        Image.init()
    return tuple(name for name in Image.ID if name not in _REFUSED_FORMATS)


def _refuse_to_cut(picture: Image.Image, data: bytes) -> None:
    """Refuses what has 16 bits per channel and would come out with 8.

    Raises:
        DecodeError: the message has the format's name.
    """
    bits = 8
    if picture.format == "SGI":
        bits = 8 * data[3]
    elif picture.format == "JPEG2000":
        sizes = data.find(_J2K_SIZES)
        num_components = int.from_bytes(data[sizes + 40 : sizes + 42], "big")
        bits = max(((size & 127) + 1 for size in data[sizes + 42 : sizes + 42 + 3 * num_components : 3]), default=8)
    if bits > 8:
        raise DecodeError(
            "decode",
            f"{picture.format} picture of {bits} bits per channel in the mode {picture.mode}, of which 8 would be "
            "lost; convert it to PNG or TIFF",
        )


def pixels_of(picture: Image.Image, channels: int | None) -> Pixels:
    """The pixels [H, W, C] of an open picture.

    Args:
        picture: see `open_picture`.
        channels: that are asked for; None: 1 or 3, as the picture has.
    Raises:
        DecodeError: 32 bits per channel.
    """
    if picture.mode.startswith("I"):
        return settle_alpha(Stored(deep_grey(picture)[..., None]), channels)
    if picture.mode == "F":
        raise DecodeError("decode", FLOAT_PICTURE)
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    grey = channels == 1 or (channels is None and picture.mode in ("1", "L", "LA"))
    target = "L" if grey else "RGBA" if channels == 4 else "RGB"
    pixels = np.array(picture if picture.mode == target else picture.convert(target))
    return pixels if pixels.ndim == 3 else pixels[..., None]


def deep_grey(picture: Image.Image) -> Pixels:
    """uint16 [H, W] of a picture in one of Pillow's modes of integers.

    Raises:
        DecodeError: a value does not fit into 16 bits.
    """
    values = np.array(picture)
    if values.min() < 0 or values.max() > 65535:
        raise DecodeError("decode", f"{picture.mode} picture with values beyond 16 bits")
    return values.astype(np.uint16)


def is_deep_png(data: bytes) -> bool:
    """Whether it is a PNG of 16 bits in colour or with alpha, which Pillow cuts to 8."""
    kind = data[25:26]
    return data.startswith(PNG_MAGIC) and data[24:25] == b"\x10" and kind in (b"\x02", b"\x04", b"\x06")


def decode_deep_png(data: bytes, max_pixels: int) -> Stored:
    """Colour or alpha in 16 bits: Pillow decodes it twice, and keeps one byte of each value a time.

    The other decoder at hand, torchvision's, ends the process on some damaged files (a segmentation fault in 0.29).

    Args:
        data: see `is_deep_png`.
        max_pixels: height * width, checked in the header.
    Raises:
        DecodeError: see `open_picture`.
    """
    if data[25] == _PNG_GREY_ALPHA:  # the same four bytes per pixel as RGBA of 8 bits, so only the header changes
        header = data[12:24] + b"\x08\x06" + data[26:29]
        data = data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:]
        quads = open_picture(data, max_pixels, np.array)
        return Stored(quads.view(">u2").astype(np.uint16), True)
    mode = "RGB" if data[25] == _PNG_RGB else "RGBA"
    high = open_picture(data, max_pixels, lambda picture: _as_raw_mode(picture, f"{mode};16B"))
    low = open_picture(data, max_pixels, lambda picture: _as_raw_mode(picture, f"{mode};16L"))
    return Stored(high.astype(np.uint16) << np.uint16(8) | low, mode == "RGBA", True)


def _as_raw_mode(picture: Image.Image, raw_mode: str) -> Pixels:
    """The pixels as if the file had another byte order: Pillow takes the more significant byte of each value."""
    assert isinstance(picture, ImageFile.ImageFile)
    picture.tile = [tile._replace(args=raw_mode) for tile in picture.tile]
    return np.array(picture)


def decode_deep_pnm(data: bytes, max_pixels: int) -> Stored | None:
    """A PPM of more than 8 bits per channel, read as a PGM three times as wide, of which Pillow keeps 16 bits.

    Args:
        data: a file that begins with P3 or P6.
        max_pixels: height * width, checked in the header.
    Returns:
        The values, stretched to 16 bits; None for a picture of 8 bits.
    Raises:
        DecodeError: see `open_picture`.
    """

    def as_grey(picture: Image.Image) -> tuple[bytes, tuple[int, int]] | None:
        assert isinstance(picture, ImageFile.ImageFile)
        tile = picture.tile[0]
        largest = tile.args[1] if isinstance(tile.args, tuple) else 255
        if picture.format != "PPM" or largest <= 255:
            return None
        kind = b"P2" if data.startswith(b"P3") else b"P5"
        header = kind + b" %d %d %d\n" % (3 * picture.width, picture.height, largest)
        return header + data[tile.offset :], picture.size

    grey = open_picture(data, max_pixels, as_grey)
    if grey is None:
        return None
    values = open_picture(grey[0], 3 * max_pixels, deep_grey)
    return Stored(values.reshape(grey[1][1], grey[1][0], 3), is_rgb=True)
