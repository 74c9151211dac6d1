"""From the bytes of one picture to a tensor, without trusting the bytes.

Enters: an encoded picture (told by its first bytes, never by its name). Leaves: uint8 or uint16 [C, H, W], a view of
[H, W, C] memory, which is the layout that resizes fastest. Why it exists: decoding is most of the CPU time of loading
(JPEG: simplejpeg), and the place where a hostile file would strike.

Policies. EXIF orientation is ignored, in every format, as the usual recipes do (`Image.open(f).convert("RGB")` and
torchvision's decode_jpeg): pictures are as they are stored. Alpha is dropped, not blended, unless four channels are
asked for. Palettes become RGB. CMYK goes through PIL. JPEG to grey takes the luma plane. 16-bit grey PNG and TIFF stay
uint16. PIL has no 16-bit colour: store such pictures, and any with other than 1, 3 or 4 channels, as `.npy` of shape
[H, W] or [H, W, C]. Of animations and multi-page files the first picture counts.
"""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Pixels = NDArray[Any]
# uint8 or uint16 [H, W, C]

DEFAULT_MAX_PIXELS = 89_478_485
"""As PIL: 256 MB of RGB. PIL itself refuses twice as many, which is the largest limit that has an effect."""

_JPEG, _NUMPY = b"\xff\xd8\xff", b"\x93NUMPY"
# EPS starts Ghostscript and WMF the system's renderer; the others are stubs without a decoder.
_REFUSED_FORMATS = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}


class SampleError(ValueError):
    """One sample is unusable. `cause` is a short name to count by; the message says what was found."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(cause, message)
        self.cause, self.message = cause, message

    def __str__(self) -> str:
        return self.message


class DecodeError(SampleError):
    """One picture is unusable."""


def decode_image(data: bytes, channels: int | None, max_pixels: int = DEFAULT_MAX_PIXELS) -> Tensor:
    """Decodes one picture to uint8 or uint16 [C, H, W].

    channels: of the result; None keeps 1 or 3 (or N of an array). max_pixels: height * width, checked in the header
    before anything is decoded. Raises DecodeError: cause "pixels" (too many), "channels" (no conversion), or "decode"
    (truncated, corrupt, unknown).
    """
    if data.startswith(_JPEG):
        pixels = _decode_jpeg(data, channels, max_pixels)
    elif data.startswith(_NUMPY):
        pixels = _decode_numpy(data, max_pixels)
    else:
        pixels = _decode_pil(data, channels, max_pixels)
    return torch.from_numpy(_convert_channels(pixels, channels)).permute(2, 0, 1)


def _check_pixels(height: int, width: int, max_pixels: int) -> None:
    if height < 1 or width < 1:
        raise DecodeError("decode", f"the picture is empty: {height} x {width} pixels")
    if height * width > max_pixels:
        raise DecodeError(
            "pixels",
            f"the header declares {height} x {width} = {height * width:,} pixels, more than max_pixels = "
            f"{max_pixels:,}; raise data.max_pixels if such pictures are wanted",
        )


def _decode_jpeg(data: bytes, channels: int | None, max_pixels: int) -> Pixels:
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:  # truncated, or a rare chroma subsampling that PIL knows
        return _decode_pil(data, channels, max_pixels)
    _check_pixels(height, width, max_pixels)
    if colours in ("CMYK", "YCCK"):
        return _decode_pil(data, channels, max_pixels)
    grey = channels == 1 or (channels is None and colours == "Gray")
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "GRAY" if grey else "RGB")
    except ValueError as error:
        raise DecodeError("decode", f"damaged JPEG of {height} x {width} pixels: {error}") from error
    return pixels


def _decode_pil(data: bytes, channels: int | None, max_pixels: int) -> Pixels:
    try:
        with Image.open(io.BytesIO(data), formats=_pil_formats()) as picture:
            _check_pixels(picture.height, picture.width, max_pixels)
            return _pil_pixels(picture, channels)
    except (DecodeError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DecodeError("pixels", f"picture bomb: {error}") from error
    except Exception as error:  # PIL's parsers raise nearly anything on damaged input
        raise DecodeError(
            "decode", f"not a readable picture ({len(data):,} bytes): {type(error).__name__}: {error}"
        ) from error


@lru_cache(maxsize=1)
def _pil_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in Image.ID if name not in _REFUSED_FORMATS)


def _pil_pixels(picture: Image.Image, channels: int | None) -> Pixels:
    if picture.mode.startswith("I"):
        values = np.array(picture)
        if values.min() < 0 or values.max() > 65535:
            raise DecodeError("decode", f"{picture.mode} picture with values beyond 16 bits")
        return values.astype(np.uint16)[..., None]
    if picture.mode == "F":
        raise DecodeError("decode", "32-bit float picture; expected 8 or 16 bits per channel")
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    grey = channels == 1 or (channels is None and picture.mode in ("1", "L", "LA"))
    target = "L" if grey else "RGBA" if channels == 4 else "RGB"
    pixels = np.array(picture if picture.mode == target else picture.convert(target))
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _decode_numpy(data: bytes, max_pixels: int) -> Pixels:
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
        if dtype not in (np.dtype(np.uint8), np.dtype(np.uint16)) or len(shape) not in (2, 3):
            raise ValueError(f"{dtype} {shape}, expected uint8 or uint16 of shape [H, W] or [H, W, C]")
        _check_pixels(shape[0], shape[1], max_pixels)
        if len(data) - file.tell() != dtype.itemsize * int(np.prod(shape, dtype=object)):
            raise ValueError(f"{len(data) - file.tell():,} bytes of data for an array {shape} of {dtype}")
        file.seek(0)
        pixels: NDArray[Any] = np.load(file, allow_pickle=False)
    except DecodeError:
        raise
    except (ValueError, EOFError) as error:
        raise DecodeError("decode", f"not a readable .npy picture: {error}") from error
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _convert_channels(pixels: Pixels, channels: int | None) -> Pixels:
    """[H, W, found] -> [H, W, channels]."""
    found = pixels.shape[2]
    if channels in (None, found):
        return pixels
    if found == 1 and channels == 3:
        return np.repeat(pixels, 3, axis=2)
    if found == 3 and channels == 1:  # PIL's weights of ITU-R 601, in 16-bit fixed point
        weighted = pixels.astype(np.uint64) @ np.array([19595, 38470, 7471], np.uint64)
        return ((weighted + np.uint64(0x8000)) >> np.uint64(16)).astype(pixels.dtype)[..., None]
    raise DecodeError("channels", f"the picture has {found} channels, the model takes {channels}")
