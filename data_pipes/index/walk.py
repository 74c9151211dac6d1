"""One tar shard, walked from its first header to its last, becomes a `ShardIndex`.

Enters: a tar by tessera, stock webdataset or any tar writer, on a disk or in a store. Leaves: its index, or an error.
Why it exists: exact resume, any order and ranged reads over plain tars need the places of the samples; the walk is
strict, so that a damaged shard is found here and not as missing samples in a run. Keys follow webdataset: the key is
the name up to the first dot behind the last slash, the extension is the rest in lower case.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_pipes.errors import EmptyShardError, ShardError
from data_pipes.shards.index_file import ShardIndex
from data_pipes.shards.tar import TarMember, TarProblem, walk_tar
from data_pipes.store.storage import Storage
from data_pipes.store.urls import is_remote

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstandard"}
"""The first bytes of a compressed file -> the name of the compression."""
_META_NAME = re.compile(r"__[^/]*__($|/)")
"""Names that belong to no sample; webdataset.tariterators.tar_file_iterator skips the same."""


class SampleGroups:
    """Checks that the members of each sample are adjacent and have different extensions."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._current: str | None = None
        self._extensions: set[str] = set()

    def add(self, member: TarMember, key: str, extension: str) -> bool:
        """Takes the next member of a tar that belongs to a sample.

        Args:
            member: the member.
            key: the sample's key, from the member's name.
            extension: the member's extension, from its name.

        Returns:
            Whether the member is the first one of its sample.

        Raises:
            TarProblem: the sample began earlier and was interrupted, or has the extension already.
        """
        is_first = key != self._current
        if is_first:
            if key in self._seen:
                raise TarProblem(
                    f"the members of the sample {key!r} are not adjacent",
                    member.header,
                    "sort the files by name when packing (`tar --sort=name`), or use `tessera pack`",
                )
            self._seen.add(key)
            self._current, self._extensions = key, set()
        if extension in self._extensions:
            raise TarProblem(
                f"the sample {key!r} has two members with the extension {extension!r}",
                member.header,
                "give the samples distinct keys and pack the shard again",
            )
        self._extensions.add(extension)
        return is_first


@dataclass
class _IndexBuilder:
    """The arrays of a `ShardIndex` while they grow; members become samples as webdataset groups them."""

    groups: SampleGroups = field(default_factory=SampleGroups)
    keys: list[bytes] = field(default_factory=list)
    extensions: dict[str, int] = field(default_factory=dict)
    """Extension -> its number."""
    sample_offset: list[int] = field(default_factory=list)
    sample_end: list[int] = field(default_factory=list)
    """First byte behind the padded data of a sample's last member."""
    first_member: list[int] = field(default_factory=list)
    member_extension: list[int] = field(default_factory=list)
    member_offset: list[int] = field(default_factory=list)
    member_size: list[int] = field(default_factory=list)
    num_skipped: int = 0

    def add(self, member: TarMember) -> None:
        """Takes the next member of the tar.

        Raises:
            TarProblem: see `SampleGroups.add`.
        """
        key, extension = split_name(member.name)
        if member.is_folder or not extension:
            self.num_skipped += 1
            return
        if self.groups.add(member, key, extension):
            self.keys.append(key.encode("utf-8", "surrogateescape"))
            self.sample_offset.append(member.header)
            self.sample_end.append(member.end)
            self.first_member.append(len(self.member_offset))
        self.member_extension.append(self.extensions.setdefault(extension, len(self.extensions)))
        self.member_offset.append(member.data)
        self.member_size.append(member.size)
        self.sample_end[-1] = member.end

    def finish(self, size_bytes: int, has_end_marker: bool) -> ShardIndex:
        """The index of the members that were added; `size_bytes` is the size of the tar."""
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
    """The key and the extension (in lower case) in a member's name, as webdataset splits it; the extension is "" for
    what belongs to no sample.
    """
    if _META_NAME.match(name):
        return name, ""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (folder + slash + stem, extension.lower()) if stem else (name, "")


def index_shard(
    place: str | os.PathLike[str], *, allow_missing_end: bool = False, storage: Storage | None = None
) -> ShardIndex:
    """Walks one tar strictly and returns the places of its samples.

    Of a local file only the headers are read; an object is read from its first byte to its last, with requests ahead of
    the walk.

    Args:
        place: path or URL of the shard.
        allow_missing_end: see `walk_tar`.
        storage: for an object; None: one with the default settings.

    Raises:
        EmptyShardError: a shard without a sample.
        ShardError: truncation anywhere, a zero block in mid-file, a bad checksum, an absolute name or one with `..`, a
            link or a device, members of one key that are not adjacent, a repeated extension in a sample, or a
            compressed file.
        StorageError: the store cannot be used.
    """
    path = os.fspath(place)
    builder = _IndexBuilder()
    opened = _open_object(path, storage or Storage()) if is_remote(path) else _open_file(Path(path))
    with opened as (file, size_bytes):
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
        raise EmptyShardError(
            f"{path}: the shard holds no sample{skipped}; expected members named KEY.EXTENSION; remove the shard, pack "
            "it again, or leave such shards out with --allow-empty"
        )
    return builder.finish(size_bytes, has_end_marker=size_bytes - end >= 1024)


@contextmanager
def _open_file(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """The open file and its size in bytes; refuses what cannot be a plain tar."""
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
        _check_is_plain(str(path), file.read(8))
        yield file, size_bytes


@contextmanager
def _open_object(url: str, storage: Storage) -> Iterator[tuple[BinaryIO, int]]:
    """The open object and its size in bytes; refuses what cannot be a plain tar."""
    with storage.open(url) as file:
        size_bytes = file.seek(0, os.SEEK_END)
        file.seek(0)
        head = file.read(8) if size_bytes else b""
        try:
            _check_is_plain(url, head)
        except ShardError as error:
            hint = "; or train on it as a stream, without exact resume: data.unindexed" if head else ""
            raise ShardError(f"{error}{hint}") from None
        yield file, size_bytes


def _check_is_plain(name: str, head: bytes) -> None:
    """Refuses a file that is no plain tar.

    Args:
        name: of the file, for the message.
        head: its first 8 bytes.

    Raises:
        ShardError: the file is empty or compressed.
    """
    if not head:
        raise ShardError(f"{name}: the file is empty (0 bytes); copy or pack the shard again from its source")
    for magic, compression in _COMPRESSED.items():
        if head.startswith(magic):
            raise ShardError(
                f"{name}: compressed with {compression}; single samples cannot be read from a compressed tar, "
                "and pictures do not get smaller: unpack it to a plain .tar"
            )
