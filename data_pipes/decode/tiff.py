"""TIFF pictures of any number of channels, 8 or 16 bits each: what PIL would cut to 8 bits or refuse.

Enters: the bytes of a TIFF. Leaves: uint8 or uint16 [H, W, S] of its first page, or None for what PIL reads as well
(palette, CMYK, YCbCr, 1 or 4 bits, a compression that only 8-bit pictures have). Why it exists: satellites, microscopes
and cameras write 16-bit and many-channel TIFFs. tifffile decodes them, with the codecs of imagecodecs (extra `tiff`).

tifffile gets to see one page with the tags that decoding needs (see data_pipes.decode.tiff_tags), and what these
demand is bounded by the size of the file and by max_pixels before anything is decoded. Its codecs write into buffers of
the size of a segment and stop where these end. Source: TIFF revision 6.0; Adobe's TIFF
technical note 3.
Legend: H/W pixels, S samples (values) of a pixel; segments are strips or tiles, of all planes where each channel is
stored on its own.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np

from data_pipes.decode.limits import check_pixels
from data_pipes.decode.stored import Stored
from data_pipes.decode.tiff_tags import with_needed_tags
from data_pipes.errors import DecodeError

_PLAIN, _PACKBITS = 1, 32773
_BYTE_CODECS = (5, 8, 32946, _PACKBITS, 34925, 50000)
"""LZW, Deflate (two numbers), PackBits, LZMA, Zstandard: they know bytes, not pixels."""
_PIL_CODECS = (2, 3, 4, 6, 7)
"""Of fax machines (three), and JPEG (two numbers)."""
_RGB = 2
"""Of PhotometricInterpretation."""
_COLOUR_SPACES = {0: "white is zero", 1: "black is zero", 2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr", 8: "CIELab"}
"""PhotometricInterpretation in words."""
_PREMULTIPLIED, _STRAIGHT = 1, 2
"""Of ExtraSamples: alpha by which the colours are multiplied, or are not."""
_MAX_VALUES_PER_PIXEL = 4
"""A picture has at most so many times max_pixels values: RGBA, or more channels of a smaller picture."""
_MIN_BOUND = 1 << 24
"""Values that are always allowed, as a tile may be larger than its picture."""


def decode_tiff(data: bytes, max_pixels: int) -> Stored | None:
    """The pixels of the first page; of strips or tiles that its writer left out, zeros.

    Args:
        data: a file that begins with one of `MAGICS`.
        max_pixels: height * width, at most.
    Returns:
        [H, W, S]; None where PIL reads it without loss.
    Raises:
        DecodeError: "pixels" above max_pixels, "decode" for a damaged file, and for pictures that neither this module
            nor PIL can read; the message names their compression.
        ImportError: tifffile or imagecodecs is not installed.
    """
    with _first_page(data) as page:
        if not _is_read_here(page, len(data), max_pixels):
            return None
        height, width, samples = page.imagelength, page.imagewidth, page.samplesperpixel
        if any(page.dataoffsets):
            planes = page.asarray(squeeze=False, maxworkers=1)[:, 0]  # [planes, H, W, S / planes]
            pixels = planes.transpose(1, 2, 0, 3).reshape(height, width, samples)
            pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
        else:
            pixels = np.zeros((height, width, samples), np.uint16 if page.bitspersample == 16 else np.uint8)
        if page.photometric == 0:  # white is zero
            pixels[..., 0] = np.iinfo(pixels.dtype).max - pixels[..., 0]
        last = page.extrasamples[-1] if samples > 1 and page.extrasamples else None
        return Stored(pixels, last in (_PREMULTIPLIED, _STRAIGHT), page.photometric == _RGB, last == _PREMULTIPLIED)


def check_tiff(data: bytes, max_pixels: int) -> tuple[int, int, bool]:
    """Checks all that `decode_tiff` checks before it decodes.

    Args:
        data: a file that begins with one of `MAGICS`.
        max_pixels: height * width, at most.
    Returns:
        (height, width, whether `decode_tiff` reads it); else PIL does, without loss.
    Raises:
        DecodeError: see `decode_tiff`.
        ImportError: tifffile or imagecodecs is not installed.
    """
    with _first_page(data) as page:
        return page.imagelength, page.imagewidth, _is_read_here(page, len(data), max_pixels)


def _is_read_here(page: Any, num_bytes: int, max_pixels: int) -> bool:
    """Whether this module reads a page; False where PIL does, without loss.

    Raises:
        DecodeError: see `decode_tiff`.
    """
    check_pixels(page.imagelength, page.imagewidth, max_pixels)
    grey_or_rgb = page.bitspersample in (8, 16) and page.sampleformat in (1, 4) and page.photometric in (0, 1, _RGB)
    if grey_or_rgb and page.compression in (_PLAIN, *_BYTE_CODECS) and page.fillorder == 1:
        _check_segments(page, num_bytes, max_pixels)
        return True
    samples, deep = page.samplesperpixel, np.max(page.bitspersample) > 8
    if samples > 4 or (samples > 1 and deep) or page.compression not in (_PLAIN, *_BYTE_CODECS, *_PIL_CODECS):
        raise DecodeError("decode", _refusal(page))
    return False


def describe(data: bytes) -> tuple[int, int, int, int]:
    """What the header of the first page says.

    Returns:
        (height, width, channels, bits per channel).
    Raises:
        DecodeError: the header is damaged.
        ImportError: tifffile or imagecodecs is not installed.
    """
    with _first_page(data) as page:
        return page.imagelength, page.imagewidth, page.samplesperpixel, int(np.max(page.bitspersample))


@cache
def import_tifffile() -> Any:
    """tifffile, with imagecodecs: alone it would unpack without a limit.

    Raises:
        ImportError: one of both is not installed; the message says what to do.
    """
    try:
        import imagecodecs  # noqa: F401
        import tifffile
    except ImportError as error:
        raise ImportError(
            "reading TIFF needs tifffile and imagecodecs, which are not both installed: "
            "pip install 'tessera-pretrain[tiff]'"
        ) from error
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what is wrong with a file is in its DecodeError
    return tifffile


@contextmanager
def _first_page(data: bytes) -> Iterator[Any]:
    """The page as tifffile sees it; whatever goes wrong with it becomes a DecodeError."""
    tifffile = import_tifffile()
    try:
        with tifffile.TiffFile(io.BytesIO(with_needed_tags(data))) as file:
            page: Any = file.pages[0]
            size = page.imagelength, page.imagewidth, page.samplesperpixel
            if not all(isinstance(number, int) for number in size):
                raise DecodeError("decode", f"damaged TIFF: its height, width and channels are {size}")
            yield page
    except (DecodeError, MemoryError):
        raise
    except Exception as error:  # as with every parser of pictures
        raise DecodeError(
            "decode", f"truncated or damaged TIFF ({len(data):,} bytes): {type(error).__name__}: {error}"
        ) from error


def _check_segments(page: Any, num_bytes: int, max_pixels: int) -> None:
    """Checks everything that decides how much memory and time decoding takes.

    Each segment has to lie within the file, and all of them together may be no longer than the file, so that no byte is
    unpacked twice. Sizes that the file does not need to say are set.

    Args:
        page: of tifffile.
        num_bytes: length of the file.
        max_pixels: height * width, at most.
    Raises:
        DecodeError: it would take too much, or the numbers contradict each other.
    """
    height, width, samples, compression = page.imagelength, page.imagewidth, page.samplesperpixel, page.compression
    if page.imagedepth != 1:
        raise DecodeError("decode", f"TIFF of {page.imagedepth} layers; expected one picture [H, W, C]")
    if page.is_tiled != (324 in page.tags):
        raise DecodeError("decode", "damaged TIFF: the size of its tiles or their places are missing")
    rows, columns = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, width)
    if min(samples, rows, columns) < 1 or page.planarconfig not in (1, 2):
        raise DecodeError("decode", f"damaged TIFF: {samples} channels in segments of {rows} x {columns} pixels")
    planes, down, across = samples if page.planarconfig == 2 else 1, -(-height // rows), -(-width // columns)
    values = down * rows * across * columns * samples
    bound = _MAX_VALUES_PER_PIXEL * max(max_pixels, _MIN_BOUND)
    if height * width * samples > _MAX_VALUES_PER_PIXEL * max_pixels or values > bound:
        raise DecodeError(
            "pixels",
            f"the header declares {height} x {width} pixels of {samples} channels, {values:,} values in segments of "
            f"{rows} x {columns}; more than 4 * max_pixels = {_MAX_VALUES_PER_PIXEL * max_pixels:,}; raise "
            "data.max_pixels if such pictures are wanted",
        )
    num_segments = planes * down * across
    _check_count("offsets", len(page.dataoffsets), num_segments)
    places = enumerate(zip(page.dataoffsets, page.databytecounts, strict=False))
    left_out = {number for number, place in places if place == (0, 0)}  # tifffile takes these for zeros
    if compression == _PLAIN:  # some writers leave the sizes out
        row_bytes = columns * (samples // planes) * (page.bitspersample // 8)
        last_rows = rows if page.is_tiled else height - (down - 1) * rows
        page.databytecounts = ([rows * row_bytes] * (down - 1) * across + [last_rows * row_bytes] * across) * planes
    _check_count("sizes", len(page.databytecounts), num_segments)
    page.databytecounts = [0 if n in left_out else size for n, size in enumerate(page.databytecounts)]
    present = [place for place in zip(page.dataoffsets, page.databytecounts, strict=True) if place != (0, 0)]
    ends = [offset + size for offset, size in present]
    if any(offset < 8 or size < 1 for offset, size in present) or max([0, *ends, sum(page.databytecounts)]) > num_bytes:
        raise DecodeError("decode", f"truncated or damaged TIFF: its pixels reach beyond its {num_bytes:,} bytes")
    if compression in (_PLAIN, _PACKBITS):
        page.predictor = 1
    if page.predictor not in (1, 2):
        raise DecodeError("decode", f"TIFF with the predictor {page.predictor}; expected 1 (none) or 2 (differences)")


def _check_count(name: str, found: int, num_segments: int) -> None:
    if found != num_segments:
        raise DecodeError("decode", f"damaged TIFF: {found:,} {name} of {num_segments:,} strips or tiles")


def _refusal(page: Any) -> str:
    codec = getattr(page.compression, "name", f"number {page.compression}")
    photometric = int(page.photometric)
    words = f" ({_COLOUR_SPACES[photometric]})" if photometric in _COLOUR_SPACES else ""
    return (
        f"TIFF of {page.samplesperpixel} channels with {page.bitspersample} bits, photometric {photometric}{words}, "
        f"sample format {int(page.sampleformat)}, compression {codec}; such pictures are read as grey or RGB of 8 or "
        "16 unsigned bits, uncompressed or by LZW, Deflate, PackBits, LZMA or Zstandard, or as CMYK of 8 bits: convert "
        "it to one of these"
    )
