"""From the bytes of one picture to a tensor, without trusting the bytes.

Enters: an encoded picture (told by its first bytes, never by its name). Leaves: uint8 or uint16 [C, H, W], a view of
[H, W, C] memory, which is the layout that resizes fastest. Why it exists: decoding is most of the CPU time of loading
(JPEG: simplejpeg), and the place where a hostile file would strike.

Policies. EXIF orientation is ignored, in every format, as the usual recipes do (`Image.open(f).convert("RGB")` and
torchvision's decode_jpeg): pictures are as they are stored. Alpha is dropped, not blended, unless four channels are
asked for; then a picture without alpha is opaque (of 16-bit PNGs, a transparent colour is no alpha). Palettes become
RGB. CMYK goes through PIL. JPEG to grey takes the luma plane. 16 bits per channel stay uint16, in PNG, TIFF and `.npy`.
TIFF and `.npy` may have any number of channels; what a TIFF does not call alpha is a channel. Of animations and
multi-page files the first picture counts.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile
from torch import Tensor

from data_pipes.decode import jpeg, tiff
from data_pipes.decode.limits import DEFAULT_MAX_PIXELS, Pixels, check_pixels
from data_pipes.errors import DecodeError, SampleError

__all__ = ["DEFAULT_MAX_PIXELS", "DecodeError", "Pixels", "SampleError", "decode_image"]

NUMPY_MAGIC = b"\x93NUMPY"
"""The first bytes of an array in numpy's own format."""
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
"""The first bytes of a PNG."""
_PNG_RGB, _PNG_GREY_ALPHA, _PNG_RGBA = 2, 4, 6
"""PNG's colour types."""
_REFUSED_FORMATS = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}
"""EPS starts Ghostscript and WMF the system's renderer; the others are stubs without a decoder."""


def decode_image(data: bytes, channels: int | None, max_pixels: int = DEFAULT_MAX_PIXELS) -> Tensor:
    """Decodes one picture.

    Args:
        data: the encoded picture.
        channels: of the result; None keeps 1 or 3 (or N of a TIFF or an array).
        max_pixels: height * width, checked in the header before anything is decoded.
    Returns:
        uint8 or uint16 [C, H, W], a view of [H, W, C] memory.
    Raises:
        DecodeError: "pixels" (too many), "channels" (no conversion), or "decode" (truncated, corrupt, unknown).
        ImportError: the picture is a TIFF, and what reads it is not installed.
    """
    if data.startswith(jpeg.JPEG_MAGIC):
        pixels = _decode_jpeg(data, channels, max_pixels)
    elif data.startswith(NUMPY_MAGIC):
        pixels = _decode_numpy(data, max_pixels)
    elif data.startswith(PNG_MAGIC) and data[24:25] == b"\x10" and data[25] in (_PNG_RGB, _PNG_GREY_ALPHA, _PNG_RGBA):
        pixels = _decode_png16(data, channels, max_pixels)
    elif data.startswith(tiff.MAGICS) and (found := tiff.decode_tiff(data, max_pixels)) is not None:
        pixels = _settle_alpha(*found, channels)
    else:
        pixels = _decode_pil(data, channels, max_pixels)
    return torch.from_numpy(_convert_channels(pixels, channels)).permute(2, 0, 1)


def _decode_jpeg(data: bytes, channels: int | None, max_pixels: int) -> Pixels:
    header = jpeg.read_header(data)
    if header is None:
        return _decode_pil(data, channels, max_pixels)
    check_pixels(header.height, header.width, max_pixels)
    grey = channels == 1 or (channels is None and header.grey)
    return jpeg.decode(data, header, 1 if grey else 3)


def _decode_pil(data: bytes, channels: int | None, max_pixels: int) -> Pixels:
    return _open_pil(data, max_pixels, lambda picture: _pil_pixels(picture, channels))


def _open_pil(data: bytes, max_pixels: int, read: Callable[[Image.Image], Pixels]) -> Pixels:
    """What `read` makes of the open picture.

    Raises:
        DecodeError: any failure of PIL.
    """
    try:
        with Image.open(io.BytesIO(data), formats=pil_formats()) as picture:
            check_pixels(picture.height, picture.width, max_pixels)
            return read(picture)
    except (DecodeError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DecodeError("pixels", f"picture bomb: {error}") from error
    except Exception as error:  # PIL's parsers raise nearly anything on damaged input
        raise DecodeError(
            "decode", f"not a readable picture ({len(data):,} bytes): {type(error).__name__}: {error}"
        ) from error


@lru_cache(maxsize=1)
def pil_formats() -> tuple[str, ...]:
    """The formats that PIL may open."""
    Image.init()
    return tuple(name for name in Image.ID if name not in _REFUSED_FORMATS)


def _pil_pixels(picture: Image.Image, channels: int | None) -> Pixels:
    if picture.format == "TIFF":  # the only format that PIL would rotate, by a tag or by its XMP
        picture.getexif()[ExifTags.Base.Orientation] = 1
    if picture.mode.startswith("I"):
        values = np.array(picture)
        if values.min() < 0 or values.max() > 65535:
            raise DecodeError("decode", f"{picture.mode} picture with values beyond 16 bits")
        return _settle_alpha(values.astype(np.uint16)[..., None], False, channels)
    if picture.mode == "F":
        raise DecodeError("decode", "32-bit float picture; expected 8 or 16 bits per channel")
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    grey = channels == 1 or (channels is None and picture.mode in ("1", "L", "LA"))
    target = "L" if grey else "RGBA" if channels == 4 else "RGB"
    pixels = np.array(picture if picture.mode == target else picture.convert(target))
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _decode_png16(data: bytes, channels: int | None, max_pixels: int) -> Pixels:
    """Colour or alpha in 16 bits, which PIL cuts to 8: PIL decodes it twice, and keeps one byte of each value a time.

    The other decoder at hand, torchvision's, ends the process on some damaged files (a segmentation fault in 0.29).
    """
    if data[25] == _PNG_GREY_ALPHA:  # the same four bytes per pixel as RGBA of 8 bits, so only the header changes
        header = data[12:24] + b"\x08\x06" + data[26:29]
        data = data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:]
        quads = _open_pil(data, max_pixels, np.array)
        return _settle_alpha(quads.view(">u2").astype(np.uint16), True, channels)
    mode = "RGB" if data[25] == _PNG_RGB else "RGBA"
    high = _open_pil(data, max_pixels, lambda picture: _as_raw_mode(picture, f"{mode};16B"))
    low = _open_pil(data, max_pixels, lambda picture: _as_raw_mode(picture, f"{mode};16L"))
    return _settle_alpha(high.astype(np.uint16) << np.uint16(8) | low, mode == "RGBA", channels)


def _as_raw_mode(picture: Image.Image, raw_mode: str) -> Pixels:
    """The pixels as if the file had another byte order: PIL takes the more significant byte of each value."""
    assert isinstance(picture, ImageFile.ImageFile)
    picture.tile = [tile._replace(args=raw_mode) for tile in picture.tile]
    return np.array(picture)


def numpy_header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """The shape and type of an array in numpy's own format; the file is read up to the array's first byte.

    Raises:
        Exception: the header is damaged; its text is a Python literal, so its parser raises nearly anything.
    """
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)
    return shape, dtype


def _decode_numpy(data: bytes, max_pixels: int) -> Pixels:
    file = io.BytesIO(data)
    try:
        shape, dtype = numpy_header(file)
        native = dtype.newbyteorder("=")
        if native not in (np.dtype(np.uint8), np.dtype(np.uint16)) or len(shape) not in (2, 3) or 0 in shape[2:]:
            raise ValueError(f"{dtype} {shape}, expected uint8 or uint16 of shape [H, W] or [H, W, C]")
        check_pixels(shape[0], shape[1], max_pixels)
        if len(data) - file.tell() != dtype.itemsize * int(np.prod(shape, dtype=object)):
            raise ValueError(f"{len(data) - file.tell():,} bytes of data for an array {shape} of {dtype}")
        file.seek(0)
        pixels: NDArray[Any] = np.load(file, allow_pickle=False).astype(native, copy=False)
    except DecodeError:
        raise
    except Exception as error:  # the header is a Python literal: its parser raises nearly anything
        raise DecodeError("decode", f"not a readable .npy picture: {type(error).__name__}: {error}") from error
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _settle_alpha(pixels: Pixels, has_alpha: bool, channels: int | None) -> Pixels:
    """One policy for grey and RGB with and without alpha.

    Args:
        pixels: [H, W, C].
        has_alpha: whether the last channel is alpha.
        channels: that are asked for; None: what the picture has.
    Returns:
        The pixels without alpha; RGBA where four channels are asked for of a grey or RGB picture.
    """
    colours = pixels[..., :-1] if has_alpha else pixels
    if channels != 4 or colours.shape[2] not in (1, 3):
        return np.ascontiguousarray(colours)
    alpha = pixels[..., -1:] if has_alpha else np.full_like(pixels[..., :1], np.iinfo(pixels.dtype).max)
    return np.concatenate([np.broadcast_to(colours, (*colours.shape[:2], 3)), alpha], axis=2)


def _convert_channels(pixels: Pixels, channels: int | None) -> Pixels:
    """[H, W, found] -> [H, W, channels].

    Raises:
        DecodeError: "channels", when there is no such conversion.
    """
    found = pixels.shape[2]
    if channels in (None, found):
        return pixels
    if found == 1 and channels == 3:
        return np.repeat(pixels, 3, axis=2)
    if found == 3 and channels == 1:  # PIL's weights of ITU-R 601, in 16-bit fixed point
        weighted = pixels.astype(np.uint64) @ np.array([19595, 38470, 7471], np.uint64)
        return ((weighted + np.uint64(0x8000)) >> np.uint64(16)).astype(pixels.dtype)[..., None]
    raise DecodeError("channels", f"the picture has {found} channels, the model takes {channels}")
