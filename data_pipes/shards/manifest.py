"""The manifest: which shards a data set has, and how many samples, bytes and which index belong to each.

Enters and leaves: `manifest.json` in a data set's folder, on disk or in an object store. Why it exists: only the counts
per shard stay in memory, a known count turns a silently truncated shard into an error, and the hash of the entries (the
fingerprint) ties a training run's data position to exactly this data, wherever it is stored.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data_pipes.store.files import write_atomically
from data_pipes.store.storage import Storage
from data_pipes.store.urls import check_url, is_remote, join_url, local_path

MANIFEST_NAME = "manifest.json"
"""The manifest's file in a data set's folder."""
INDEX_SUFFIX = ".idx"
"""What the name of a shard's index has behind that of the shard."""
_FORMAT, _VERSION = "tessera-manifest", 1
_MAX_MANIFEST_BYTES = 1 << 30
"""Size of a manifest in a store, at most: about 3 million shards."""


@dataclass(frozen=True)
class ShardEntry:
    """One shard of a data set."""

    url: str
    """Path relative to the manifest's folder (with "/"), or absolute: a path or the URL of an object."""
    num_samples: int
    size_bytes: int
    """Size of the tar file."""
    index_sha256: str
    """Hex digest of the whole index file."""
    etag: str | None = None
    """What the store calls this version of the object; a run stops when it changes. None for a file, and for a store
    that has no etags."""


@dataclass(frozen=True)
class Manifest:
    """The shards of one data set, in order, and the names of its classes."""

    root: str
    """The folder (path or URL) from which relative urls and a relative index_dir start."""
    shards: tuple[ShardEntry, ...]
    classes: tuple[str, ...] = ()
    """The name of label i is classes[i]; empty where classes have no names, or there are none."""
    index_dir: str | None = None
    """Folder of the index files; None: they lie beside the shards."""

    @cached_property
    def num_samples(self) -> int:
        """Samples of all shards."""
        return sum(shard.num_samples for shard in self.shards)

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of all tar files."""
        return sum(shard.size_bytes for shard in self.shards)

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 (hex) over url, samples, bytes and index digest of every shard; times, etags and the root do not
        count, so that a moved or uploaded folder keeps it.
        """
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(json.dumps([shard.url, shard.num_samples, shard.size_bytes, shard.index_sha256]).encode())
        return digest.hexdigest()

    def summary(self) -> dict[str, object]:
        """The data set's counts, size and fingerprint, as the commands print them in JSON."""
        return {
            "num_samples": self.num_samples,
            "num_shards": len(self.shards),
            "size_bytes": self.size_bytes,
            "num_classes": len(self.classes),
            "fingerprint": self.fingerprint,
        }

    def shard_url(self, shard: int) -> str:
        """Where the tar of a shard lies: a local path, or the URL of an object."""
        return join_url(self.root, self.shards[shard].url)

    def index_url(self, shard: int) -> str:
        """Where the index of a shard lies: a local path, or the URL of an object."""
        index_dir = None if self.index_dir is None else join_url(self.root, self.index_dir)
        return index_url(self.shard_url(shard), self.shards[shard].url, index_dir)

    def shard_path(self, shard: int) -> Path:
        """Where the tar of a local shard lies.

        Raises:
            ValueError: the shard is an object in a store.
        """
        url = self.shard_url(shard)
        if is_remote(url):
            raise ValueError(
                f"{url}: this is not a local path; copy the shards to a local folder and run `tessera index` there"
            )
        return local_path(url)

    def index_path(self, shard: int) -> Path:
        """Where the index of a local shard lies.

        Raises:
            ValueError: the shard is an object in a store.
        """
        self.shard_path(shard)
        return local_path(self.index_url(shard))

    @cached_property
    def is_remote(self) -> bool:
        """Whether any of it lies in a store."""
        return is_remote(self.root) or any(is_remote(shard.url) for shard in self.shards)

    @classmethod
    def load(cls, source: str | os.PathLike[str], storage: Storage | None = None) -> Manifest:
        """Reads and checks a manifest.

        Args:
            source: a folder or a .json file, as a path or URL.
            storage: for a URL; None: one with the default settings.

        Raises:
            ValueError: there is no manifest, or it is malformed, of an unknown version, edited by hand, or without a
                sample.
            StorageError: the store cannot be used.
        """
        root, path, data = _read(source, storage)
        try:
            content = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not a manifest ({error}); write it again with `tessera index`") from error
        manifest = cls._parse(content, root, path)
        if not manifest.shards:
            raise ValueError(f"{path}: the dataset has no shards; pack or index it again")
        if manifest.num_samples == 0:
            raise ValueError(
                f"{path}: the dataset is empty ({len(manifest.shards)} shards without a sample); pack or index it again"
            )
        if content.get("fingerprint") != manifest.fingerprint:
            raise ValueError(
                f"{path}: the fingerprint does not belong to the listed shards (edited by hand?); write the "
                "manifest again with `tessera index`"
            )
        return manifest

    @classmethod
    def _parse(cls, content: Any, root: str, path: str) -> Manifest:
        """The manifest in the file's JSON.

        Args:
            content: the parsed JSON, of whatever type.
            root: the folder of the manifest.
            path: the place of the file, for messages.

        Raises:
            ValueError: it is no manifest, of an unknown version or malformed.
        """
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(
                f'{path}: not a manifest of tessera (expected "format": "{_FORMAT}"); write it with `tessera index`'
            )
        if content.get("version") != _VERSION:
            raise ValueError(
                f"{path}: manifest version {content.get('version')!r}, this program reads version {_VERSION}; "
                "index the shards again or update tessera"
            )
        try:
            shards = tuple(ShardEntry(**entry) for entry in content["shards"])
            manifest = cls(root, shards, tuple(content["classes"]), content["index_dir"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: malformed manifest ({error}); write it again with `tessera index`") from error
        for shard in shards:
            counts_are_valid = all(type(count) is int and count >= 0 for count in (shard.num_samples, shard.size_bytes))
            if (
                not isinstance(shard.url, str)
                or ".." in shard.url.split("/")
                or not isinstance(shard.index_sha256, str)
                or not isinstance(shard.etag, str | None)
                or not counts_are_valid
            ):
                raise ValueError(f"{path}: malformed entry {shard}; write the manifest again with `tessera index`")
        if not all(isinstance(name, str) for name in manifest.classes) or not isinstance(
            manifest.index_dir, str | None
        ):
            raise ValueError(f"{path}: malformed classes or index_dir; write the manifest again with `tessera index`")
        for shard in shards:
            check_url(join_url(root, shard.url))
        return manifest

    def to_bytes(self) -> bytes:
        """The content of the file."""
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "fingerprint": self.fingerprint,
            "num_samples": self.num_samples,
            "classes": list(self.classes),
            "index_dir": self.index_dir,
            "shards": [
                {name: value for name, value in asdict(shard).items() if name != "etag" or value is not None}
                for shard in self.shards
            ],
        }
        return (json.dumps(content, indent=1) + "\n").encode()

    def save(self, folder: str | os.PathLike[str], storage: Storage | None = None) -> str:
        """Writes `manifest.json` into `folder` (path or URL) in one step and returns its place."""
        target = join_url(os.fspath(folder), MANIFEST_NAME)
        if is_remote(target):
            (storage or Storage()).write_whole(target, self.to_bytes())
        else:
            write_atomically(local_path(target), self.to_bytes())
        return target


def index_url(shard_url: str, url: str, index_dir: str | None) -> str:
    """Where the index of a shard lies: `<shard>.tar.idx` beside the shard, or in `index_dir` under a name that keeps
    a/000.tar and b/000.tar apart.

    Args:
        shard_url: where the shard lies.
        url: how the manifest names the shard.
        index_dir: path or URL of the folder of the index files; None: they lie beside the shards.
    """
    if index_dir is None:
        return shard_url + INDEX_SUFFIX
    name = shard_url.rpartition("/")[2]
    return join_url(index_dir, f"{name}.{hashlib.sha256(os.fsencode(url)).hexdigest()[:12]}{INDEX_SUFFIX}")


def check_class_names(classes: Iterable[str]) -> tuple[str, ...]:
    """The class names as a tuple.

    Raises:
        ValueError: a name is empty or repeated.
    """
    names = tuple(classes)
    seen: set[str] = set()
    for name in names:
        if not name or name in seen:
            raise ValueError(
                f"class names must be unique and not empty, found {name!r} {'twice' if name else ''}".rstrip()
            )
        seen.add(name)
    return names


def _read(source: str | os.PathLike[str], storage: Storage | None) -> tuple[str, str, bytes]:
    """The folder of a manifest, the place of its file, and the content of the file."""
    given = os.fspath(source)
    check_url(given)
    if not is_remote(given):
        path = local_path(given)
        path = path / MANIFEST_NAME if path.is_dir() or path.suffix != ".json" else path
        try:
            return str(path.parent), str(path), path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(_no_manifest(path)) from None
    place = given if given.endswith(".json") else join_url(given, MANIFEST_NAME)
    try:
        return place.rpartition("/")[0], place, (storage or Storage()).read_whole(place, _MAX_MANIFEST_BYTES)
    except FileNotFoundError:
        raise ValueError(
            f"{place}: no such object; index the shards there with `tessera index {given}`, or upload a data set made "
            "with `tessera pack`"
        ) from None


def _no_manifest(path: Path) -> str:
    """What to tell a user who named a local folder without a manifest."""
    folder = path.parent
    if not folder.is_dir():
        return (
            f"{folder}: no such dataset folder; pack one with `tessera pack SRC OUT` or index existing shards with "
            "`tessera index`"
        )
    below = sorted(child.name for child in folder.iterdir() if (child / MANIFEST_NAME).is_file())
    if below:
        return (
            f"{folder}: no {MANIFEST_NAME} here; datasets are in the folders {', '.join(below)} below: name one "
            "of these"
        )
    return (
        f"{folder}: no {MANIFEST_NAME} here; run `tessera index {folder}` for existing shards, or `tessera pack "
        "SRC OUT` for pictures"
    )
