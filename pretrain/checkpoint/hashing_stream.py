"""A file that is hashed while it is written.

Enters: a file opened for writing. Leaves: the file, its size and its sha256. Why it exists: `COMPLETE` has the hash of
every file of a checkpoint, and a checkpoint that was just written need not be read again for that.
"""

from __future__ import annotations

import hashlib
from typing import Any


class HashingStream:
    """A file that is written from front to back; counts and hashes the bytes on their way."""

    def __init__(self, file: Any) -> None:
        self._file, self._sha256, self.size_bytes = file, hashlib.sha256(), 0
        self.error: OSError | None = None
        """The first error of writing. torch's serializer goes on after it and reports a fault of its own instead."""

    def write(self, data: Any) -> int:
        """Writes any object that holds bytes.

        Returns:
            The number of bytes written, which is all of them.
        Raises:
            OSError: the file cannot be written; it is kept in `error` too.
        """
        view = memoryview(data).cast("B")
        try:
            self._file.write(view)
        except OSError as error:
            self.error = self.error or error
            raise
        self._sha256.update(view)
        self.size_bytes += len(view)
        return len(view)

    def tell(self) -> int:
        """The bytes written so far."""
        return self.size_bytes

    def flush(self) -> None:
        """Does nothing: the file is flushed once, when it ends."""

    def close(self) -> None:
        """Does nothing: whoever opened the file closes it."""

    @property
    def fingerprint(self) -> tuple[int, str]:
        """The size in bytes and the sha256 in hex of what was written."""
        return self.size_bytes, self._sha256.hexdigest()
