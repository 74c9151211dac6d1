"""TIFF pictures of any number of channels, 8 or 16 bits each: what PIL would cut to 8 bits or refuse.

Enters: the bytes of a TIFF. Leaves: uint8 or uint16 [H, W, S] of its first page, or None for what PIL reads as well
(palette, CMYK, YCbCr, 1 or 4 bits, a compression that only 8-bit pictures have). Why it exists: satellites, microscopes
and cameras write 16-bit and many-channel TIFFs; and a TIFF is a graph of offsets that a hostile file can bend: here
every count is bounded by the size of the file or by max_pixels before anything is allocated.

Only the tags are read here. The decompressors are those of libtiff within PIL: they get the strips or tiles as one
8-bit grey picture of the same bytes. Source: TIFF revision 6.0; the BigTIFF design; Adobe's TIFF technical note 3.
Legend: H/W pixels, S samples (values) of a pixel, N segments (strips or tiles), of all planes where each channel is
stored on its own.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import TiffImagePlugin

from data_pipes.decode.limits import Pixels, check_pixels
from data_pipes.errors import DecodeError

MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""The first bytes of a TIFF and of a BigTIFF, little and big endian."""


class _Tag(IntEnum):
    """The tags that are read."""

    WIDTH = 256
    HEIGHT = 257
    BITS = 258
    COMPRESSION = 259
    PHOTOMETRIC = 262
    FILL_ORDER = 266
    STRIP_OFFSETS = 273
    SAMPLES = 277
    ROWS_PER_STRIP = 278
    STRIP_BYTES = 279
    PLANAR = 284
    PREDICTOR = 317
    TILE_WIDTH = 322
    TILE_HEIGHT = 323
    TILE_OFFSETS = 324
    TILE_BYTES = 325
    EXTRA_SAMPLES = 338
    SAMPLE_FORMAT = 339
    DEPTH = 32997


_KNOWN_TAGS = frozenset(tag.value for tag in _Tag)
_DEFAULTS = {_Tag.COMPRESSION: 1, _Tag.PHOTOMETRIC: 0, _Tag.FILL_ORDER: 1, _Tag.SAMPLES: 1, _Tag.DEPTH: 1} | {
    _Tag.ROWS_PER_STRIP: 2**32 - 1,
    _Tag.PLANAR: 1,
    _Tag.PREDICTOR: 1,
}
_TYPES = {1: "u1", 3: "u2", 4: "u4", 13: "u4", 16: "u8"}
# BYTE, SHORT, LONG, IFD, LONG8: the types of the tags above
_PLAIN, _PACKBITS = 1, 32773
_BYTE_CODECS = (5, 8, 32946, _PACKBITS, 34925, 50000)
# LZW, Deflate (two numbers), PackBits, LZMA, Zstandard: they know bytes, not pixels
_CODEC_NAMES = {5: "LZW", 7: "JPEG", 8: "Deflate", 32946: "Deflate", _PACKBITS: "PackBits", 34712: "JPEG 2000"} | {
    34887: "LERC",
    34925: "LZMA",
    50000: "Zstandard",
    50001: "WebP",
    52546: "JPEG XL",
}
_ALPHA = ([1], [2])  # of EXTRA_SAMPLES: premultiplied or not
_MAX_VALUES_PER_PIXEL = 4
# a picture has at most so many times max_pixels values: RGBA, or more channels of a smaller picture
_MIN_BOUND = 1 << 24
# values that are always allowed, as a tile may be larger than its picture


@dataclass(frozen=True)
class _Layout:
    """How the pixels of a page are cut into segments."""

    height: int
    width: int
    samples: int
    planes: int
    dtype: np.dtype[Any]
    # in the byte order of the file
    rows: int
    # of a segment
    columns: int
    # of a segment
    tiled: bool

    @property
    def down(self) -> int:
        """Segments, from top to bottom."""
        return -(-self.height // self.rows)

    @property
    def across(self) -> int:
        """Segments, from left to right."""
        return -(-self.width // self.columns)

    @property
    def num_segments(self) -> int:
        return self.planes * self.down * self.across

    @property
    def row_bytes(self) -> int:
        """Bytes of a segment's row."""
        return self.columns * (self.samples // self.planes) * self.dtype.itemsize

    def segment_rows(self) -> NDArray[np.int64]:
        """[N]: rows that are stored; the last strip of a plane may be shorter, tiles never are."""
        rows = np.full((self.planes, self.down, self.across), self.rows, np.int64)
        if not self.tiled:
            rows[:, -1] = self.height - (self.down - 1) * self.rows
        return rows.ravel()


def decode_tiff(data: bytes, max_pixels: int) -> tuple[Pixels, bool] | None:
    """(pixels [H, W, C], whether the last channel is alpha) of the first page; None: PIL reads it without loss.

    Raises DecodeError: "pixels" above max_pixels, "decode" for a damaged file, and for 16-bit or many-channel pictures
    that neither this module nor PIL can read; the message names their compression.
    """
    tags = _read_tags(data)
    height, width = _number(tags, _Tag.HEIGHT), _number(tags, _Tag.WIDTH)
    check_pixels(height, width, max_pixels)
    bits = {int(value) for value in tags.get(_Tag.BITS, [1])}
    formats = {int(value) for value in tags.get(_Tag.SAMPLE_FORMAT, [1])}
    samples, photometric = _number(tags, _Tag.SAMPLES), _number(tags, _Tag.PHOTOMETRIC)
    compression = _number(tags, _Tag.COMPRESSION)
    known = bits in ({8}, {16}) and formats <= {1, 4} and photometric in (0, 1, 2)  # unsigned, grey or RGB
    if not known or compression not in (_PLAIN, *_BYTE_CODECS) or _number(tags, _Tag.FILL_ORDER) != 1:
        if samples > 4 or (samples > 1 and max(bits, default=0) > 8):
            codec = _CODEC_NAMES.get(compression, f"number {compression}")
            raise DecodeError(
                "decode",
                f"TIFF of {samples} channels with {'/'.join(map(str, sorted(bits)))} bits, photometric {photometric}, "
                f"sample format {'/'.join(map(str, sorted(formats)))}, compression {codec}; such pictures are read as "
                "grey or RGB of 8 or 16 unsigned bits, uncompressed or by LZW, Deflate, PackBits, LZMA or Zstandard",
            )
        return None
    layout = _layout(tags, height, width, samples, np.dtype(f"{_byte_order(data)}u{max(bits) // 8}"), max_pixels)
    pixels = _pixels(data, tags, layout, compression)
    if photometric == 0:  # white is zero
        pixels[..., 0] = np.iinfo(pixels.dtype).max - pixels[..., 0]
    extra = tags.get(_Tag.EXTRA_SAMPLES)
    return pixels, samples > 1 and extra is not None and extra[-1:].tolist() in _ALPHA


def describe(data: bytes) -> tuple[int, int, int, int]:
    """(height, width, channels, bits per channel) as the header of the first page says."""
    tags = _read_tags(data)
    bits = tags.get(_Tag.BITS)
    return (
        _number(tags, _Tag.HEIGHT),
        _number(tags, _Tag.WIDTH),
        _number(tags, _Tag.SAMPLES),
        1 if bits is None else int(bits.max(initial=1)),
    )


def _byte_order(data: bytes) -> str:
    return "<" if data.startswith(b"II") else ">"


def _read_tags(data: bytes) -> dict[int, NDArray[np.uint64]]:
    """The values of the known tags of the first page, none larger than the file."""
    order, big = _byte_order(data), 43 in data[2:4]
    count_form, entry_form, offset_form, inline_bytes = ("Q", "HHQ", "Q", 8) if big else ("H", "HHI", "I", 4)
    entry_bytes = struct.calcsize(order + entry_form) + inline_bytes
    tags: dict[int, NDArray[np.uint64]] = {}
    try:
        (start,) = struct.unpack_from(order + offset_form, data, 8 if big else 4)
        (count,) = struct.unpack_from(order + count_form, data, start)
        first = start + struct.calcsize(order + count_form)
        if count > 0xFFFF or first + count * entry_bytes > len(data):
            raise DecodeError("decode", f"damaged TIFF: {count:,} tags at byte {start:,} of {len(data):,}")
        for entry in range(first, first + count * entry_bytes, entry_bytes):
            tag, kind, length = struct.unpack_from(order + entry_form, data, entry)
            if tag not in _KNOWN_TAGS or tag in tags or kind not in _TYPES:
                continue
            form = np.dtype(order + _TYPES[kind])
            place = entry + entry_bytes - inline_bytes
            if length * form.itemsize > inline_bytes:
                (place,) = struct.unpack_from(order + offset_form, data, place)
            if place + length * form.itemsize > len(data):
                raise DecodeError("decode", f"damaged TIFF: the tag {tag} reaches beyond the end of the file")
            tags[tag] = np.frombuffer(data, form, length, place).astype(np.uint64)
    except struct.error as error:
        raise DecodeError("decode", f"damaged TIFF: it ends within its tags ({len(data):,} bytes)") from error
    return tags


def _number(tags: Mapping[int, NDArray[np.uint64]], tag: _Tag) -> int:
    """The first value of a tag, or its default."""
    values = tags.get(tag)
    if values is not None and len(values):
        return int(values[0])
    if tag not in _DEFAULTS:
        raise DecodeError("decode", f"damaged TIFF: the tag {tag.name} ({tag.value}) is missing")
    return _DEFAULTS[tag]


def _layout(
    tags: Mapping[int, NDArray[np.uint64]],
    height: int,
    width: int,
    samples: int,
    dtype: np.dtype[Any],
    max_pixels: int,
) -> _Layout:
    """Checks everything that decides how much memory is needed."""
    if _number(tags, _Tag.DEPTH) != 1:
        raise DecodeError("decode", f"TIFF of {_number(tags, _Tag.DEPTH)} layers; expected one picture [H, W, C]")
    tiled = _Tag.TILE_OFFSETS in tags
    rows = _number(tags, _Tag.TILE_HEIGHT) if tiled else min(_number(tags, _Tag.ROWS_PER_STRIP), height)
    columns = _number(tags, _Tag.TILE_WIDTH) if tiled else width
    if samples < 1 or rows < 1 or columns < 1:
        raise DecodeError("decode", f"damaged TIFF: {samples} channels in segments of {rows} x {columns} pixels")
    planes = samples if _number(tags, _Tag.PLANAR) == 2 else 1
    layout = _Layout(height, width, samples, planes, dtype, rows, columns, tiled)
    bound = _MAX_VALUES_PER_PIXEL * max(max_pixels, _MIN_BOUND)
    values = layout.down * rows * layout.across * columns * samples
    if height * width * samples > _MAX_VALUES_PER_PIXEL * max_pixels or values > bound:
        raise DecodeError(
            "pixels",
            f"the header declares {height} x {width} pixels of {samples} channels, {values:,} values in segments of "
            f"{rows} x {columns}; more than 4 * max_pixels = {_MAX_VALUES_PER_PIXEL * max_pixels:,}; raise "
            "data.max_pixels if such pictures are wanted",
        )
    return layout


def _pixels(data: bytes, tags: Mapping[int, NDArray[np.uint64]], layout: _Layout, compression: int) -> Pixels:
    """[H, W, S] in the byte order of this machine."""
    offsets = _of_each_segment(tags, _Tag.TILE_OFFSETS if layout.tiled else _Tag.STRIP_OFFSETS, layout)
    stored_rows = layout.segment_rows()
    if compression == _PLAIN:  # some writers leave the sizes out
        sizes = (stored_rows * layout.row_bytes).astype(np.uint64)
    else:
        sizes = _of_each_segment(tags, _Tag.TILE_BYTES if layout.tiled else _Tag.STRIP_BYTES, layout)
    total, limit = int(sizes.astype(object).sum()), np.uint64(len(data))
    if (sizes > limit).any() or (offsets > limit - sizes).any() or total > len(data):
        raise DecodeError("decode", f"truncated or damaged TIFF: its pixels reach beyond its {len(data):,} bytes")
    segments = np.empty((layout.num_segments, layout.rows, layout.row_bytes), np.uint8)
    if compression == _PLAIN:
        for segment, offset, size in zip(segments, offsets.tolist(), sizes.tolist(), strict=True):
            segment.reshape(-1)[:size] = np.frombuffer(data, np.uint8, size, offset)
    else:
        for rows in np.unique(stored_rows).tolist():  # one group, or two where the last strips are shorter
            group = np.flatnonzero(stored_rows == rows)
            unpacked = _decompress(data, offsets[group], sizes[group], rows, layout.row_bytes, compression)
            segments[group, :rows] = unpacked.reshape(len(group), rows, layout.row_bytes)
    values = segments.view(layout.dtype).astype(layout.dtype.newbyteorder("="), copy=False)
    values = values.reshape(layout.planes, layout.down, layout.across, layout.rows, layout.columns, -1)
    predictor = _number(tags, _Tag.PREDICTOR) if compression not in (_PLAIN, _PACKBITS) else 1
    if predictor == 2:
        values = np.cumsum(values, axis=4, dtype=values.dtype)  # differences along the row, modulo 2 ** bits
    elif predictor != 1:
        raise DecodeError("decode", f"TIFF with the predictor {predictor}; expected 1 (none) or 2 (differences)")
    whole = values.transpose(1, 3, 2, 4, 0, 5).reshape(layout.down * layout.rows, -1, layout.samples)
    return np.ascontiguousarray(whole[: layout.height, : layout.width])


def _of_each_segment(tags: Mapping[int, NDArray[np.uint64]], tag: _Tag, layout: _Layout) -> NDArray[np.uint64]:
    values = tags.get(tag)
    if values is None or len(values) != layout.num_segments:
        found = 0 if values is None else len(values)
        raise DecodeError("decode", f"damaged TIFF: {found} {tag.name} of {layout.num_segments} strips or tiles")
    return values


def _decompress(
    data: bytes,
    offsets: NDArray[np.uint64],
    sizes: NDArray[np.uint64],
    rows: int,
    row_bytes: int,
    compression: int,
) -> NDArray[np.uint8]:
    """[segments * rows, row_bytes]: the bytes of segments of equal shape, in the order given.

    libtiff unpacks them as the strips of an 8-bit grey picture: the file gets another header and, at its end, another
    list of tags.
    """
    places, lengths = offsets.astype("<u4").tobytes(), sizes.astype("<u4").tobytes()
    count, at = len(offsets), len(data) + len(data) % 2
    values = at + 2 + 9 * 12 + 4  # where the lists begin, behind the tags
    lists = (values, values + len(places)) if count > 1 else (int(offsets[0]), int(sizes[0]))
    tags = [
        (_Tag.WIDTH, 4, 1, row_bytes),
        (_Tag.HEIGHT, 4, 1, rows * count),
        (_Tag.BITS, 3, 1, 8),
        (_Tag.COMPRESSION, 3, 1, compression),
        (_Tag.PHOTOMETRIC, 3, 1, 1),
        (_Tag.STRIP_OFFSETS, 4, count, lists[0]),
        (_Tag.SAMPLES, 3, 1, 1),
        (_Tag.ROWS_PER_STRIP, 4, 1, rows),
        (_Tag.STRIP_BYTES, 4, count, lists[1]),
    ]
    try:
        page = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
        header = b"II*\0" + struct.pack("<I", at)
        wrapped = b"".join([header, memoryview(data)[8:], bytes(at - len(data)), page, places, lengths])
        with TiffImagePlugin.TiffImageFile(io.BytesIO(wrapped)) as picture:
            return np.asarray(picture)
    except MemoryError:
        raise
    except Exception as error:  # as with every parser of PIL
        codec = _CODEC_NAMES[compression]
        raise DecodeError("decode", f"damaged TIFF, or PIL lacks {codec}: {type(error).__name__}: {error}") from error
