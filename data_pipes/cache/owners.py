"""Who uses a cache folder, and who may change it now: locks that end with their process, however it ends.

Enters: a folder. Leaves: `Owner`, a process's name in the folder, alive as long as its file is locked, and `locked`,
the right to change the folder. Why it exists: a process killed at any moment must leave nothing that blocks others. The
kernel lets go of a `flock` when the last descriptor of the locked file is closed, so descriptors must not reach forked
children: a child closes them before anything else.

This is not filelock, which locks everything else here (see data_pipes.store.files): a lock is taken for each change of
the index, which takes 400 us in all, and filelock's takes 13 to 24 times as long as this one; and asking whether an
owner lives must not make its file anew.
"""

from __future__ import annotations

import fcntl
import os
import time
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

_LOCK_TIMEOUT_S = 30.0
"""Changes take below a millisecond, or a few seconds where a lowered cap evicts thousands of chunks."""
_LOCK_POLL_S = 0.0005


class _LockedFile:
    """An exclusive lock."""

    def __init__(self, path: Path, flags: int) -> None:
        """
        Args:
            path: the file to lock.
            flags: of opening it, such as os.O_CREAT.
        Raises:
            BlockingIOError: somebody else has the lock.
        """
        self._handle = -1
        self._handle = os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o666)
        _locked_files().add(self)
        fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def close(self, *, unlock: bool = True) -> None:
        """Gives the lock up.

        Args:
            unlock: whether to do so for a child as well that inherited the descriptor a moment ago; False in that child
                itself.
        """
        handle, self._handle = self._handle, -1
        if handle >= 0:
            if unlock:
                fcntl.flock(handle, fcntl.LOCK_UN)
            os.close(handle)

    def __del__(self) -> None:
        self.close()


@cache
def _locked_files() -> weakref.WeakSet[_LockedFile]:
    """The locked files of this process. A forked child closes its copies of the descriptors: they would keep the locks
    held.
    """
    files: weakref.WeakSet[_LockedFile] = weakref.WeakSet()

    def close_all() -> None:
        for file in list(files):
            file.close(unlock=False)

    os.register_at_fork(after_in_child=close_all)
    return files


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock of a file alone, among all threads and processes.

    Raises:
        TimeoutError: (an OSError) another process has held it for 30 s.
    """
    deadline = time.monotonic() + _LOCK_TIMEOUT_S
    while True:
        try:
            lock = _LockedFile(path, os.O_CREAT)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{path}: another process has held this lock for {_LOCK_TIMEOUT_S:.0f} s; look for a stopped one"
                ) from None
            time.sleep(_LOCK_POLL_S)
    try:
        yield
    finally:
        lock.close()


class Owner:
    """A user of the folder: a locked file of a name that nobody else has."""

    def __init__(self, folder: Path) -> None:
        self.name, self.process_id = uuid.uuid4().hex, os.getpid()
        self._path = folder / self.name
        self._lock = _LockedFile(self._path, os.O_CREAT | os.O_EXCL)

    def release(self) -> None:
        """Gives the name up."""
        self._lock.close()
        self._path.unlink(missing_ok=True)


def sweep_owners(folder: Path) -> set[str]:
    """The names of the living owners; the files of the dead are removed. The caller holds the folder's lock."""
    living = set()
    for path in folder.iterdir():
        try:
            _LockedFile(path, 0).close()
        except BlockingIOError:
            living.add(path.name)
        except FileNotFoundError:  # released just now
            continue
        else:
            path.unlink(missing_ok=True)
    return living
