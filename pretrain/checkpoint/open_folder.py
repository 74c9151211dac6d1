"""The two kinds of folders, and the one function that tells them apart.

Enters: a path or URL. Leaves: a `Folder`.

In an object store, small objects and all reads go through `data_pipes.store.storage.Storage`: its allow-list, retries
with backoff, and its hold on one version of an object. Only the tensors' files are streamed through the file system of
fsspec itself (multipart, with that library's retries): `Storage.write_whole` needs the object as one `bytes`, which
would be a second copy of the state in memory, and S3 refuses more than 5 GB in one request. torch's FsspecWriter is not
used: it opens chained and shell URLs, publishes a half written file when a write fails, and warns at every file that it
cannot fsync.
"""

from __future__ import annotations

import functools
import os
import posixpath
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, final

import fsspec
from fsspec.spec import AbstractBufferedFile

from data_pipes.store.files import write_atomically
from data_pipes.store.storage import Storage
from data_pipes.store.urls import KINDS, check_url, is_remote, local_path, redacted, scheme_of
from pretrain.checkpoint.folder import Folder
from pretrain.checkpoint.hashing_stream import HashingStream

_WRITABLE_KINDS = ("s3", "gs", "az", "memory")
"""Kinds of object stores that checkpoints may be saved to; http cannot be written, hf makes a commit of every file."""
_MAX_READ_BYTES = 1 << 30
"""The largest object that is read as a whole: COMPLETE, state.json, config.yaml and .metadata are."""


def open_folder(where: str | Path) -> Folder:
    """The folder that a path or URL names; nothing is read yet.

    Raises:
        ValueError: a URL that may not be opened.
    """
    if is_remote(str(where)):
        return StoreFolder(str(where).rstrip("/"), _Connection(str(where)))
    return LocalFolder(local_path(str(where)))


def check_writable(folder: str) -> None:
    """Checks that checkpoints can be saved to a path or URL, as far as it tells.

    Raises:
        ValueError: a URL that may not be opened, or of a store that is only read.
    """
    check_url(folder)
    if is_remote(folder) and KINDS[scheme_of(folder)] not in _WRITABLE_KINDS:
        raise ValueError(
            f"checkpoint.folder is {redacted(folder)}, which cannot be saved to; expected a path or a URL of "
            "s3://, gs://, az:// or abfs://"
        )


@final
class LocalFolder(Folder):
    """A folder of a file system."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def name(self) -> str:
        return self._named.name

    @property
    def parent(self) -> Folder:
        return LocalFolder(self._named.parent)

    @property
    def local_path(self) -> Path:
        return self._path

    def __truediv__(self, name: str) -> Folder:
        return LocalFolder(self._path / name)

    def __str__(self) -> str:
        return str(self._path)

    def exists(self) -> bool:
        try:
            return stat.S_ISDIR(self._path.stat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False

    def subfolders(self) -> list[Folder]:
        try:
            with os.scandir(self._path) as entries:
                return [LocalFolder(self._path / entry.name) for entry in entries if entry.is_dir()]
        except FileNotFoundError:
            return []

    def files(self) -> dict[str, int]:
        try:
            with os.scandir(self._path) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        except FileNotFoundError:
            return {}

    def read(self, name: str) -> bytes:
        return (self._path / name).read_bytes()

    def open(self, name: str) -> BinaryIO:
        return open(self._path / name, "rb")

    def write(self, name: str, data: bytes) -> None:
        self._path.stat()  # a folder that is gone must not be made again: its other files are gone with it
        write_atomically(self._path / name, data)
        _sync_names(self._path)

    @contextmanager
    def create(self, name: str) -> Iterator[HashingStream]:
        with open(self._path / name, "wb") as file:
            yield HashingStream(file)
            file.flush()
            os.fsync(file.fileno())

    def make(self) -> None:
        self._path.mkdir(parents=True, exist_ok=True)
        _sync_names(self._path.parent)

    def rename(self, name: str) -> None:
        self._path.rename(self._path.with_name(name))
        _sync_names(self._path.parent)

    def remove(self) -> None:
        if not self.exists():
            return
        (self._path / "COMPLETE").unlink(missing_ok=True)
        shutil.rmtree(self._path)

    @property
    def _named(self) -> Path:
        """The path in a form that has a name and a parent, which `.` and `..` have not."""
        return self._path.resolve() if self._path.name in ("", "..") else self._path


@final
class StoreFolder(Folder):
    """A prefix of an object store. Objects appear whole, when their upload ends."""

    def __init__(self, url: str, connection: _Connection) -> None:
        self._url, self.connection = url, connection

    @property
    def name(self) -> str:
        return posixpath.basename(self._url)

    @property
    def parent(self) -> Folder:
        return StoreFolder(posixpath.dirname(self._url), self.connection)

    @property
    def local_path(self) -> None:
        return None

    def __truediv__(self, name: str) -> StoreFolder:
        return StoreFolder(f"{self._url}/{name}", self.connection)

    def __str__(self) -> str:
        return self._url

    def exists(self) -> bool:
        return bool(self._listed())

    def subfolders(self) -> list[Folder]:
        return [self / name for name, entry in self._listed().items() if entry["type"] == "directory"]

    def files(self) -> dict[str, int]:
        return {name: int(entry["size"]) for name, entry in self._listed().items() if entry["type"] == "file"}

    def read(self, name: str) -> bytes:
        return self.connection.storage.read_whole(f"{self._url}/{name}", _MAX_READ_BYTES)

    def open(self, name: str) -> BinaryIO:
        return self.connection.storage.open(f"{self._url}/{name}")

    def write(self, name: str, data: bytes) -> None:
        self.connection.storage.write_whole(f"{self._url}/{name}", data)

    @contextmanager
    def create(self, name: str) -> Iterator[HashingStream]:
        url = f"{self._url}/{name}"
        file = self.connection.file_system.open(url, "wb")
        stream = HashingStream(file)
        try:
            yield stream
            file.close()
        except BaseException:
            file.discard()
            if isinstance(file, AbstractBufferedFile):
                file.closed = True  # closing would publish what has arrived, and so would the destructor
            raise
        size_bytes = self.connection.storage.info(url).size_bytes
        if size_bytes != stream.size_bytes:
            raise OSError(f"{url}: {stream.size_bytes:,} bytes were written, the store holds {size_bytes:,}")

    def make(self) -> None:
        """Does nothing: object stores have no folders."""

    def rename(self, name: str) -> None:
        renamed = self.parent / name
        for file in self.files():  # copied by the server; s3fs cannot move a folder, which to S3 is none
            self.connection.file_system.cp_file(f"{self._url}/{file}", f"{renamed}/{file}")
        self.remove()

    def remove(self) -> None:
        names = sorted(self.files(), key=lambda name: (name != "COMPLETE", name))
        for part in (names[:1], names[1:]):
            if part:
                self.connection.file_system.rm([f"{self._url}/{name}" for name in part])

    def _listed(self) -> dict[str, Any]:
        """What lies directly in the folder, by name. Not by fsspec's `find`: that passes over errors, and a folder that
        could not be listed would look like a run that has no checkpoints.
        """
        file_system = self.connection.file_system
        try:
            entries = file_system.ls(self._url, detail=True, refresh=True)
        except FileNotFoundError:
            return {}
        root = file_system._strip_protocol(self._url).rstrip("/")
        found = {str(entry["name"]).rstrip("/"): entry for entry in entries}
        return {posixpath.basename(name): entry for name, entry in found.items() if name != root}


class _Connection:
    """What the folders of one object store share; each folder made from another one has its connection."""

    def __init__(self, url: str) -> None:
        check_url(url)
        self._url = url
        self.storage = Storage()
        """Reads, and writes of small objects."""

    @functools.cached_property
    def file_system(self) -> Any:
        """fsspec's, opened when it is first needed: its package is an extra and slow to import.

        Raises:
            ValueError: that package is not installed.
        """
        try:
            return fsspec.core.url_to_fs(self._url, skip_instance_cache=True, use_listings_cache=False)[0]
        except ImportError as error:
            raise ValueError(f"{self._url} needs a package that is not installed: {error}") from error


def _sync_names(folder: Path) -> None:
    """Has the names in a folder on the disk, not only the files' contents."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
