"""The index of a shard, wherever it lies, checked against the manifest.

Enters: a data set and the number of a shard. Leaves: a `ShardIndex`. Why it exists: the reader of a run, the statistics
and the check of a data set must refuse the same index files, on a disk and in a store.
"""

from __future__ import annotations

import time

from data_pipes.cache.cache import ChunkCache, chunk_key
from data_pipes.errors import ShardError
from data_pipes.shards.collection import Collection
from data_pipes.shards.index_file import ShardIndex
from data_pipes.shards.manifest import Manifest
from data_pipes.store.errors import StorageError
from data_pipes.store.storage import Storage
from data_pipes.store.urls import is_remote, local_path

_MAX_INDEX_BYTES = 1 << 30
"""Size of one index file in a store, at most."""
_KEPT_IN_CACHE_S = 600.0
"""Seconds for which an index in the cache counts as needed; then it makes room for chunks that are needed sooner."""
_LENGTH_BYTES = 8
"""In the cache, an index is preceded by its own length, in so many bytes (little endian)."""


def load_index(
    source: Manifest | Collection, shard: int, storage: Storage, cache: ChunkCache | None = None
) -> ShardIndex:
    """The index of one shard of a data set.

    Args:
        source: the data set, or several of them.
        shard: the shard's number, counted over all data sets of `source`.
        storage: for an index in a store.
        cache: where indexes of a store are looked up first and kept; None: they are requested each time.

    Raises:
        ShardError: the index is missing, cannot be read from the store, is damaged or is not the manifest's.
    """
    collection = Collection.of(source)
    url, entry = collection.index_url(shard), collection.entry(shard)
    index = read_index(url, entry.index_sha256, storage, cache)
    if (index.num_samples, index.size_bytes) != (entry.num_samples, entry.size_bytes):
        raise ShardError(
            f"{url}: {index.num_samples} samples in {index.size_bytes:,} bytes, the manifest says "
            f"{entry.num_samples} in {entry.size_bytes:,}; run `tessera index` again"
        )
    return index


def read_index(place: str, sha256: str, storage: Storage, cache: ChunkCache | None = None) -> ShardIndex:
    """An index file, given by its path or URL.

    Args:
        place: path or URL of the index file.
        sha256: the digest (hex) that the manifest names.
        storage: for an index in a store.
        cache: see `load_index`.

    Raises:
        ShardError: the file is missing, cannot be read from the store, is damaged or has another digest.
    """
    if is_remote(place):
        return ShardIndex.from_bytes(_bytes_from_store(place, sha256, storage, cache), place, sha256)
    return ShardIndex.load(local_path(place), sha256)


def _bytes_from_store(url: str, sha256: str, storage: Storage, cache: ChunkCache | None) -> bytes:
    key = chunk_key(url, sha256, 0, 0, 0)
    if cache is not None and (length := cache.read(key, 0, _LENGTH_BYTES)) is not None:
        data = cache.read(key, _LENGTH_BYTES, int.from_bytes(length, "little"))
        if data is not None:
            return data
    try:
        data = storage.read_whole(url, _MAX_INDEX_BYTES)
    except FileNotFoundError:
        raise ShardError(f"{url}: no such index file; make it with `tessera index`") from None
    except StorageError as error:
        raise ShardError(str(error)) from error
    if cache is not None:
        cache.put(key, len(data).to_bytes(_LENGTH_BYTES, "little") + data, time.time() + _KEPT_IN_CACHE_S)
    return data
