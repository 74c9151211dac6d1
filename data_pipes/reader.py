"""From a place (shard, sample) to the bytes of that sample's members.

Enters: a manifest and its index files. Leaves: keys and members, each sample by one ranged read (about 10 us for a
local file in the page cache, where walking the tar costs 120). Why it exists: random access to plain tars, with a check
that what was read is what was indexed. `ByteSource` is the whole of what another kind of storage has to offer.
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

from data_pipes.manifest import Manifest
from data_pipes.shard_index import ShardError, ShardIndex

_BLOCK = 512
_MAX_OPEN_SHARDS = 256
# file handles per reader; processes usually may have 1,024
_MAX_INDEXED_SAMPLES = 1 << 20
# samples of the loaded indexes of a reader: about 100 MB


class ByteSource(ABC):
    """Random access to the bytes of one shard. Safe to use from several threads and after a fork."""

    @abstractmethod
    def size(self) -> int:
        """Bytes in all."""

    @abstractmethod
    def read(self, offset: int, length: int) -> bytes:
        """The bytes [offset, offset + length); fewer only where the source ends."""

    @abstractmethod
    def close(self) -> None:
        """Frees the handle; also happens when the source is forgotten."""


class LocalSource(ByteSource):
    """A file on a file system. `pread` has no file position, so threads and forked processes share it safely."""

    def __init__(self, path: Path) -> None:
        self._handle: int | None = None
        self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def size(self) -> int:
        assert self._handle is not None
        return os.fstat(self._handle).st_size

    def read(self, offset: int, length: int) -> bytes:
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
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)

    def __del__(self) -> None:
        self.close()


class RawSample(NamedTuple):
    """A sample as it is stored."""

    key: str
    members: dict[str, bytes]  # by extension, lower case, without the leading dot
    found: tuple[str, ...]  # the extensions of all members, wanted or not


class ShardReader:
    """Reads samples of a data set at random. Cheap to pickle: handles and indexes are opened again where it arrives."""

    def __init__(
        self,
        manifest: Manifest,
        extensions: Collection[str] | None = None,
        open_source: Callable[[Path], ByteSource] = LocalSource,
    ) -> None:
        """extensions: the members to read (None: all); the others are passed over where that saves reading."""
        self.manifest, self._open_source = manifest, open_source
        self._wanted = None if extensions is None else frozenset(extensions)
        self._lock = threading.Lock()
        self._sources: OrderedDict[int, ByteSource] = OrderedDict()
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()
        self._num_indexed = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"manifest": self.manifest, "extensions": self._wanted, "open_source": self._open_source}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def key(self, shard: int, sample: int) -> str:
        """The key of a sample, from the index alone."""
        return self._index(shard).key(sample)

    def read(self, shard: int, sample: int) -> RawSample:
        """One sample. Raises ShardError, naming the shard, when the shard is missing, is not the one that was indexed,
        or cannot be read; a training run must not go on with other data than it began with.
        """
        index = self._index(shard)
        key, places = index.key(sample), index.members(sample)
        wanted = places if self._wanted is None else {name: places[name] for name in places if name in self._wanted}
        if not wanted:
            return RawSample(key, {}, tuple(places))
        begin = min(offset for offset, _ in wanted.values()) - _BLOCK
        end = max(offset + size for offset, size in wanted.values())
        data = self._read_range(shard, begin, end - begin)
        members = {}
        for extension, (offset, size) in wanted.items():
            start = offset - begin
            if not _is_header(data[start - _BLOCK : start], key, extension, size):
                raise ShardError(
                    f"{self.manifest.shard_path(shard)}: no header of {key}.{extension} at byte {offset - _BLOCK:,}; "
                    "the shard was changed after it was indexed: restore it, or run `tessera index` and start anew"
                )
            members[extension] = data[start : start + size]
        return RawSample(key, members, tuple(places))

    def close(self) -> None:
        """Forgets handles and indexes; they are opened again when needed."""
        with self._lock:
            self._sources.clear()
            self._indexes.clear()
            self._num_indexed = 0

    def _read_range(self, shard: int, offset: int, length: int) -> bytes:
        try:
            data = self._source(shard).read(offset, length)
        except OSError as error:
            path = self.manifest.shard_path(shard)
            raise ShardError(
                f"{path}: cannot be read at byte {offset:,} ({error.strerror or error}); check the file and its storage"
            ) from error
        if len(data) != length:
            raise ShardError(
                f"{self.manifest.shard_path(shard)}: it has {len(data):,} of the {length:,} bytes from byte {offset:,} "
                "on; the shard was cut while it was open: restore it"
            )
        return data

    def _source(self, shard: int) -> ByteSource:
        with self._lock:
            if shard in self._sources:
                self._sources.move_to_end(shard)
                return self._sources[shard]
        path, expected = self.manifest.shard_path(shard), self.manifest.shards[shard].size_bytes
        source = self._open_source(path)
        if source.size() != expected:
            raise ShardError(
                f"{path}: {source.size():,} bytes, the manifest says {expected:,}; the shard was cut or replaced: "
                "restore it, or run `tessera index` and start anew"
            )
        with self._lock:
            self._sources[shard] = source
            while len(self._sources) > _MAX_OPEN_SHARDS:  # a source in use lives until its reader drops it
                self._sources.popitem(last=False)
        return source

    def _index(self, shard: int) -> ShardIndex:
        with self._lock:
            if shard in self._indexes:
                self._indexes.move_to_end(shard)
                return self._indexes[shard]
        index = ShardIndex.load(self.manifest.index_path(shard), self.manifest.shards[shard].index_sha256)
        if index.num_samples != self.manifest.shards[shard].num_samples:
            raise ShardError(
                f"{self.manifest.index_path(shard)}: {index.num_samples} samples, the manifest says "
                f"{self.manifest.shards[shard].num_samples}; run `tessera index` again"
            )
        with self._lock:
            if shard not in self._indexes:
                self._indexes[shard] = index
                self._num_indexed += index.num_samples
            while self._num_indexed > _MAX_INDEXED_SAMPLES and len(self._indexes) > 1:
                _, dropped = self._indexes.popitem(last=False)
                self._num_indexed -= dropped.num_samples
        return index


def _is_header(block: bytes, key: str, extension: str, size: int) -> bool:
    """Whether a tar header block belongs to the member KEY.EXTENSION of `size` bytes. Takes 1 us.

    Names beyond ASCII or 100 bytes may stand in an extended header before this one; there the size alone is compared,
    and sizes of 8 GiB and more are not.
    """
    digits = block[124:136].strip(b" \0")
    if size < 1 << 33 and not digits.startswith(b"\x80") and (not digits.isdigit() or int(digits, 8) != size):
        return False
    expected = f"{key}.{extension}"
    if len(expected) > 100 or not expected.isascii():
        return True
    name = block[:100].rstrip(b"\0").decode("ascii", "replace")
    if name != expected and block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].rstrip(b"\0").decode("ascii", "replace") + "/" + name
    return name == expected or (name[: len(key)] == key and name[len(key) :].lower() == "." + extension)
