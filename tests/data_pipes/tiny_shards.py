"""Small data sets for the tests, written as stock webdataset writes them, and picture bombs."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from data_pipes.index.index import index_shards
from data_pipes.shards.manifest import Manifest


def picture(seed: int, height: int = 12, width: int = 10, kind: str = "PNG") -> bytes:
    """An encoded RGB picture of noise over a ramp; no two seeds give the same."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 60, (height, width, 3)) + np.indices((height, width)).sum(0)[..., None] * 4
    file = io.BytesIO()
    Image.fromarray((pixels % 256).astype(np.uint8)).save(file, kind)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG of 1 KB that declares any size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1 << 20))) + chunk(b"IEND", b"")


def jpeg_header(width: int, height: int) -> bytes:
    """A JPEG of 12x10 that declares any size."""
    data = bytearray(picture(0, kind="JPEG"))
    place = data.index(b"\xff\xc0")
    data[place + 5 : place + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def write_shards(
    folder: Path,
    samples_per_shard: Sequence[int],
    replaced: Mapping[int, Mapping[str, bytes]] | None = None,
    classes: Sequence[str] = (),
) -> Manifest:
    """Shards of labelled PNGs (key 000017, label 17 mod 7), indexed.

    Args:
        folder: gets the shards, their indexes and the manifest.
        samples_per_shard: number of samples of each.
        replaced: by sample number, other members than the PNG and its label.
        classes: names of the labels; empty: none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    number, paths = 0, []
    for shard, count in enumerate(samples_per_shard):
        paths.append(folder / f"shard-{shard:06d}.tar")
        with webdataset.TarWriter(str(paths[-1])) as writer:
            for _ in range(count):
                members = {"png": picture(number), "cls": str(number % 7).encode()}
                members = dict((replaced or {}).get(number, members))
                writer.write({"__key__": f"{number:06d}", **members})
                number += 1
    return index_shards(paths, folder, classes)
