"""A folder of checkpoints: on a disk or in an object store, with the same few operations on both.

Enters: a path or URL, from the configuration or a command line, opened by `open_folder`. Leaves: names, sizes and
contents. Why it exists: a run whose nodes share no file system saves to s3:// or gs://, and every reader (resume,
evaluation, export, report) has to find it there, without asking where it lies.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

from pretrain.checkpoint.hashing_stream import HashingStream


class Folder(ABC):
    """A run, its checkpoints, or one checkpoint, wherever it lies; it need not exist.

    Made by `open_folder`. Two folders are equal when their paths or URLs are. All operations raise OSError (data_pipes'
    StorageError is one) where the disk or store fails.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The last part of the path or URL."""

    @property
    @abstractmethod
    def parent(self) -> Folder:
        """The folder that holds this one."""

    @property
    @abstractmethod
    def local_path(self) -> Path | None:
        """The folder on this machine, for what has to be written beside it; None: it lies in an object store."""

    @abstractmethod
    def __truediv__(self, name: str) -> Folder:
        """The folder called `name` in this one."""

    @abstractmethod
    def __str__(self) -> str:
        """The path or URL."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Folder) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    @abstractmethod
    def exists(self) -> bool:
        """Whether there is such a folder; in an object store, whether it holds anything."""

    @abstractmethod
    def subfolders(self) -> list[Folder]:
        """The folders in it, in any order; none where it does not exist."""

    @abstractmethod
    def files(self) -> dict[str, int]:
        """The sizes in bytes of the files in it, by name; none where it does not exist."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The content of a small file.

        Raises:
            FileNotFoundError: there is no such file.
        """

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """A file for reading, seekable.

        Raises:
            FileNotFoundError: there is no such file.
        """

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Writes a small file, whole or not at all; it is on the disk or in the store when this returns."""

    @abstractmethod
    def create(self, name: str) -> AbstractContextManager[HashingStream]:
        """A large file to write in the block of a `with`; it is on the disk or in the store when the block ends."""

    @abstractmethod
    def make(self) -> None:
        """Makes the folder and those above it; does nothing where it exists."""

    @abstractmethod
    def rename(self, name: str) -> None:
        """Gives it another name beside its own."""

    @abstractmethod
    def remove(self) -> None:
        """Removes it with its files, `COMPLETE` first, so that a half removed checkpoint does not count."""
