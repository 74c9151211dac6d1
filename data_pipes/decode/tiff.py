"""TIFF pictures of any number of channels, 8 or 16 bits each: what PIL would cut to 8 bits or refuse.

Enters: the bytes of a TIFF. Leaves: uint8 or uint16 [H, W, S] of its first page, or None for what PIL reads as well
(palette, CMYK, YCbCr, 1 or 4 bits, a compression that only 8-bit pictures have). Why it exists: satellites, microscopes
and cameras write 16-bit and many-channel TIFFs. tifffile decodes them, with the codecs of imagecodecs (extra `tiff`).

A TIFF is a graph of offsets that a hostile file can bend, and tifffile follows all of it, into the private tags of
dozens of instruments. So it gets to see one page with the tags that decoding needs, each once, and what these demand is
bounded by the size of the file and by max_pixels before anything is decoded. Its codecs write into buffers of the size
of a segment and stop where these end. Source: TIFF revision 6.0; the BigTIFF design; Adobe's TIFF technical note 3.
Legend: H/W pixels, S samples (values) of a pixel; segments are strips or tiles, of all planes where each channel is
stored on its own.
"""

from __future__ import annotations

import io
import logging
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np

from data_pipes.decode.limits import Pixels, check_pixels
from data_pipes.errors import DecodeError

MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""The first bytes of a TIFF and of a BigTIFF, little and big endian."""

_SIZE_TAGS = (256, 257, 258, 277, 32997)
"""ImageWidth, ImageLength, BitsPerSample, SamplesPerPixel, ImageDepth."""
_SEGMENT_TAGS = (273, 278, 279, 284, 322, 323, 324, 325)
"""StripOffsets, RowsPerStrip, StripByteCounts, PlanarConfiguration, TileWidth, TileLength, TileOffsets,
TileByteCounts."""
_MEANING_TAGS = (259, 262, 266, 317, 338, 339)
"""Compression, PhotometricInterpretation, FillOrder, Predictor, ExtraSamples, SampleFormat."""
_NEEDED_TAGS = frozenset((*_SIZE_TAGS, *_SEGMENT_TAGS, *_MEANING_TAGS))
_MAX_TAGS = 4096
"""Of one page."""
_INTEGER_BYTES = {3: 2, 4: 4, 13: 4, 16: 8}
"""SHORT, LONG, IFD, LONG8: the types that these tags may have, and the size of a value."""
_PLAIN, _PACKBITS = 1, 32773
_BYTE_CODECS = (5, 8, 32946, _PACKBITS, 34925, 50000)
"""LZW, Deflate (two numbers), PackBits, LZMA, Zstandard: they know bytes, not pixels."""
_ALPHA = (1, 2)
"""Of ExtraSamples: premultiplied or not."""
_MAX_VALUES_PER_PIXEL = 4
"""A picture has at most so many times max_pixels values: RGBA, or more channels of a smaller picture."""
_MIN_BOUND = 1 << 24
"""Values that are always allowed, as a tile may be larger than its picture."""


def decode_tiff(data: bytes, max_pixels: int) -> tuple[Pixels, bool] | None:
    """The pixels of the first page.

    Args:
        data: a file that begins with one of `MAGICS`.
        max_pixels: height * width, at most.
    Returns:
        (pixels [H, W, S], whether the last channel is alpha); None where PIL reads it without loss.
    Raises:
        DecodeError: "pixels" above max_pixels, "decode" for a damaged file, and for 16-bit or many-channel pictures
            that neither this module nor PIL can read; the message names their compression.
        ImportError: tifffile or imagecodecs is not installed.
    """
    with _first_page(data) as page:
        height, width, samples = page.imagelength, page.imagewidth, page.samplesperpixel
        check_pixels(height, width, max_pixels)
        grey_or_rgb = page.bitspersample in (8, 16) and page.sampleformat in (1, 4) and page.photometric in (0, 1, 2)
        if not grey_or_rgb or page.compression not in (_PLAIN, *_BYTE_CODECS) or page.fillorder != 1:
            if samples > 4 or (samples > 1 and np.max(page.bitspersample) > 8):
                raise DecodeError("decode", _refusal(page))
            return None
        _check_segments(page, len(data), max_pixels)
        planes = page.asarray(squeeze=False, maxworkers=1)[:, 0]  # [planes, H, W, S / planes]
        pixels = planes.transpose(1, 2, 0, 3).reshape(height, width, samples)
        pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
        if page.photometric == 0:  # white is zero
            pixels[..., 0] = np.iinfo(pixels.dtype).max - pixels[..., 0]
        has_alpha = samples > 1 and bool(page.extrasamples) and page.extrasamples[-1] in _ALPHA
        return pixels, has_alpha


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
        with tifffile.TiffFile(io.BytesIO(_with_needed_tags(data))) as file:
            yield file.pages[0]
    except (DecodeError, MemoryError):
        raise
    except Exception as error:  # as with every parser of pictures
        raise DecodeError(
            "decode", f"truncated or damaged TIFF ({len(data):,} bytes): {type(error).__name__}: {error}"
        ) from error


def _with_needed_tags(data: bytes) -> bytes:
    """The same file, but its only page is a copy of the first one, behind all else, with the needed tags alone."""
    order, big = "<" if data.startswith(b"II") else ">", 43 in data[2:4]
    count_form, entry_form, offset_form = ("Q", "HHQQ", "Q") if big else ("H", "HHII", "I")
    at = 8 if big else 4  # where the header has the place of the first page
    (start,) = struct.unpack_from(order + offset_form, data, at)
    (count,) = struct.unpack_from(order + count_form, data, start)
    if count > _MAX_TAGS:
        raise DecodeError("decode", f"damaged TIFF: {count:,} tags")
    first, size = start + struct.calcsize(order + count_form), struct.calcsize(order + entry_form)
    entries: dict[int, bytes] = {}
    for place in range(first, first + count * size, size):
        tag, kind, num_values, values_at = struct.unpack_from(order + entry_form, data, place)
        if tag not in _NEEDED_TAGS or not num_values:
            continue
        if kind not in _INTEGER_BYTES:
            raise DecodeError("decode", f"damaged TIFF: the tag {tag} is of type {kind}; expected an integer")
        num_bytes = num_values * _INTEGER_BYTES[kind]
        if num_bytes > struct.calcsize(offset_form) and not at <= values_at <= len(data) - num_bytes:
            raise DecodeError("decode", f"damaged TIFF: the tag {tag} reaches beyond the end of the file")
        entries.setdefault(tag, data[place : place + size])
    page = struct.pack(order + count_form, len(entries)) + b"".join(entries[tag] for tag in sorted(entries))
    header = data[:at] + struct.pack(order + offset_form, len(data))
    return b"".join([header, memoryview(data)[len(header) :], page, bytes(8)])


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
    if compression == _PLAIN:  # some writers leave the sizes out
        row_bytes = columns * (samples // planes) * (page.bitspersample // 8)
        last_rows = rows if page.is_tiled else height - (down - 1) * rows
        page.databytecounts = ([rows * row_bytes] * (down - 1) * across + [last_rows * row_bytes] * across) * planes
    _check_count("sizes", len(page.databytecounts), num_segments)
    ends = [offset + size for offset, size in zip(page.dataoffsets, page.databytecounts, strict=True)]
    if min(page.dataoffsets) < 8 or min(page.databytecounts) < 1 or max(*ends, sum(page.databytecounts)) > num_bytes:
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
    return (
        f"TIFF of {page.samplesperpixel} channels with {page.bitspersample} bits, photometric "
        f"{int(page.photometric)}, sample format {int(page.sampleformat)}, compression {codec}; such pictures are read "
        "as grey or RGB of 8 or 16 unsigned bits, uncompressed or by LZW, Deflate, PackBits, LZMA or Zstandard"
    )
