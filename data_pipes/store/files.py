"""Files of a file system: written in one step, locked, and read by places.

Enters: paths and bytes. Leaves: whole files. Why it exists: a crash or a full disk must never leave half a file under a
name that somebody reads, and what only one process may do must be free again when that process was killed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO


@dataclass
class Draft:
    """A file that is being written, under another name than it will have."""

    file: BinaryIO
    path: Path
    """Where it lies now: in the folder of the final name, hidden, ending in `.tmp`."""
    keep: bool = True
    """Whether it gets its final name; False: it is removed."""


@contextmanager
def new_file(path: Path, *, durable: bool = True) -> Iterator[Draft]:
    """Gives a file to write, which gets its name when the block ends, and is removed when the block raises.

    A reader sees either the old or the whole new content, and a crash leaves no half file under the name.

    Args:
        path: the final name; the folder is made as needed.
        durable: whether the content is on the disk before it has the name, so that a power cut does no harm either.
    Yields:
        The draft; what is written may be read back by its path after `draft.file.flush()`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            draft = Draft(file, temporary)
            yield draft
            file.flush()
            if durable and draft.keep:
                os.fsync(file.fileno())
        if draft.keep:
            os.replace(temporary, path)
        else:
            temporary.unlink()
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk does not say which file
        raise


def write_atomically(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Writes a whole file in one step, see `new_file`."""
    with new_file(path, durable=durable) as draft:
        draft.file.write(data)


@contextmanager
def exclusive(path: Path, wait_s: float, busy: Exception) -> Iterator[None]:
    """Holds a lock alone, among all processes and threads; it ends with the process, however that ends.

    On a file system without locks the block runs unlocked.

    Args:
        path: the file that is locked; it is made, and stays.
        wait_s: seconds to wait for who holds it; 0: not at all.
        busy: what is raised when somebody else holds it for longer.
    """
    from filelock import FileLock, Timeout  # takes 50 ms, and few need it

    path.open("ab").close()  # what is wrong with the file is an error, other than what is wrong with locking it
    with ExitStack() as held:
        try:
            held.enter_context(FileLock(path, timeout=wait_s, fallback_to_soft=False))
        except Timeout:
            raise busy from None
        except OSError:
            pass
        yield


class LocalFile:
    """A file to read by places. `pread` has no file position, so threads and forked processes share it safely."""

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
