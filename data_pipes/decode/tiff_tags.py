"""Which parts of a TIFF are looked at: the tags of its first page that decoding needs, and two notes beside them.

Enters: the bytes of a TIFF. Leaves: the same file with these tags alone, and the notes. Why it exists: a TIFF is a
graph of offsets that a hostile file can bend, and tifffile follows all of it, into the private tags of dozens of
instruments.
Source: TIFF revision 6.0; the BigTIFF design.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

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
_SHORT, _ORIENTATION = 3, 274
_INTEGER_BYTES = {_SHORT: 2, 4: 4, 13: 4, 16: 8}
"""SHORT, LONG, IFD, LONG8: the types that these tags may have, and the size of a value."""


class PageNotes(NamedTuple):
    """What a file says of its first page beside the pixels."""

    orientation: int
    """EXIF's number, 1 (upright) where there is none."""
    has_successor: bool
    """Whether another page follows, which is not read."""


def page_notes(data: bytes) -> PageNotes:
    """What stands beside the pixels of the first page.

    Args:
        data: a TIFF that was read.
    """
    form, orientation = _Form.of(data), 1
    first, count = form.first_page(data)
    size = struct.calcsize(form.entry)
    for place in range(first, first + count * size, size):
        tag, kind = struct.unpack_from(form.order + "HH", data, place)
        if (tag, kind) == (_ORIENTATION, _SHORT):
            (orientation,) = struct.unpack_from(form.order + "H", data, place + size - struct.calcsize(form.offset))
    behind = first + count * size
    return PageNotes(orientation if 1 <= orientation <= 8 else 1, any(data[behind : behind + form.place]))


class _Form(NamedTuple):
    """How the numbers of a file are written, in struct's letters."""

    order: str
    """Of their bytes."""
    number: str
    """The number of tags."""
    entry: str
    """A tag, its type, the number of its values, and their place or the values themselves."""
    offset: str
    """A place in the file."""
    place: int
    """Where the header has the place of the first page; as many bytes as that takes."""

    @classmethod
    def of(cls, data: bytes) -> _Form:
        order = "<" if data.startswith(b"II") else ">"
        big = 43 in data[2:4]
        return cls(order, "Q", order + "HHQQ", "Q", 8) if big else cls(order, "H", order + "HHII", "I", 4)

    def first_page(self, data: bytes) -> tuple[int, int]:
        """Where the tags of the first page begin, and their number."""
        (start,) = struct.unpack_from(self.order + self.offset, data, self.place)
        (count,) = struct.unpack_from(self.order + self.number, data, start)
        if count > _MAX_TAGS:
            raise DecodeError("decode", f"damaged TIFF: {count:,} tags")
        return start + struct.calcsize(self.order + self.number), count


def with_needed_tags(data: bytes) -> bytes:
    """The same file, but its only page is a copy of the first one, behind all else, with the needed tags alone.

    Args:
        data: a file that begins with one of `MAGICS`.
    Raises:
        DecodeError: a tag cannot be what it says.
        struct.error: the file ends within its tags.
    """
    form = _Form.of(data)
    (first, count), size, at = form.first_page(data), struct.calcsize(form.entry), form.place
    entries: dict[int, bytes] = {}
    for place in range(first, first + count * size, size):
        tag, kind, num_values, values_at = struct.unpack_from(form.entry, data, place)
        if tag not in _NEEDED_TAGS or not num_values:
            continue
        if kind not in _INTEGER_BYTES:
            raise DecodeError("decode", f"damaged TIFF: the tag {tag} is of type {kind}; expected an integer")
        num_bytes = num_values * _INTEGER_BYTES[kind]
        if num_bytes > at and not at <= values_at <= len(data) - num_bytes:
            raise DecodeError("decode", f"damaged TIFF: the tag {tag} reaches beyond the end of the file")
        entries.setdefault(tag, data[place : place + size])
    page = struct.pack(form.order + form.number, len(entries)) + b"".join(entries[tag] for tag in sorted(entries))
    header = data[:at] + struct.pack(form.order + form.offset, len(data))
    return b"".join([header, memoryview(data)[len(header) :], page, bytes(8)])
