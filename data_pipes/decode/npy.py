"""Pictures that are NumPy arrays: `.npy` files of [H, W] or [H, W, C], uint8 or uint16.

Enters: the bytes of a file. Leaves: its header, or its pixels. Why it exists: NumPy reads a header as a Python literal,
by `ast`, whose counters threads share in CPython 3.11: now and then a good file in a loader of several threads ended in
a SystemError, and so counted as bad. The three entries of a header need no parser of Python.
Source: NumPy's NEP 1, versions 1 to 3 of the format.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import numpy as np

from data_pipes.decode.limits import Pixels, check_pixels
from data_pipes.errors import DecodeError

MAGIC = b"\x93NUMPY"
"""The first bytes of a file."""
_ENTRY = re.compile(r"""['"](\w++)['"]\s*+:\s*+(['"][|<>=]?[A-Za-z]\w*+['"]|True|False|\([\d\s,]*+\))\s*+,?""")
"""An entry of a header: a name, and the name of a type, a truth value or some numbers. Nothing is tried twice, however
long a hostile header is."""


class NpyHeader(NamedTuple):
    """What the header declares."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    is_fortran: bool
    """Whether the first index runs fastest."""
    start: int
    """Where the data begin."""


def read_header(data: bytes) -> NpyHeader:
    """The header of a file.

    Raises:
        ValueError: it is no header of a plain array.
    """
    length_bytes = 2 if data[6:7] == b"\1" else 4
    start = 8 + length_bytes + int.from_bytes(data[8 : 8 + length_bytes], "little")
    text = data[8 + length_bytes : start].decode("utf-8")
    entries = {entry[1]: entry[2] for entry in _ENTRY.finditer(text)}
    is_plain = "".join(_ENTRY.sub("", text).split()) == "{}" and entries.keys() == {"descr", "fortran_order", "shape"}
    if data[6:7] not in (b"\1", b"\2", b"\3") or start > len(data) or not is_plain:
        raise ValueError(f"no header of a plain array in the first {start:,} of {len(data):,} bytes")
    shape = tuple(int(size) for size in entries["shape"].strip("()").split(",") if size.strip())
    return NpyHeader(shape, np.dtype(entries["descr"].strip("'\"")), entries["fortran_order"] == "True", start)


def check_npy(data: bytes, max_pixels: int) -> NpyHeader:
    """The header of a file that holds a picture.

    Args:
        data: a file that begins with `MAGIC`.
        max_pixels: height * width, at most.
    Raises:
        DecodeError: "pixels" above max_pixels, "decode" for a damaged file or another array than that of a picture.
    """
    try:
        header = read_header(data)
        shape, native = header.shape, header.dtype.newbyteorder("=")
        if native not in (np.dtype(np.uint8), np.dtype(np.uint16)) or len(shape) not in (2, 3) or 0 in shape[2:]:
            raise ValueError(f"{header.dtype} {shape}, expected uint8 or uint16 of shape [H, W] or [H, W, C]")
        check_pixels(shape[0], shape[1], max_pixels)
        if len(data) - header.start != native.itemsize * math.prod(shape):
            raise ValueError(f"{len(data) - header.start:,} bytes of data for an array {shape} of {header.dtype}")
    except DecodeError:
        raise
    except Exception as error:  # NumPy raises nearly anything on the name of a type
        raise DecodeError("decode", f"not a readable .npy picture: {type(error).__name__}: {error}") from error
    return header


def decode_npy(data: bytes, max_pixels: int) -> Pixels:
    """The pixels [H, W, C], in the byte order of this machine.

    Args:
        data: a file that begins with `MAGIC`.
        max_pixels: height * width, checked in the header.
    Raises:
        DecodeError: see `check_npy`.
    """
    shape, dtype, is_fortran, start = check_npy(data, max_pixels)
    stored = np.frombuffer(data, dtype, offset=start).reshape(shape, order="F" if is_fortran else "C")
    pixels = stored.astype(dtype.newbyteorder("="), order="C")
    return pixels if pixels.ndim == 3 else pixels[..., None]
