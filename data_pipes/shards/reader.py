"""From a place (shard, sample) to the bytes of that sample's members.

Enters: a manifest and its index files. Leaves: keys and members, each sample by one ranged read (about 10 us for a
local file in the page cache, where walking the tar costs 120). Why it exists: random access to plain tars, on disk or
in an object store, with a check that what was read is what was indexed.

A sample of an object in a store comes out of the node's chunk cache where the prefetcher has put its chunk, else by a
request for exactly its bytes, many at once; so a miss costs one round trip for a whole batch and no needless byte.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple

from cachetools import LRUCache

from data_pipes.cache.cache import ChunkCache, chunk_key
from data_pipes.errors import ShardError
from data_pipes.shards.collection import Collection, Place
from data_pipes.shards.index_file import ShardIndex
from data_pipes.shards.load_index import load_index
from data_pipes.shards.manifest import Manifest
from data_pipes.shards.tar import BLOCK, is_header_of
from data_pipes.shards.wanted import WantedMembers
from data_pipes.store.counters import CounterName, Counters
from data_pipes.store.errors import StorageError
from data_pipes.store.files import LocalFile
from data_pipes.store.storage import Storage
from data_pipes.store.transport import ByteRange
from data_pipes.store.urls import is_remote, local_path

_MAX_OPEN_SHARDS = 256
"""File handles per reader; processes usually may have 1,024."""
_MAX_INDEXED_SAMPLES = 1 << 20
"""Samples of the loaded indexes of a reader: about 100 MB."""


class RawSample(NamedTuple):
    """A sample as it is stored."""

    key: str
    members: dict[str, bytes]
    """The wanted members by extension, in lower case without the leading dot."""
    found: tuple[str, ...]
    """The extensions of all members, wanted or not."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What has to be read of one sample."""

    place: Place
    key: str
    found: tuple[str, ...]
    members: dict[str, tuple[int, int]]
    """Extension -> (offset of the data, size) in the shard, in bytes."""
    begin: int
    """Where the bytes to read begin in the shard: at the first member's header."""
    length: int
    """How many bytes to read."""
    chunk_begin: int
    """Where the chunk around the sample begins in the shard."""
    chunk_length: int
    """Bytes of that chunk; 0 where it is not known."""


class ShardReader:
    """Reads samples of one or several data sets at random. Safe for threads; cheap to pickle: handles, connections and
    indexes are opened again where it arrives.
    """

    def __init__(
        self,
        source: Manifest | Collection,
        extensions: Iterable[str] | None = None,
        storage: Storage | None = None,
        cache: ChunkCache | None = None,
    ) -> None:
        """Opens nothing yet: indexes and shards are opened when they are first needed.

        Args:
            source: the data set, or several of them.
            extensions: the members to read (see `WantedMembers`), None for all; the others are passed over where that
                saves reading.
            storage: for objects in a store; None: one with the default settings.
            cache: where chunks and indexes of a store are looked up first; None: nowhere.
        """
        self.collection = Collection.of(source)
        self.storage, self.cache = storage or Storage(), cache
        self.counters = Counters()
        self._wanted = None if extensions is None else tuple(extensions)
        self._is_wanted = None if self._wanted is None else WantedMembers(self._wanted)
        self._lock = threading.Lock()
        # What is dropped while somebody uses it lives until that one forgets it.
        self._files: LRUCache[int, LocalFile] = LRUCache(_MAX_OPEN_SHARDS)
        self._indexes: LRUCache[int, ShardIndex] = LRUCache(_MAX_INDEXED_SAMPLES, _num_indexed)
        self._parts: LRUCache[tuple[int, int], ShardIndex] = LRUCache(_MAX_INDEXED_SAMPLES, _num_indexed)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "source": self.collection,
            "extensions": self._wanted,
            "storage": self.storage,
            "cache": self.cache,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def key(self, shard: int, sample: int) -> str:
        """The key of a sample, from the index alone."""
        return self._index(shard).key(sample)

    def extensions(self, shard: int) -> tuple[str, ...]:
        """The extensions of a shard's members, from the index alone."""
        return self._index(shard).extensions

    def read(self, shard: int, sample: int) -> RawSample:
        """One sample.

        Raises:
            ShardError: the shard is missing, is not the one that was indexed, or cannot be read; a training run must
                not go on with other data than it began with. The message names the shard.
        """
        return next(self.read_many([Place(shard, sample)]))

    def read_many(self, places: Sequence[Place]) -> Iterator[RawSample]:
        """Samples in the order of `places`. Local ones are read when they are taken; those of a store are all under way
        at once before the first is given out.

        Raises:
            ShardError: see `read`.
        """
        if not self.collection.is_remote:
            for place in places:
                wanted = self._look_up(place)
                yield self._split(wanted, self._read_file(wanted) if wanted.members else b"")
            return
        under_way = [(wanted, self._start(wanted)) for wanted in map(self._look_up, places)]
        try:
            for wanted, answer in under_way:
                data = answer if isinstance(answer, bytes) else _result(answer)
                self.counters.add("bytes_used", len(data))
                yield self._split(wanted, data)
        finally:
            for _, answer in under_way:
                if not isinstance(answer, bytes):
                    answer.cancel()

    def chunk_range(self, place: Place) -> tuple[str, ByteRange]:
        """The chunk around a place whose chunk is known: its key in the cache, and its range of bytes."""
        index = self._index_of(place)
        begin, length = _chunk_bounds(index, place)
        wanted = self._byte_range(place.shard, begin, length)
        return chunk_key(wanted.url, wanted.etag, wanted.size_bytes, begin, length), wanted

    def take_sums(self) -> dict[CounterName, float]:
        """What was counted here, in the storage and in the cache since the last call."""
        total = Counters()
        for counters in (self.counters, self.storage.counters, *([] if self.cache is None else [self.cache.counters])):
            total.merge(counters.take())
        return total.take()

    def close(self) -> None:
        """Forgets handles, connections and indexes; they are opened again when needed."""
        with self._lock:
            self._files.clear()
            self._indexes.clear()
            self._parts.clear()
        self.storage.close()

    def _look_up(self, place: Place) -> _Wanted:
        """What has to be read of the sample at a place, from the index."""
        index, sample = self._index_of(place), place.sample
        if place.size and index.num_samples == place.size:  # a part begins at the chunk's first sample
            sample -= place.first
        key, places = index.key(sample), index.members(sample)
        wanted = self._is_wanted
        members = places if wanted is None else {name: places[name] for name in places if name in wanted}
        if not members:
            return _Wanted(place, key, tuple(places), {}, 0, 0, 0, 0)
        begin = min(offset for offset, _ in members.values()) - BLOCK
        end = max(offset + size for offset, size in members.values())
        bounds = _chunk_bounds(index, place) if place.size and self.cache is not None else (0, 0)
        return _Wanted(place, key, tuple(places), members, begin, end - begin, *bounds)

    def _split(self, wanted: _Wanted, data: bytes) -> RawSample:
        """The sample in the bytes that were read for it.

        Raises:
            ShardError: a member's header is not there.
        """
        members = {}
        for extension, (offset, size) in wanted.members.items():
            start = offset - wanted.begin
            if not is_header_of(data[start - BLOCK : start], wanted.key, extension, size):
                raise ShardError(
                    f"{self.collection.shard_url(wanted.place.shard)}: no header of {wanted.key}.{extension} at byte "
                    f"{offset - BLOCK:,}; the shard was changed after it was indexed: restore it, or run "
                    "`tessera index` and start anew"
                )
            members[extension] = data[start : start + size]
        return RawSample(wanted.key, members, wanted.found)

    def _start(self, wanted: _Wanted) -> bytes | Future[bytes]:
        """The bytes of a sample where they are on this node, else a request that is under way."""
        if not wanted.members:
            return b""
        url, entry = self.collection.shard_url(wanted.place.shard), self.collection.entry(wanted.place.shard)
        if not is_remote(url):
            return self._read_file(wanted)
        if self.cache is not None and wanted.chunk_length:
            key = chunk_key(url, entry.etag, entry.size_bytes, wanted.chunk_begin, wanted.chunk_length)
            data = self.cache.read(key, wanted.begin - wanted.chunk_begin, wanted.length)
            if data is not None:
                return data
            self.counters.add("cache_misses")
        return self.storage.submit(self._byte_range(wanted.place.shard, wanted.begin, wanted.length))

    def _byte_range(self, shard: int, offset: int, length: int) -> ByteRange:
        entry = self.collection.entry(shard)
        return ByteRange(self.collection.shard_url(shard), offset, length, entry.size_bytes, entry.etag)

    def _read_file(self, wanted: _Wanted) -> bytes:
        shard, offset, length = wanted.place.shard, wanted.begin, wanted.length
        try:
            data = self._file(shard).read(offset, length)
        except OSError as error:
            raise ShardError(
                f"{self.collection.shard_url(shard)}: cannot be read at byte {offset:,} ({error.strerror or error}); "
                "check the file and its storage"
            ) from error
        if len(data) != length:
            raise ShardError(
                f"{self.collection.shard_url(shard)}: it has {len(data):,} of the {length:,} bytes from byte "
                f"{offset:,} on; the shard was cut while it was open: restore it"
            )
        self.counters.add("bytes_used", length)
        return data

    def _file(self, shard: int) -> LocalFile:
        with self._lock:
            known = self._files.get(shard)
        if known is not None:
            return known
        path, expected = local_path(self.collection.shard_url(shard)), self.collection.entry(shard).size_bytes
        file = LocalFile(path)
        if file.size() != expected:
            raise ShardError(
                f"{path}: {file.size():,} bytes, the manifest says {expected:,}; the shard was cut or replaced: "
                "restore it, or run `tessera index` and start anew"
            )
        with self._lock:
            return self._files.setdefault(shard, file)

    def _index_of(self, place: Place) -> ShardIndex:
        """The shard's index, or the part of it that covers the place's chunk.

        The windows of a large data set lie in chunks of thousands of shards, whose indexes together are far larger than
        memory; the parts of the chunks in use are not.
        """
        if not place.size:
            return self._index(place.shard)
        name = place.shard, place.first
        with self._lock:
            known = self._indexes.get(place.shard) or self._parts.get(name)
        if known is not None:
            return known
        part = self._index(place.shard).part(place.first, place.size)
        with self._lock:
            return self._parts.setdefault(name, part)

    def _index(self, shard: int) -> ShardIndex:
        with self._lock:
            known = self._indexes.get(shard)
        if known is not None:
            return known
        index = load_index(self.collection, shard, self.storage, self.cache)
        with self._lock:
            return self._indexes.setdefault(shard, index)


def _num_indexed(index: ShardIndex) -> int:
    """What an index counts in the least recently used ones: a single one is kept, however large."""
    return min(index.num_samples, _MAX_INDEXED_SAMPLES)


def _result(answer: Future[bytes]) -> bytes:
    """The answer of a store; its failures become ShardErrors."""
    try:
        return answer.result()
    except (StorageError, FileNotFoundError, PermissionError) as error:
        raise ShardError(str(error)) from error


def _chunk_bounds(index: ShardIndex, place: Place) -> tuple[int, int]:
    """The first byte and the length of a place's chunk in its shard."""
    first = 0 if index.num_samples == place.size else place.first
    begin, last = int(index.sample_offset[first]), first + place.size - 1
    return begin, int(index.sample_offset[last] + index.sample_size[last]) - begin
