"""Reading objects of any allowed store by ranges: many at once, retried, held to one version.

Enters: URLs and `ByteRange`s. Leaves: exactly the bytes asked for, or an error that names the object. Why it exists: a
training run of days meets servers that throttle, stall, drop connections and ignore what was asked, and shards that
somebody replaces; all of it is met below this class, once for every kind of store.
"""

from __future__ import annotations

import io
import os
import threading
import weakref
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

from data_pipes.store.connections import Connections, kind_of
from data_pipes.store.counters import Counters
from data_pipes.store.errors import StorageError
from data_pipes.store.files import write_atomically
from data_pipes.store.range_stream import RangeStream
from data_pipes.store.transport import ByteRange, ObjectInfo, StorageConfig
from data_pipes.store.urls import local_path

__all__ = ["ByteRange", "ObjectInfo", "Storage", "StorageConfig", "StorageError"]


@dataclass
class _InOneProcess:
    """What a Storage has in one process."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    counters: Counters = field(default_factory=Counters)
    connections: Connections | None = None


class Storage:
    """Reads objects by ranges. Safe for threads and after a fork; cheap to pickle: connections are opened where it is
    used.

    Raises:
        StorageError: retries are used up, or the store refuses; for a missing object it is a FileNotFoundError as well,
            for one that may not be read a PermissionError.
        ShardError: an object is not the one expected.
        ValueError: a URL may not be opened.
    """

    def __init__(self, config: StorageConfig | None = None) -> None:
        self.config = config or StorageConfig()
        self._processes: dict[int, _InOneProcess] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def counters(self) -> Counters:
        """What this process counted; the names are in data_pipes.store.counters, under "requests to stores"."""
        return self._in_this_process().counters

    def info(self, url: str) -> ObjectInfo:
        """Size and etag of an object, as the store says now."""
        kind_of(url)
        connections = self._connections()
        return connections.submit(connections.info(url)).result()

    def read_range(self, wanted: ByteRange) -> bytes:
        """Exactly the bytes [offset, offset + length) of the object, or an error."""
        return self.submit(wanted).result()

    def submit(self, wanted: ByteRange) -> Future[bytes]:
        """The same without waiting; at most `StorageConfig.requests` of all that is submitted are under way at once."""
        kind_of(wanted.url)
        if wanted.offset < 0 or wanted.length < 0 or wanted.offset + wanted.length > wanted.size_bytes:
            raise ValueError(
                f"{wanted.url}: bytes {wanted.offset:,} to {wanted.offset + wanted.length:,} of an object of "
                f"{wanted.size_bytes:,} bytes; expected a range inside"
            )
        connections = self._connections()
        return connections.submit(connections.read(wanted))

    def read_whole(self, url: str, max_bytes: int) -> bytes:
        """All of an object.

        Raises:
            StorageError: it has more than `max_bytes`; and what `Storage` raises.
        """
        info = self.info(url)
        if info.size_bytes > max_bytes:
            raise StorageError(f"{url}: {info.size_bytes:,} bytes, expected at most {max_bytes:,}")
        return self.read_range(ByteRange(url, 0, info.size_bytes, info.size_bytes, info.etag))

    def write_whole(self, url: str, data: bytes) -> None:
        """Writes an object; a reader sees the old or the new one, never a part. Folders are made as needed."""
        if kind_of(url) == "file":
            write_atomically(local_path(url), data)
            return
        connections = self._connections()
        connections.submit(connections.write(url, data)).result()

    def list(self, url: str) -> list[str]:
        """The objects directly in a folder, or those that a pattern with * names: full URLs, sorted."""
        kind_of(url)
        connections = self._connections()
        return connections.submit(connections.list(url)).result()

    def open(self, url: str) -> BinaryIO:
        """An object as a seekable file; what is read in order is fetched ahead."""
        if kind_of(url) == "file":
            return open(local_path(url), "rb")
        info = self.info(url)
        read = lambda offset, length: self.submit(ByteRange(url, offset, length, info.size_bytes, info.etag))
        return cast(BinaryIO, io.BufferedReader(RangeStream(read, info.size_bytes, self.config.request_bytes)))

    def close(self) -> None:
        """Ends what is under way in this process; it is opened anew when needed."""
        process = self._in_this_process()
        with process.lock:
            connections, process.connections = process.connections, None
        if connections is not None:
            connections.close()

    def _connections(self) -> Connections:
        process = self._in_this_process()
        with process.lock:
            if process.connections is None:
                process.connections = Connections(self.config, process.counters)
                weakref.finalize(self, process.connections.close)  # also at the interpreter's exit
            return process.connections

    def _in_this_process(self) -> _InOneProcess:
        """This process's part. The one that a fork brought along stays untouched: its sockets are the parent's, its
        thread does not exist here, and its lock may have been held.
        """
        process = self._processes.get(os.getpid())
        return process or self._processes.setdefault(os.getpid(), _InOneProcess())
