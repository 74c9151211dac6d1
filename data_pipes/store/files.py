"""Writing a file in one step.

Enters: a path and bytes. Leaves: the file, whole. Why it exists: a crash or a full disk must never leave half a file
under a name that somebody reads.
"""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file such that a reader sees either the old or the whole new content, and a crash leaves no half file
    under its name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class LocalFile:
    """A file on a file system. `pread` has no file position, so threads and forked processes share it safely."""

    def __init__(self, path: Path) -> None:
        self._handle: int | None = None
        self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def size(self) -> int:
        """Bytes in all."""
        assert self._handle is not None
        return os.fstat(self._handle).st_size

    def read(self, offset: int, length: int) -> bytes:
        """The bytes [offset, offset + length); fewer only where the file ends."""
        assert self._handle is not None
        data = os.pread(self._handle, length, offset)
        if len(data) == length or not data:
            return data
        parts = [data]
        while data and (length := length - len(data)):  # a signal or 2 GiB limit may cut a read
            offset += len(data)
            data = os.pread(self._handle, length, offset)
            parts.append(data)
        return b"".join(parts)

    def close(self) -> None:
        """Frees the handle; also happens when the file is forgotten."""
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)

    def __del__(self) -> None:
        self.close()
