"""Where checkpoints lie: a local folder, or a folder of an object store, with the same few operations on both.

Enters: a path or URL from the configuration or a command line. Leaves: a `Place` (a `Path` for what is local, else a
`RemoteFolder`) and its `Store`. Why it exists: a run whose nodes share no file system saves to s3:// or gs://, and
every reader (resume, evaluation, export, report) has to find it there.

Small objects and all reads go through `data_pipes.store.storage.Storage`: its allow-list, retries with backoff, and its
hold on one version of an object. Only the tensors' files are streamed through the file system of fsspec itself
(multipart, with that library's retries): `Storage.write_whole` needs the object as one `bytes`, which would be a second
copy of the state in memory, and S3 refuses more than 5 GB in one request. torch's FsspecWriter is not used: it opens
chained and shell URLs, publishes a half written file when a write fails, and warns at every file that it cannot fsync.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from fsspec.spec import AbstractBufferedFile

from data_pipes.store.storage import Storage
from data_pipes.store.urls import KINDS, check_url, is_remote, local_path, redacted, scheme_of

_WRITABLE = ("s3", "gs", "az", "memory")
# kinds of stores that checkpoints may be saved to; http cannot be written, hf makes a commit of every file
_MAX_TEXT_BYTES = 1 << 30
# of what is read whole: COMPLETE, state.json, config.yaml, .metadata


class HashingStream:
    """A file that is written in order: counts and hashes what passes, so that it need not be read again."""

    def __init__(self, file: Any) -> None:
        self._file, self._sha256, self.size_bytes = file, hashlib.sha256(), 0
        self.error: OSError | None = None
        """The first of writing; torch's serializer goes on after it and reports a fault of its own instead."""

    def write(self, data: Any) -> int:
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
        return self.size_bytes

    def flush(self) -> None:
        """Nothing: it is flushed once, when it ends."""

    def close(self) -> None:
        """Nothing: who opened the file closes it."""

    @property
    def fingerprint(self) -> tuple[int, str]:
        """Bytes and sha256 in hex of what was written."""
        return self.size_bytes, self._sha256.hexdigest()


class Store(ABC):
    """The operations on checkpoint folders. Errors are OSErrors (data_pipes' StorageError is one)."""

    @abstractmethod
    def subfolders(self, folder: Any) -> list[str]:
        """Names of the folders in a folder; none where it does not exist. Raises OSError when it cannot be read."""

    @abstractmethod
    def files(self, folder: Any) -> dict[str, int]:
        """Name -> bytes of the files in a folder; none where it does not exist."""

    @abstractmethod
    def read(self, folder: Any, name: str) -> bytes:
        """A small file. Raises FileNotFoundError."""

    @abstractmethod
    def open(self, folder: Any, name: str) -> BinaryIO:
        """A file for reading, seekable."""

    @abstractmethod
    def write(self, folder: Any, name: str, data: bytes) -> None:
        """A small file, whole or not at all; it is on disk when this returns."""

    @abstractmethod
    def create(self, folder: Any, name: str) -> Any:
        """A context manager of a `HashingStream`; the file is on disk when it ends without an exception."""

    @abstractmethod
    def make(self, folder: Any) -> None:
        """Makes a folder and those above it."""

    @abstractmethod
    def rename(self, folder: Any, name: str) -> None:
        """Gives a folder another name beside its own."""

    @abstractmethod
    def remove(self, folder: Any) -> None:
        """Removes a folder, `COMPLETE` first, so that a half removed one does not count."""


class LocalStore(Store):
    """Folders of a file system; a folder is a `Path`."""

    def subfolders(self, folder: Path) -> list[str]:
        try:
            with os.scandir(folder) as entries:
                return [entry.name for entry in entries if entry.is_dir()]
        except FileNotFoundError:
            return []

    def files(self, folder: Path) -> dict[str, int]:
        try:
            with os.scandir(folder) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        except FileNotFoundError:
            return {}

    def read(self, folder: Path, name: str) -> bytes:
        return (folder / name).read_bytes()

    def open(self, folder: Path, name: str) -> BinaryIO:
        return open(folder / name, "rb")

    def write(self, folder: Path, name: str, data: bytes) -> None:
        temporary = folder / f".{name}.tmp"
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / name)
        _sync_folder(folder)

    @contextmanager
    def create(self, folder: Path, name: str) -> Iterator[HashingStream]:
        with open(folder / name, "wb") as file:
            yield HashingStream(file)
            file.flush()
            os.fsync(file.fileno())

    def make(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        _sync_folder(folder.parent)

    def rename(self, folder: Path, name: str) -> None:
        folder.rename(folder.with_name(name))
        _sync_folder(folder.parent)

    def remove(self, folder: Path) -> None:
        if not folder.exists():
            return
        (folder / "COMPLETE").unlink(missing_ok=True)
        shutil.rmtree(folder)


class ObjectStore(Store):
    """Prefixes of an object store; a folder is a `RemoteFolder`. Objects appear whole, when their upload ends."""

    def __init__(self, url: str) -> None:
        check_url(url)
        self._url = url
        self._storage = Storage()
        self._opened: Any = None

    @property
    def _fs(self) -> Any:
        """The file system of fsspec, opened when it is first needed: its package is an extra and slow to import."""
        if self._opened is None:
            try:
                self._opened, _ = fsspec.core.url_to_fs(self._url, skip_instance_cache=True, use_listings_cache=False)
            except ImportError as error:
                raise ValueError(f"{self._url} needs a package that is not installed: {error}") from error
        return self._opened

    def subfolders(self, folder: RemoteFolder) -> list[str]:
        return [name for name, entry in self._listed(folder).items() if entry["type"] == "directory"]

    def files(self, folder: RemoteFolder) -> dict[str, int]:
        return {name: int(entry["size"]) for name, entry in self._listed(folder).items() if entry["type"] == "file"}

    def read(self, folder: RemoteFolder, name: str) -> bytes:
        return self._storage.read_whole(f"{folder.url}/{name}", _MAX_TEXT_BYTES)

    def open(self, folder: RemoteFolder, name: str) -> BinaryIO:
        return self._storage.open(f"{folder.url}/{name}")

    def write(self, folder: RemoteFolder, name: str, data: bytes) -> None:
        self._storage.write_whole(f"{folder.url}/{name}", data)

    @contextmanager
    def create(self, folder: RemoteFolder, name: str) -> Iterator[HashingStream]:
        url = f"{folder.url}/{name}"
        file = self._fs.open(url, "wb")
        stream = HashingStream(file)
        try:
            yield stream
            file.close()
        except BaseException:
            file.discard()
            if isinstance(file, AbstractBufferedFile):
                file.closed = True  # closing would publish what has arrived, and so would the destructor
            raise
        size_bytes = self._storage.info(url).size_bytes
        if size_bytes != stream.size_bytes:
            raise OSError(f"{url}: {stream.size_bytes:,} bytes were written, the store holds {size_bytes:,}")

    def make(self, folder: RemoteFolder) -> None:
        """Object stores have no folders."""

    def rename(self, folder: RemoteFolder, name: str) -> None:
        for file in self.files(folder):  # by the server; s3fs cannot move a folder, which to S3 is none
            self._fs.cp_file(f"{folder.url}/{file}", f"{folder.parent.url}/{name}/{file}")
        self.remove(folder)

    def remove(self, folder: RemoteFolder) -> None:
        names = sorted(self.files(folder), key=lambda name: (name != "COMPLETE", name))
        for part in (names[:1], names[1:]):
            if part:
                self._fs.rm([f"{folder.url}/{name}" for name in part])

    def _listed(self, folder: RemoteFolder) -> dict[str, Any]:
        """What lies directly in a folder, by name. Not `find`: that passes over errors, and a folder that could not be
        listed would look like a run that has no checkpoints.
        """
        try:
            entries = self._fs.ls(folder.url, detail=True, refresh=True)
        except FileNotFoundError:
            return {}
        root = self._fs._strip_protocol(folder.url).rstrip("/")
        found = {str(entry["name"]).rstrip("/"): entry for entry in entries}
        return {posixpath.basename(name): entry for name, entry in found.items() if name != root}


LOCAL = LocalStore()


@dataclass(frozen=True)
class RemoteFolder:
    """A folder of an object store: what `Path` is for local ones. Folders made from one share its connections."""

    url: str
    """Without a slash at the end."""
    store: ObjectStore = field(compare=False, repr=False)

    @property
    def name(self) -> str:
        return posixpath.basename(self.url)

    @property
    def parent(self) -> RemoteFolder:
        return RemoteFolder(posixpath.dirname(self.url), self.store)

    def __truediv__(self, name: str) -> RemoteFolder:
        return RemoteFolder(f"{self.url}/{name}", self.store)

    def __str__(self) -> str:
        return self.url


Place = Path | RemoteFolder


def place_of(where: str | Place) -> Place:
    """The place that a path or URL names. Raises ValueError for a URL that may not be opened."""
    if not isinstance(where, str):
        return where
    if not is_remote(where):
        return local_path(where)
    return RemoteFolder(where.rstrip("/"), ObjectStore(where))


def store_of(place: Place) -> Store:
    return place.store if isinstance(place, RemoteFolder) else LOCAL


def check_writable(folder: str) -> None:
    """Raises ValueError for a URL that checkpoints cannot be saved to."""
    check_url(folder)
    if is_remote(folder) and KINDS[scheme_of(folder)] not in _WRITABLE:
        raise ValueError(
            f"checkpoint.folder is {redacted(folder)}, which cannot be saved to; expected a path or a URL of "
            "s3://, gs://, az:// or abfs://"
        )


def _sync_folder(folder: Path) -> None:
    """Has the names in a folder on disk, not only the files' content."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
