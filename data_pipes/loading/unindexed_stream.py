"""Samples from shards that cannot be read at random: compressed tars, read from front to back.

Enters: the names of shards (paths, URLs) and a seed. Leaves: an endless stream of `RawSample`s for one rank. Why it
exists: data that somebody else packed as tar.gz can be tried without packing it again. It is webdataset's own pipeline
(grouping, shuffle buffer), but neither its way of opening (shells, curl) nor its tar reader, which drops the rest of a
damaged shard without a word: shards are opened by data_pipes.store.storage and walked strictly, to the end of the
compressed stream, and whatever is wrong with one is a ShardError. Nothing is decoded or unpickled by webdataset; its
secure mode (WDS_SECURE=1) is switched on all the same, for this process and those that it starts.

Order: pass k over the shards is a permutation of its own, keyed by (seed, position, k). The passes end to end are dealt
to the ranks in turn, so each pass reads each shard once, whatever the number of shards and ranks.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from types import ModuleType
from typing import Any, BinaryIO, cast

from data_pipes.bounds import bounded
from data_pipes.errors import ShardError
from data_pipes.index.walk import SampleGroups, split_name
from data_pipes.order.hashing import feistel, hash64, hash_words
from data_pipes.shards.reader import RawSample
from data_pipes.shards.tar import TarMember, TarProblem
from data_pipes.shards.tar_stream import walk_tar_stream
from data_pipes.shards.wanted import WantedMembers
from data_pipes.store.counters import Counters
from data_pipes.store.errors import StorageError
from data_pipes.store.storage import Storage
from data_pipes.store.urls import check_url

_MAX_SHARDS = 1_000_000
"""That `data.unindexed.urls` may name."""
_ORDER_TAG, _SHUFFLE_TAG = 0x756E696478, 0x73687566
"""Tell the seeds of the order of shards and of the shuffle buffer from each other."""
_COMPRESSED: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
"""By the first bytes of a file, what unpacks it."""
_ZSTD = b"\x28\xb5\x2f\xfd"
"""The first bytes of a file that nothing here unpacks."""


@dataclass(frozen=True)
class UnindexedConfig:
    """Shards that are streamed. Resume is approximate: see data_pipes.loading.unindexed_loader."""

    urls: list[str] = field(default_factory=list)
    """Paths or URLs of shards (.tar, .tar.gz, .tar.bz2, .tar.xz); {000..099} stands for many, * for those that are
    there."""
    shuffle: int = bounded(1000, least=0)
    """Samples held in memory, per rank, of which the next is drawn; 1: the order of the shards."""
    max_member_bytes: int = bounded(1 << 30, least=1)
    """Bytes of one member, unpacked; a larger one stops the run."""

    def __post_init__(self) -> None:
        if self.shuffle < 1 or self.max_member_bytes < 1:
            raise ValueError(
                f"data.unindexed.shuffle is {self.shuffle}, max_member_bytes {self.max_member_bytes}; expected >= 1"
            )


def expand_urls(patterns: Sequence[str], storage: Storage) -> list[str]:
    """The shards that patterns name, in order.

    Args:
        patterns: see `UnindexedConfig.urls`.
        storage: lists what * stands for.
    Raises:
        ValueError: they name no shard or too many, or a URL may not be opened (see data_pipes.store.urls.check_url).
    """
    from braceexpand import braceexpand

    if isinstance(patterns, str):
        raise ValueError(f"data.unindexed.urls is {patterns!r}; expected a list of paths or URLs")
    urls: list[str] = []
    for pattern in patterns:
        check_url(pattern)
        for url in islice(braceexpand(pattern), _MAX_SHARDS + 1):
            check_url(url)
            urls += storage.list(url) if "*" in url else [url]
            if len(urls) > _MAX_SHARDS:
                raise ValueError(f"data.unindexed.urls: {pattern} names more than {_MAX_SHARDS:,} shards")
    if not urls:
        raise ValueError(
            "data.unindexed.urls names no shard; expected paths or URLs such as s3://BUCKET/{000..099}.tar.gz"
        )
    return urls


class SampleStream:
    """The samples of one rank, endless. One thread at a time."""

    def __init__(
        self,
        urls: Sequence[str],
        extensions: Iterable[str],
        storage: Storage,
        config: UnindexedConfig,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """
        Args:
            urls: of all shards.
            extensions: of the members that are kept; the others are passed over.
            storage: opens the shards.
            config: the size of the shuffle buffer, and the limit of a member.
            seed: of the run.
            rank: of this process.
            world_size: number of ranks.
        """
        self.urls, self.storage, self.config = list(urls), storage, config
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.counters = Counters()
        self._extensions = WantedMembers(extensions)

    def samples(self, position: int) -> Iterator[tuple[str, RawSample]]:
        """The samples, a pure function of (urls, seed, rank, world size, position).

        Args:
            position: samples consumed by all ranks when this stream begins.
        Yields:
            (shard, sample).
        Raises:
            ShardError: a shard is damaged, or none has a sample.
            StorageError: a shard cannot be read.
        """
        with secure_webdataset() as webdataset:
            yield from self._samples(webdataset, position)

    def _samples(self, webdataset: ModuleType, position: int) -> Iterator[tuple[str, RawSample]]:
        rng = random.Random(hash64(_SHUFFLE_TAG, self.seed, position, self.rank))
        pipeline = webdataset.DataPipeline(
            lambda: ({"url": url} for url in self.shard_order(position)),
            self._members,
            partial(webdataset.tariterators.group_by_keys, keys=split_name),
            webdataset.filters.shuffle(self.config.shuffle, initial=self.config.shuffle, rng=rng),
        )
        for sample in pipeline:
            members = {name: data for name, data in sample.items() if not name.startswith("__") and data is not None}
            found = tuple(name for name in sample if not name.startswith("__"))
            yield sample["__url__"], RawSample(sample["__key__"], members, found)

    def shard_order(self, position: int) -> Iterator[str]:
        """The shards of this rank, in the order of reading, endless."""
        size = len(self.urls)
        for turn in count(self.rank, self.world_size):
            key = hash_words(_ORDER_TAG, self.seed, position, turn // size)
            yield self.urls[int(feistel(turn % size, size, key)[0])]

    def _members(self, shards: Iterator[dict[str, str]]) -> Iterator[dict[str, Any]]:
        """A stage of webdataset's pipeline, in the place of its tar reader: the members of each shard, then {}."""
        empty = 0
        for shard in shards:
            url, found = shard["url"], False
            for name, data in read_members(url, self.storage, self._extensions, self.config.max_member_bytes):
                found = True
                yield {"fname": name, "data": data, "__url__": url}
            yield {}  # ends the sample: the next shard may begin with the same key
            self.counters.add("shards_read")
            empty = 0 if found else empty + 1
            if empty > 2 * len(self.urls):
                raise ShardError(
                    f"none of the {len(self.urls)} shards holds a sample, e.g. {url}; expected members KEY.EXTENSION"
                )


def read_members(
    url: str, storage: Storage, extensions: WantedMembers, max_member_bytes: int
) -> Iterator[tuple[str, bytes | None]]:
    """The members of a shard that belong to samples.

    Args:
        url: of the shard.
        storage: opens it.
        extensions: of the members whose data are wanted.
        max_member_bytes: of one member, unpacked.
    Yields:
        (name, data); the data are None for unwanted extensions.
    Raises:
        ShardError: the shard is damaged, cut short, not sorted by key, or has a member above the limit.
        StorageError: it cannot be read.
    """
    groups = SampleGroups()
    with ExitStack() as stack:
        try:
            stream = stack.enter_context(storage.open(url))
            unpacked = stack.enter_context(_unpacked(stream, url))
            for member, read in walk_tar_stream(unpacked):
                extension = _extension_of(member, groups)
                if not extension:
                    continue
                if member.size > max_member_bytes:
                    raise TarProblem(
                        f"{member.name!r} has {member.size:,} bytes, more than data.unindexed.max_member_bytes = "
                        f"{max_member_bytes:,}",
                        member.header,
                        "raise the limit if such members are wanted",
                    )
                yield member.name, read() if extension in extensions else None
        except TarProblem as problem:
            raise ShardError(f"{url}: {problem}") from problem
        except StorageError:
            raise
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise ShardError(
                f"{url}: cannot be read or unpacked ({type(error).__name__}: {error}); it is damaged or cut short: "
                "copy it again from its source"
            ) from error


def _extension_of(member: TarMember, groups: SampleGroups) -> str:
    """The member's extension; "" where it belongs to no sample, or has a name that webdataset keeps for itself."""
    key, extension = split_name(member.name)
    if member.is_folder or not extension or extension.startswith("__"):
        return ""
    groups.add(member, key, extension)
    return extension


def _unpacked(stream: BinaryIO, url: str) -> BinaryIO:
    """The tar in a file that may be compressed, told by its first bytes."""
    head = stream.read(6)
    stream.seek(0)
    if head.startswith(_ZSTD):
        raise ShardError(f"{url}: compressed with zstd, which is not supported; use gzip, bzip2, xz or no compression")
    for magic, opener in _COMPRESSED.items():
        if head.startswith(magic):
            return cast(BinaryIO, opener(stream, "rb"))
    return stream


@contextmanager
def secure_webdataset() -> Iterator[ModuleType]:
    """webdataset in its secure mode, also where it was imported without: no pipes, no pickles, no local files opened
    by name. The mode is the process's, so it ends with the stream: packing writes through webdataset too.
    """
    import webdataset
    import webdataset.tariterators
    import webdataset.utils

    before = webdataset.utils.enforce_security, os.environ.get("WDS_SECURE")
    webdataset.utils.enforce_security = True
    os.environ["WDS_SECURE"] = "1"  # read at import, in the processes that this one starts
    try:
        yield cast(ModuleType, webdataset)
    finally:
        webdataset.utils.enforce_security = before[0]
        if before[1] is None:
            os.environ.pop("WDS_SECURE", None)
        else:
            os.environ["WDS_SECURE"] = before[1]
