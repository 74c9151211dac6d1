"""Chunks of remote shards on a local disk: shared by the ranks of a node and by several runs, within a hard cap.

Enters: chunks that somebody fetched, and when each is needed next. Leaves: parts of chunks, compared with their
checksums. Why it exists: a data set that is read every epoch should cross the network once, and a disk that a cache has
filled stops everybody on the machine. The order of the samples is known, so what is evicted is what is needed last.

    cache = ChunkCache(CacheConfig(dir="/local/cache", max_bytes=500 << 30))
    key = chunk_key(url, etag, size_bytes, offset, length)
    data = cache.read(key, begin, num_bytes)        # None: fetch it from the store
    cache.put(key, chunk, next_use_s=time.time() + 60)
    cache.set_next_use({key: PINNED})               # in use; math.inf: not needed any more
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from cachetools import LRUCache

from data_pipes.cache.chunk_file import ChunkFile, DamagedError, file_bytes, write_chunk_file
from data_pipes.cache.folder import CacheConfig, CacheStatus, CacheUser, check_is_cache, checked_folder
from data_pipes.cache.index import CacheIndex
from data_pipes.store.counters import Counters

__all__ = ["PINNED", "CacheConfig", "CacheStatus", "CacheUser", "ChunkCache", "chunk_key", "open_cache"]

PINNED = 0.0
"""The next use of a chunk that is in use now: it is not evicted while the process lives that says so."""
_MAX_OPEN_CHUNKS = 256
"""File handles per process. They hold no space: evicted files are emptied."""
_KEY = re.compile(r"[0-9a-f]{64}")
_logger = logging.getLogger(__name__)


def chunk_key(url: str, etag: str | None, size_bytes: int, offset: int, length: int) -> str:
    """The name of a chunk: bytes [offset, offset + length) of an object in one of its versions.

    Args:
        url: of the object.
        etag: of the object's version; None: unknown.
        size_bytes: of the whole object.
        offset: first byte of the chunk.
        length: bytes of the chunk.
    Returns:
        64 hex digits.
    """
    return hashlib.sha256(json.dumps([url, etag, size_bytes, offset, length]).encode()).hexdigest()


class ChunkCache:
    """The cache as one process sees it. Safe for threads, for many processes, and for kills at any moment; cheap to
    pickle: it is opened again where it arrives. A disk that fails or fills up costs speed, never the run.
    """

    def __init__(self, config: CacheConfig) -> None:
        """
        Args:
            config: its `dir` is not None.
        Raises:
            ValueError: the folder cannot be made or used, or the cap holds no chunk.
        """
        self.config = config
        folder = checked_folder(config)
        self.counters = Counters()
        self._lock = threading.Lock()
        self._open = _no_chunks()
        self._process_id, self._warned = os.getpid(), False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            check_is_cache(folder, may_be_new=True)
            self._index = _open_index(folder, config.max_bytes)
        except OSError as error:
            raise ValueError(
                f"data.cache.dir is {config.dir}: the folder cannot be used ({error.strerror or error}); name one on a "
                "local disk that this process may write to, or none"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def read(self, key: str, offset: int, length: int) -> bytes | None:
        """A part of a chunk, in 15 us for 100 KB.

        A block is compared with its checksum when this process reads it for the first time; a damaged chunk is removed.

        Args:
            key: of `chunk_key`.
            offset: first byte, counted from the chunk's first one.
            length: number of bytes.
        Returns:
            The bytes; None: the chunk is not there, or was damaged.
        """
        self._notice_fork()
        for _ in range(2):  # a file that was evicted while it was open may have come back as another one
            try:
                data = self._chunk(key).read(offset, length)
            except FileNotFoundError:
                return None
            except DamagedError as error:
                self._drop_damaged(key, error)
                return None
            except OSError as error:
                self._warn(error)
                return None
            if data is not None:
                self.counters.merge({"cache_hits": 1, "cache_hit_bytes": length})
                return data
            self._forget([key])
        return None

    def contains(self, key: str) -> bool:
        """Whether a chunk is there, as far as its file tells."""
        try:
            return os.stat(self._index.chunk_path(_checked(key))).st_size > 0
        except OSError:
            return False

    def has_room(self, length: int, next_use_s: float) -> bool:
        """Whether `put` would take a chunk of this length now: asked before it is fetched."""
        self._notice_fork()
        try:
            return self._index.has_room(file_bytes(length), next_use_s)
        except OSError as error:
            self._warn(error)
            return False

    def put(self, key: str, data: bytes, next_use_s: float) -> bool:
        """Adds a chunk. What is needed no sooner may be evicted for it, the furthest next use first.

        Args:
            key: of `chunk_key`.
            data: the whole chunk.
            next_use_s: when this process needs it next, see `set_next_use`.
        Returns:
            True: it is there, or another process is just writing it. False: it does not fit, or the disk failed; go on
            without.
        """
        self._notice_fork()
        _check_time(next_use_s)
        try:
            reservation = self._index.reserve(_checked(key), file_bytes(len(data)), next_use_s)
        except OSError as error:
            self._warn(error)
            self.counters.add("cache_refused")
            return False
        if reservation.evicted:
            self._forget(reservation.evicted)
            self.counters.add("cache_evictions", len(reservation.evicted))
        if reservation.part is None:
            if not reservation.present:
                self.counters.add("cache_refused")
            return reservation.present
        finished = False
        try:
            write_chunk_file(reservation.part, key, data)
            finished = self._index.finish(key, reservation.part)
        except OSError as error:
            self._warn(error)
        finally:
            if not finished:
                self.counters.add("cache_refused")
                with suppress(OSError):
                    self._index.abandon(key, reservation.part)
        return finished

    def set_next_use(self, next_use_s: Mapping[str, float]) -> None:
        """Says when this process needs chunks next.

        It holds until it is said anew, the chunk is evicted, or the process ends.

        Args:
            next_use_s: by key, in seconds of `time.time()`; PINNED: in use now; math.inf: not needed any more. Chunks
                that are not in the cache are passed over.
        """
        self._notice_fork()
        for key, time_s in next_use_s.items():
            _check_time(time_s)
            _checked(key)
        try:
            if next_use_s:
                self._index.claim(next_use_s)
        except OSError as error:
            self._warn(error)

    def status(self) -> CacheStatus:
        """What the folder holds; what dead processes left behind is removed first.

        Raises:
            OSError: the folder or its index cannot be used.
        """
        return self._index.status()

    def clear(self) -> int:
        """Empties the cache, pinned chunks included, but for those being written.

        A read of another process in this moment finds nothing.

        Returns:
            The bytes that are free now.
        Raises:
            OSError: the folder or its index cannot be used.
        """
        freed = self._index.clear()
        self._forget(None)
        return freed

    def close(self) -> None:
        """Gives up this process's claims and handles; both come back when the cache is used again."""
        self._forget(None)
        self._index.close()

    def _chunk(self, key: str) -> ChunkFile:
        with self._lock:
            chunk = self._open.get(key)
        if chunk is not None:
            return chunk
        chunk = ChunkFile(self._index.chunk_path(_checked(key)), key)
        with self._lock:
            return self._open.setdefault(key, chunk)

    def _forget(self, keys: Iterable[str] | None) -> None:
        """Drops the handles of chunks; None: of all."""
        with self._lock:
            for key in list(self._open) if keys is None else keys:
                self._open.pop(key, None)

    def _drop_damaged(self, key: str, error: DamagedError) -> None:
        self._forget([key])
        try:
            if not self._index.drop(key, error.inode):
                return  # somebody else was quicker
        except OSError as problem:
            self._warn(problem)
        self.counters.add("cache_corrupt")
        _logger.warning("%s: damaged (%s); removed from the cache", self._index.chunk_path(key), error)

    def _warn(self, error: OSError) -> None:
        """Once per process: a full disk would say the same thing for each chunk."""
        if not self._warned:
            self._warned = True
            _logger.warning(
                "the cache in %s does not work now (%s); the run goes on and reads more from the store. This is said "
                "once; cache_refused counts what was not cached",
                self.config.dir,
                error,
            )

    def _notice_fork(self) -> None:
        """A forked child has locks and open chunks in whatever state they were, and counts that its parent reports."""
        if os.getpid() != self._process_id:
            self._process_id = os.getpid()
            self._lock, self.counters, self._open = threading.Lock(), Counters(), _no_chunks()


def open_cache(folder: str) -> ChunkCache:
    """The cache that is in a folder, for a look at it.

    Raises:
        ValueError: there is none.
    """
    check_is_cache(Path(folder), may_be_new=False)
    return ChunkCache(CacheConfig(dir=folder))


def _no_chunks() -> LRUCache[str, ChunkFile]:
    """For the open chunks; one that is dropped while it is read lives until its reader forgets it."""
    return LRUCache(_MAX_OPEN_CHUNKS)


def _open_index(folder: Path, max_bytes: int) -> CacheIndex:
    try:
        return CacheIndex(folder, max_bytes)
    except OSError:  # a damaged index is removed where it is met; the second attempt makes a new one
        return CacheIndex(folder, max_bytes)


def _checked(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise ValueError(f"{key!r} is no key of a chunk; make it with chunk_key")
    return key


def _check_time(next_use_s: float) -> None:
    if not 0 <= next_use_s <= math.inf:
        raise ValueError(f"a next use at {next_use_s}; expected seconds of time.time(), PINNED or math.inf")
