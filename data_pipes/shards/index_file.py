"""Where each sample of one shard lies: `ShardIndex` and its file `<shard>.tar.idx`.

Enters: arrays made by data_pipes.index.walk, or an index file. Leaves: offsets and sizes of samples and members. Why it
exists: with it one sample, or one run of samples, is a single ranged read. An index file consists of 8 bytes of magic,
the sha256 of all that follows (32 bytes), the length of the JSON head (4 bytes, little endian), the JSON head, the
keys, and the arrays one after another. There is no pickle in it.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipes.errors import ShardError
from data_pipes.store.files import write_atomically

_MAGIC = b"TSRIDX1\n"
_HEAD_START = len(_MAGIC) + 32 + 4
"""Where the JSON head begins, in bytes."""
_ARRAYS = (
    "key_end",
    "sample_offset",
    "sample_size",
    "first_member",
    "member_extension",
    "member_offset",
    "member_size",
)
"""The fields of `ShardIndex` that are arrays, in the order of the file."""

Uint64s = NDArray[np.uint64]


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The places of n samples with m members in one tar. All arrays are uint64; offsets and sizes are bytes of the
    tar.
    """

    size_bytes: int
    """Size of the tar file."""
    num_skipped: int
    """Members that belong to no sample: folders, names without an extension, hidden files, webdataset's __meta__
    names."""
    has_end_marker: bool
    """Whether the tar ends with two zero blocks, as every usual writer ends it."""
    extensions: tuple[str, ...]
    """The different extensions of the members, in lower case without a leading dot."""
    key_bytes: bytes
    """The keys in UTF-8, one after another."""
    key_end: Uint64s
    """Where each key ends in `key_bytes`, [n]; key i + 1 begins there."""
    sample_offset: Uint64s
    """The first header byte of each sample's first member, [n]."""
    sample_size: Uint64s
    """Bytes from there to the padded end of the data of each sample's last member, [n]."""
    first_member: Uint64s
    """The members of sample i are those from first_member[i] to before first_member[i + 1], [n + 1]."""
    member_extension: Uint64s
    """The number of each member's extension in `extensions`, [m]."""
    member_offset: Uint64s
    """Where each member's data begin, [m]."""
    member_size: Uint64s
    """The size of each member's data, [m]."""

    @property
    def num_samples(self) -> int:
        """How many samples the shard has: n."""
        return len(self.sample_offset)

    @cached_property
    def keys(self) -> list[str]:
        """The keys of all samples, in order."""
        return [self.key(sample) for sample in range(self.num_samples)]

    def key(self, sample: int) -> str:
        """The key of one sample."""
        start = int(self.key_end[sample - 1]) if sample else 0
        return self.key_bytes[start : int(self.key_end[sample])].decode("utf-8", "surrogateescape")

    def members(self, sample: int) -> dict[str, tuple[int, int]]:
        """The members of one sample: extension in lower case without its leading dot ("jpg", "seg.png") -> (offset of
        the data in the tar, size), both in bytes.

        Raises:
            IndexError: there is no such sample.
        """
        if not 0 <= sample < self.num_samples:
            raise IndexError(f"sample {sample} of a shard with {self.num_samples} samples")
        part = slice(int(self.first_member[sample]), int(self.first_member[sample + 1]))
        places = zip(self.member_offset[part].tolist(), self.member_size[part].tolist(), strict=True)
        return dict(zip((self.extensions[e] for e in self.member_extension[part].tolist()), places, strict=True))

    def part(self, first: int, count: int) -> ShardIndex:
        """The index of the samples [first, first + count) alone: its sample 0 is `first`. Offsets stay the tar's."""
        samples = slice(first, first + count)
        key_begin = int(self.key_end[first - 1]) if first else 0
        key_end = self.key_end[samples]
        members = slice(int(self.first_member[first]), int(self.first_member[first + count]))
        return ShardIndex(
            size_bytes=self.size_bytes,
            num_skipped=self.num_skipped,
            has_end_marker=self.has_end_marker,
            extensions=self.extensions,
            key_bytes=self.key_bytes[key_begin : int(key_end[-1])],
            key_end=key_end - np.uint64(key_begin),
            sample_offset=self.sample_offset[samples].copy(),
            sample_size=self.sample_size[samples].copy(),
            first_member=self.first_member[first : first + count + 1] - self.first_member[first],
            member_extension=self.member_extension[members].copy(),
            member_offset=self.member_offset[members].copy(),
            member_size=self.member_size[members].copy(),
        )

    def to_bytes(self) -> bytes:
        """The content of the index file; equal shards give equal bytes."""
        arrays = {name: _narrow(getattr(self, name)) for name in _ARRAYS}
        head = {
            "size_bytes": self.size_bytes,
            "num_skipped": self.num_skipped,
            "has_end_marker": self.has_end_marker,
            "extensions": self.extensions,
            "num_key_bytes": len(self.key_bytes),
            "arrays": {name: [array.dtype.str, len(array)] for name, array in arrays.items()},
        }
        head_bytes = json.dumps(head, separators=(",", ":")).encode()
        body = b"".join(
            [len(head_bytes).to_bytes(4, "little"), head_bytes, self.key_bytes, *(a.tobytes() for a in arrays.values())]
        )
        return _MAGIC + hashlib.sha256(body).digest() + body

    def save(self, path: str | os.PathLike[str]) -> str:
        """Writes the index file in one step (temporary file, then rename) and returns its sha256 (hex), as the manifest
        keeps it.
        """
        data = self.to_bytes()
        write_atomically(Path(path), data)
        return hashlib.sha256(data).hexdigest()

    @classmethod
    def load(cls, path: str | os.PathLike[str], sha256: str | None = None) -> ShardIndex:
        """Reads and checks an index file on a disk.

        Args:
            path: of the file.
            sha256: the digest (hex) that the manifest names; None: any file will do.

        Raises:
            ShardError: the file is missing, damaged or has another digest.
        """
        try:
            data = Path(path).read_bytes()
        except FileNotFoundError:
            raise ShardError(f"{path}: no such index file; make it with `tessera index`") from None
        return cls.from_bytes(data, os.fspath(path), sha256)

    @classmethod
    def from_bytes(cls, data: bytes, name: str, sha256: str | None = None) -> ShardIndex:
        """Checks and parses the content of an index file.

        Args:
            data: the content.
            name: path or URL of the file, for messages.
            sha256: see `load`.

        Raises:
            ShardError: the content is damaged or has another digest.
        """
        if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
            raise ShardError(
                f"{name}: this is not the index that the manifest names (its sha256 differs); run `tessera "
                "index` again, or restore the file"
            )
        try:
            return cls._parse(data)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ShardError(
                f"{name}: damaged index file ({error}); delete it and run `tessera index` again"
            ) from error

    @classmethod
    def _parse(cls, data: bytes) -> ShardIndex:
        """Parses the content, without a name for messages; raises nearly anything on damage."""
        if not data.startswith(_MAGIC) or len(data) < _HEAD_START:
            raise ValueError("it does not begin as an index file does")
        body_start = len(_MAGIC) + 32
        if hashlib.sha256(memoryview(data)[body_start:]).digest() != data[len(_MAGIC) : body_start]:
            raise ValueError("wrong checksum")
        position = _HEAD_START + int.from_bytes(data[body_start:_HEAD_START], "little")
        head: dict[str, Any] = json.loads(data[_HEAD_START:position])
        key_bytes = data[position : position + head["num_key_bytes"]]
        position += len(key_bytes)
        arrays: dict[str, Uint64s] = {}
        for name in _ARRAYS:
            kind, length = head["arrays"][name]
            if kind not in ("<u4", "<u8"):
                raise ValueError(f"array {name} of kind {kind!r}")
            array = np.frombuffer(data, dtype=kind, count=length, offset=position)
            arrays[name] = array.astype(np.uint64)
            position += array.nbytes
        if position != len(data):
            raise ValueError("wrong length")
        index = cls(
            head["size_bytes"],
            head["num_skipped"],
            head["has_end_marker"],
            tuple(head["extensions"]),
            key_bytes,
            **arrays,
        )
        index._check()
        return index

    def _check(self) -> None:
        """Checks that no place points out of the tar: a reader trusts these numbers.

        Raises:
            ValueError: the arrays contradict each other.
        """
        n, m = self.num_samples, len(self.member_offset)
        size, first = self.size_bytes, self.first_member
        valid = (
            len(self.sample_size) == len(self.key_end) == n
            and n > 0
            and len(first) == n + 1
            and len(self.member_size) == len(self.member_extension) == m
            and first[0] == 0
            and first[-1] == m
            and bool((first[1:] > first[:-1]).all())
            and self.key_end[-1] == len(self.key_bytes)
            and bool((self.key_end[1:] >= self.key_end[:-1]).all())
            and int(self.member_extension.max()) < len(self.extensions)
            and _lie_within(self.sample_offset, self.sample_size, size)
            and _lie_within(self.member_offset, self.member_size, size)
        )
        if not valid:
            raise ValueError("its arrays contradict each other")


def _lie_within(offset: Uint64s, length: Uint64s, size: int) -> bool:
    """Whether all ranges [offset, offset + length) lie within `size` bytes; computed so that no sum overflows."""
    limit = np.uint64(size)
    return bool(((offset <= limit) & (length <= limit - np.minimum(offset, limit))).all())


def _narrow(array: Uint64s) -> NDArray[Any]:
    """The array with 4 bytes per number where that suffices: half the file for shards below 4 GiB."""
    return array.astype("<u4" if int(array.max(initial=0)) < 1 << 32 else "<u8")
