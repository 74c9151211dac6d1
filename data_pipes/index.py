"""Indexing: from tar shards that anybody wrote to index files and a manifest.

Enters: tar shards by tessera, stock webdataset or any tar writer. Leaves: `ShardIndex` (saved as `<shard>.tar.idx`) and
a `Manifest`. Why it exists: exact resume, any order and ranged reads over plain tars need the places of the samples;
the walk is strict, so that a damaged shard is found here and not as missing samples in a run. Keys follow webdataset:
the key is the name up to the first dot behind the last slash, the extension is the rest in lower case.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_pipes.manifest import (
    INDEX_SUFFIX,
    MANIFEST_NAME,
    Manifest,
    ShardEntry,
    check_class_names,
    index_path,
)
from data_pipes.shard_index import ShardError, ShardIndex
from data_pipes.tar import TarMember, TarProblem, walk_tar

__all__ = [
    "INDEX_SUFFIX",
    "MANIFEST_NAME",
    "IndexedShard",
    "Manifest",
    "ShardEntry",
    "ShardError",
    "ShardIndex",
    "index_shard",
    "index_shards",
]

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstandard"}
_META_NAME = re.compile(r"__[^/]*__($|/)")  # as webdataset.tariterators.tar_file_iterator skips them


@dataclass(frozen=True)
class IndexedShard:
    """What `index_shards` reports of each shard."""

    entry: ShardEntry
    kept: bool
    # an index that was there is still valid
    num_skipped: int
    # members that belong to no sample, see ShardIndex


@dataclass
class _Builder:
    """Collects members into samples, as webdataset groups them."""

    keys: list[bytes] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    current: str | None = None
    in_sample: set[str] = field(default_factory=set)
    extensions: dict[str, int] = field(default_factory=dict)
    sample_offset: list[int] = field(default_factory=list)
    sample_end: list[int] = field(default_factory=list)
    first_member: list[int] = field(default_factory=list)
    member_extension: list[int] = field(default_factory=list)
    member_offset: list[int] = field(default_factory=list)
    member_size: list[int] = field(default_factory=list)
    num_skipped: int = 0

    def add(self, member: TarMember) -> None:
        key, extension = split_name(member.name)
        if member.is_folder or not extension:
            self.num_skipped += 1
            return
        if key != self.current:
            self._begin(key, member)
        if extension in self.in_sample:
            raise TarProblem(
                f"the sample {key!r} has two members with the extension {extension!r}",
                member.header,
                "give the samples distinct keys and pack the shard again",
            )
        self.in_sample.add(extension)
        self.member_extension.append(self.extensions.setdefault(extension, len(self.extensions)))
        self.member_offset.append(member.data)
        self.member_size.append(member.size)
        self.sample_end[-1] = member.end

    def _begin(self, key: str, member: TarMember) -> None:
        if key in self.seen:
            raise TarProblem(
                f"the members of the sample {key!r} are not adjacent",
                member.header,
                "sort the files by name when packing (`tar --sort=name`), or use `tessera pack`",
            )
        self.seen.add(key)
        self.current, self.in_sample = key, set()
        self.keys.append(key.encode("utf-8", "surrogateescape"))
        self.sample_offset.append(member.header)
        self.sample_end.append(member.end)
        self.first_member.append(len(self.member_offset))

    def finish(self, size_bytes: int, has_end_marker: bool) -> ShardIndex:
        offset = np.array(self.sample_offset, dtype=np.uint64)
        return ShardIndex(
            size_bytes=size_bytes,
            num_skipped=self.num_skipped,
            has_end_marker=has_end_marker,
            extensions=tuple(self.extensions),
            key_bytes=b"".join(self.keys),
            key_end=np.cumsum([len(key) for key in self.keys], dtype=np.uint64),
            sample_offset=offset,
            sample_size=np.array(self.sample_end, dtype=np.uint64) - offset,
            first_member=np.array([*self.first_member, len(self.member_offset)], dtype=np.uint64),
            member_extension=np.array(self.member_extension, dtype=np.uint64),
            member_offset=np.array(self.member_offset, dtype=np.uint64),
            member_size=np.array(self.member_size, dtype=np.uint64),
        )


def split_name(name: str) -> tuple[str, str]:
    """(key, extension in lower case) of a member's name, as webdataset splits it; the extension is "" for what belongs
    to no sample.
    """
    if _META_NAME.match(name):
        return name, ""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (folder + slash + stem, extension.lower()) if stem else (name, "")


def index_shard(path: str | os.PathLike[str], *, allow_missing_end: bool = False) -> ShardIndex:
    """Walks one local tar strictly and returns the places of its samples; reads headers only.

    Raises ShardError on truncation anywhere, a zero block in mid-file, bad checksums, absolute or `..` names, links and
    devices, members of one key that are not adjacent, a repeated extension in a sample, a compressed file, and a shard
    without a sample. `allow_missing_end`: see `walk_tar`.
    """
    builder = _Builder()
    with _open_shard(Path(path)) as (file, size_bytes):
        try:
            end = 0
            for member in walk_tar(file, size_bytes, allow_missing_end=allow_missing_end):
                builder.add(member)
                end = member.end
        except TarProblem as problem:
            hint = ""
            if "without the end marker" in problem.problem:
                hint = "; if its writer is known to omit the end marker, use --allow-missing-end"
            found = f"{len(builder.keys):,} samples begin before that place"
            raise ShardError(
                f"{path}: {problem.problem} (at byte {problem.offset:,}); {found}; {problem.advice}{hint}"
            ) from problem
    if not builder.keys:
        skipped = f" ({builder.num_skipped} members were skipped)" if builder.num_skipped else ""
        raise ShardError(
            f"{path}: the shard holds no sample{skipped}; expected members named KEY.EXTENSION; remove the "
            "shard or pack it again"
        )
    return builder.finish(size_bytes, has_end_marker=size_bytes - end >= 1024)


@contextmanager
def _open_shard(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """The open file and its size; refuses what cannot be a plain tar."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a fifo would wait for ever
            raise ShardError(f"{path}: not a regular file; only tar files on a file system can be indexed")
        file = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise ShardError(
            f"{path}: the shard cannot be opened ({error.strerror}); check the path and its permissions"
        ) from error
    with file:
        size_bytes = os.fstat(file.fileno()).st_size
        if size_bytes == 0:
            raise ShardError(f"{path}: the file is empty (0 bytes); copy or pack the shard again from its source")
        head = file.read(8)
        for magic, name in _COMPRESSED.items():
            if head.startswith(magic):
                raise ShardError(
                    f"{path}: compressed with {name}; single samples cannot be read from a compressed tar, "
                    "and pictures do not get smaller: unpack it to a plain .tar"
                )
        yield file, size_bytes


def index_shards(
    paths: Sequence[str | os.PathLike[str]],
    out_dir: str | os.PathLike[str],
    classes: Iterable[str] = (),
    *,
    index_dir: str | os.PathLike[str] | None = None,
    force: bool = False,
    workers: int = 1,
    allow_missing_end: bool = False,
    on_shard: Callable[[IndexedShard], None] | None = None,
) -> Manifest:
    """Indexes local shards and writes `manifest.json` into `out_dir`; the shards stay untouched.

    The order of `paths` is the order of the dataset. Index files go beside the shards or into `index_dir`. An index
    that is there, intact, of the shard's present size and not older than the shard is kept (so a killed run continues),
    unless `force`. `workers` processes walk the shards. `on_shard` is called in order, for progress.
    Raises ShardError for no shard, the same shard twice, and all that `index_shard` raises.
    """
    root = Path(os.path.abspath(out_dir))  # no symlink is resolved: a dataset may be a folder of links
    shards = [Path(os.path.abspath(path)) for path in paths]
    if workers < 1:
        raise ValueError(f"workers is {workers}; expected a number of processes >= 1")
    if not shards:
        raise ShardError("no shard to index; give tar files, or a folder or pattern that holds some")
    if len(set(shards)) != len(shards):
        repeated = next(path for i, path in enumerate(shards) if path in shards[:i])
        raise ShardError(f"{repeated}: given twice; name each shard once")
    names = check_class_names(classes)
    index_folder = None if index_dir is None else Path(os.path.abspath(index_dir))
    urls = [_relative_to(path, root) for path in shards]
    index_paths = [index_path(path, url, index_folder) for path, url in zip(shards, urls, strict=True)]
    entries = []
    jobs = (shards, index_paths, urls, repeat(force), repeat(allow_missing_end))
    workers = min(workers, len(shards))
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) if workers > 1 else None
    try:
        for indexed in (pool.map if pool else map)(_index_or_keep, *jobs):
            entries.append(indexed.entry)
            if on_shard is not None:
                on_shard(indexed)
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
    manifest = Manifest(root, tuple(entries), names, None if index_folder is None else _relative_to(index_folder, root))
    try:
        manifest.save(root)
    except OSError as error:
        raise ShardError(
            f"{root}: the manifest cannot be written ({error.strerror}); name a writable folder with --out"
        ) from error
    return manifest


def _index_or_keep(shard: Path, index_file: Path, url: str, force: bool, allow_missing_end: bool) -> IndexedShard:
    index = None if force else _valid_index(shard, index_file, allow_missing_end)
    if index is not None:
        digest = hashlib.sha256(index_file.read_bytes()).hexdigest()
        return IndexedShard(ShardEntry(url, index.num_samples, index.size_bytes, digest), True, index.num_skipped)
    index = index_shard(shard, allow_missing_end=allow_missing_end)
    try:
        digest = index.save(index_file)
    except OSError as error:
        raise ShardError(
            f"{index_file}: the index cannot be written ({error.strerror}); name a writable folder with --index-dir"
        ) from error
    return IndexedShard(ShardEntry(url, index.num_samples, index.size_bytes, digest), False, index.num_skipped)


def _valid_index(shard: Path, index_file: Path, allow_missing_end: bool) -> ShardIndex | None:
    try:
        index = ShardIndex.load(index_file)
        shard_stat, index_stat = shard.stat(), index_file.stat()
    except (ShardError, OSError):
        return None
    fresh = index.size_bytes == shard_stat.st_size and index_stat.st_mtime_ns >= shard_stat.st_mtime_ns
    return index if fresh and (index.has_end_marker or allow_missing_end) else None


def _relative_to(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
