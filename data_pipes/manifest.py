"""The manifest: which shards a dataset has, and how many samples, bytes and which index belong to each.

Enters and leaves: `manifest.json` in a dataset's folder. Why it exists: only the counts per shard stay in memory, a
known count turns a silently truncated shard into an error, and the hash of the entries (the fingerprint) ties a
training run's data position to exactly this data.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

MANIFEST_NAME = "manifest.json"
INDEX_SUFFIX = ".idx"
_FORMAT, _VERSION = "tessera-manifest", 1
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|pipe:")


@dataclass(frozen=True)
class ShardEntry:
    """One shard of a dataset."""

    url: str
    # path relative to the manifest's folder (with "/"), or absolute
    num_samples: int
    size_bytes: int
    # of the tar file
    index_sha256: str
    # hex digest of the whole index file


@dataclass(frozen=True)
class Manifest:
    """The shards of one dataset, in order, and its class names (empty: unlabelled)."""

    root: Path
    # the folder that relative urls and a relative index_dir start from
    shards: tuple[ShardEntry, ...]
    classes: tuple[str, ...] = ()
    # the name of label i is classes[i]
    index_dir: str | None = None
    # folder of the index files; None: beside the shards

    @cached_property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)

    @cached_property
    def size_bytes(self) -> int:
        return sum(shard.size_bytes for shard in self.shards)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) over url, samples, bytes and index digest of every shard; times and the root do not count, so
        that a moved folder keeps it.
        """
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(json.dumps([shard.url, shard.num_samples, shard.size_bytes, shard.index_sha256]).encode())
        return digest.hexdigest()

    def shard_path(self, shard: int) -> Path:
        """Where the tar of a shard lies. Raises ValueError for urls that are no local path."""
        url = self.shards[shard].url
        if _SCHEME.match(url):
            raise ValueError(
                f"{self.root / MANIFEST_NAME}: the shard {url!r} is not a local path; copy the shards to a "
                "local folder and run `tessera index` there"
            )
        return self.root / url

    def index_path(self, shard: int) -> Path:
        """Where the index of a shard lies."""
        return index_path(
            self.shard_path(shard), self.shards[shard].url, self.root / self.index_dir if self.index_dir else None
        )

    @classmethod
    def load(cls, folder_or_file: str | os.PathLike[str]) -> Manifest:
        """Reads and checks a manifest. Raises ValueError when there is none, when it is malformed, of an unknown
        version, edited by hand, or without a sample.
        """
        path = Path(folder_or_file)
        path = path / MANIFEST_NAME if path.is_dir() or path.suffix != ".json" else path
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(_no_manifest(path)) from None
        except ValueError as error:
            raise ValueError(f"{path}: not a manifest ({error}); write it again with `tessera index`") from error
        manifest = cls._parse(content, path)
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
    def _parse(cls, content: Any, path: Path) -> Manifest:
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
            manifest = cls(path.parent, shards, tuple(content["classes"]), content["index_dir"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: malformed manifest ({error}); write it again with `tessera index`") from error
        for shard in shards:
            counts_are_valid = all(type(count) is int and count >= 0 for count in (shard.num_samples, shard.size_bytes))
            if (
                not isinstance(shard.url, str)
                or ".." in shard.url.split("/")
                or not isinstance(shard.index_sha256, str)
                or not counts_are_valid
            ):
                raise ValueError(f"{path}: malformed entry {shard}; write the manifest again with `tessera index`")
        if not all(isinstance(name, str) for name in manifest.classes) or not isinstance(
            manifest.index_dir, str | None
        ):
            raise ValueError(f"{path}: malformed classes or index_dir; write the manifest again with `tessera index`")
        return manifest

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes `manifest.json` into `folder` in one step (temporary file, then rename) and returns its path."""
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "fingerprint": self.fingerprint,
            "num_samples": self.num_samples,
            "classes": list(self.classes),
            "index_dir": self.index_dir,
            "shards": [asdict(shard) for shard in self.shards],
        }
        path = Path(folder) / MANIFEST_NAME
        write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
        return path


def index_path(shard_path: Path, url: str, index_dir: Path | None) -> Path:
    """`<shard>.tar.idx` beside the shard, or in `index_dir` under a name that keeps a/000.tar and b/000.tar apart."""
    if index_dir is None:
        return shard_path.with_name(shard_path.name + INDEX_SUFFIX)
    return index_dir / f"{shard_path.name}.{hashlib.sha256(os.fsencode(url)).hexdigest()[:12]}{INDEX_SUFFIX}"


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file such that a reader sees either the old or the whole new content, and a crash leaves no half file
    under its name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_class_names(classes: Iterable[str]) -> tuple[str, ...]:
    """The class names as a tuple. Raises ValueError on an empty or a repeated name."""
    names = tuple(classes)
    seen: set[str] = set()
    for name in names:
        if not name or name in seen:
            raise ValueError(
                f"class names must be unique and not empty, found {name!r} {'twice' if name else ''}".rstrip()
            )
        seen.add(name)
    return names


def _no_manifest(path: Path) -> str:
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
