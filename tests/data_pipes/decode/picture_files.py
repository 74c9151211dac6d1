"""Picture files by PIL and numpy, and by the words of their formats where PIL cannot write them."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import tifffile
from PIL import Image

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
"""Colour types of PNG."""
_SOFTWARE = 305
"""A tag of TIFF."""


def noise(channels: int, depth: int, height: int = 23, width: int = 31) -> np.ndarray:
    """[height, width, channels] of `depth` bits, with some rows that can be compressed."""
    random = np.random.Generator(np.random.PCG64([channels, depth]))
    values = random.integers(0, 2**depth, (height, width, channels))
    values[5:9] = values[5:6, 5:6] if height > 5 else values[:0]
    return values.astype(np.uint16 if depth == 16 else np.uint8)


def encode(pixels: np.ndarray, kind: str = "JPEG", mode: str | None = None, **options: object) -> bytes:
    """A file by PIL."""
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(file, kind, **options)
    return file.getvalue()


def as_numpy(array: np.ndarray) -> bytes:
    """A .npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def png(pixels: np.ndarray, kind: int, depth: int, extra: bytes = b"") -> bytes:
    """A PNG of any colour type and depth, with all five filters in turn.

    Args:
        pixels: [H, W, C].
        kind: PNG's colour type.
        depth: bits per channel.
        extra: chunks behind the header.
    """
    height = len(pixels)
    if depth < 8:
        bits = np.unpackbits(pixels.astype(np.uint8)[..., None], axis=3)[..., 8 - depth :]
        rows = np.packbits(bits.reshape(height, -1), axis=1)
    else:
        rows = pixels.astype(">u2" if depth == 16 else "u1").reshape(height, -1).view(np.uint8)
    step, above, lines = max(1, pixels.shape[2] * depth // 8), np.zeros(rows.shape[1], np.int64), []
    for number, row in enumerate(rows.astype(np.int64)):
        left, corner = (np.concatenate([np.zeros(step, np.int64), line[:-step]]) for line in (row, above))
        estimate = left + above - corner
        near, over, both = abs(estimate - left), abs(estimate - above), abs(estimate - corner)
        paeth = np.where((near <= over) & (near <= both), left, np.where(over <= both, above, corner))
        guess = (np.zeros_like(row), left, above, (left + above) // 2, paeth)[number % 5]
        lines.append(bytes([number % 5]) + ((row - guess) % 256).astype(np.uint8).tobytes())
        above = row
    header = struct.pack(">IIBBBBB", pixels.shape[1], height, depth, kind, 0, 0, 0)
    parts = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(b"".join(lines))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def chunk(name: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def as_tiff(pixels: np.ndarray, **options: Any) -> bytes:
    """As tifffile writes it."""
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, **options)
    return file.getvalue()


def with_tag(data: bytes, tag: int, value: int) -> bytes:
    """A little-endian TIFF with another value of a tag; one that it lacks takes the place of the name of its writer."""
    changed = bytearray(data)
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    places = {struct.unpack_from("<H", data, entry)[0]: entry for entry in range(start + 2, start + 12 * count, 12)}
    struct.pack_into("<HHII", changed, places.get(tag, places[_SOFTWARE]), tag, 4, 1, value)
    assert bytes(changed) != data
    return bytes(changed)
