"""The file of one cached chunk: the bytes of the chunk behind a checksum of each block of them.

Enters: a chunk, once; then parts to read. Leaves: parts whose blocks agree with their checksums. Why it exists: a disk
that lies must not train a model. Checksums are by block, and compared when a process reads a block for the first time:
a process that needs one sample of a chunk, as each of many worker processes does, checks and fetches that sample alone.
CRC-32 runs at 3.2 GB/s (SHA-256: 1.8); 32 KiB is small beside a sample, and large beside the cost of a call.

A file: 8 bytes magic, 32 bytes key, 8 bytes length of the chunk, a CRC-32 for each block, the CRC-32 of all that; then
the chunk. Numbers are little endian.
"""

from __future__ import annotations

import os
import struct
import zlib
from array import array
from pathlib import Path

BLOCK_BYTES = 32 << 10
"""What one checksum covers."""
_MAGIC = b"TSRCHK1\n"
_HEAD = struct.Struct("<8s32sQ")


class DamagedError(ValueError):
    """The file does not hold what was written to it."""

    def __init__(self, message: str, inode: int) -> None:
        """
        Args:
            message: what is wrong, for people.
            inode: of the file; it tells it from a later one of the same name.
        """
        super().__init__(message)
        self.inode = inode


def file_bytes(length: int) -> int:
    """Size of the file of a chunk of `length` bytes."""
    return _HEAD.size + 4 * (_num_blocks(length) + 1) + length


def write_chunk_file(path: Path, key: str, data: bytes) -> None:
    """Writes the file of a chunk.

    Nothing is forced to the disk: after a power cut the checksums tell, and a cache may lose what it has.

    Args:
        path: not yet the final name.
        key: of the chunk, 64 hex digits.
        data: the whole chunk.
    Raises:
        OSError: it cannot be written; a part of the file may be left.
    """
    view = memoryview(data)
    sums = array("I", (zlib.crc32(view[start : start + BLOCK_BYTES]) for start in range(0, len(data), BLOCK_BYTES)))
    head = _HEAD.pack(_MAGIC, bytes.fromhex(key), len(data)) + sums.tobytes()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        for part in (memoryview(head + struct.pack("<I", zlib.crc32(head))), view):
            while part:
                part = part[os.write(handle, part) :]
    finally:
        os.close(handle)


class ChunkFile:
    """An open chunk. `pread` has no file position, so threads and forked processes share it safely; the descriptor is
    closed when the last user forgets the object.
    """

    def __init__(self, path: Path, key: str) -> None:
        """
        Args:
            path: of the file.
            key: of the chunk that it should hold.
        Raises:
            FileNotFoundError: there is no such file, or it is being removed.
            DamagedError: it is not the file of this chunk.
        """
        self._handle = -1
        self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        size = os.fstat(self._handle).st_size
        head = os.pread(self._handle, _HEAD.size, 0)
        if len(head) < _HEAD.size:
            if self._is_empty():
                raise FileNotFoundError(f"{path}: being removed")
            raise self._damage("cut")
        magic, found_key, self.length = _HEAD.unpack(head)
        if magic != _MAGIC or found_key.hex() != key or file_bytes(self.length) != size:
            raise self._damage("cut, or not the file of this chunk")
        sums = os.pread(self._handle, 4 * (_num_blocks(self.length) + 1), _HEAD.size)
        if self._is_empty():
            raise FileNotFoundError(f"{path}: being removed")
        self._sums = array("I", sums)
        if zlib.crc32(head + sums[:-4]) != self._sums[-1]:
            raise self._damage("the head does not agree with its checksum")
        self._start = size - self.length
        self._unchecked = bytearray(b"\1" * (len(self._sums) - 1))

    def read(self, offset: int, length: int) -> bytes | None:
        """The bytes [offset, offset + length) of the chunk.

        Returns:
            None when the chunk was evicted in the meantime, which empties the file.
        Raises:
            DamagedError: a block does not agree with its checksum, or the file was cut.
            ValueError: the bytes are not within the chunk.
        """
        if offset < 0 or length < 0 or offset + length > self.length:
            raise ValueError(f"bytes {offset:,} to {offset + length:,} of a chunk of {self.length:,} bytes")
        if not length:
            return b""
        first, last = offset // BLOCK_BYTES, (offset + length - 1) // BLOCK_BYTES
        if self._unchecked.find(1, first, last + 1) >= 0:
            return self._read_checking(offset, length, first, last)
        data = os.pread(self._handle, length, self._start + offset)
        return data if len(data) == length else self._nothing()

    def _read_checking(self, offset: int, length: int, first: int, last: int) -> bytes | None:
        begin, end = first * BLOCK_BYTES, min((last + 1) * BLOCK_BYTES, self.length)
        data = os.pread(self._handle, end - begin, self._start + begin)
        if len(data) != end - begin:
            return self._nothing()
        view = memoryview(data)
        for block in range(first, last + 1):
            place = (block - first) * BLOCK_BYTES
            if self._unchecked[block]:
                if zlib.crc32(view[place : place + BLOCK_BYTES]) != self._sums[block]:
                    raise self._damage(f"block {block} of {len(self._unchecked)} does not agree with its checksum")
                self._unchecked[block] = 0
        return data[offset - begin : offset - begin + length]

    def _nothing(self) -> bytes | None:
        """None, after a short read of an evicted file, which is empty; any other length is damage."""
        if self._is_empty():
            return None
        raise self._damage("cut")

    def _is_empty(self) -> bool:
        return os.fstat(self._handle).st_size == 0

    def _damage(self, what: str) -> DamagedError:
        return DamagedError(what, os.fstat(self._handle).st_ino)

    def __del__(self) -> None:
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)


def _num_blocks(length: int) -> int:
    return -(-length // BLOCK_BYTES)
