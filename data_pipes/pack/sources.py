"""Where files to pack come from: folders, zips, memory.

Enters: a path, or files in memory. Leaves: the names and sizes of the files, and the bytes of each. Why it exists: a
zip and the folder it was made of must give the same files, hence the same shards.
"""

from __future__ import annotations

import os
import re
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_DIGITS = re.compile(r"([0-9]+)")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a source."""

    name: str
    """Its path in the source, with "/" between folders."""
    size_bytes: int
    """Its size; a guess where `Source.sizes_are_exact` is False."""
    checksum: str
    """A checksum where the source knows one, else ""."""


class Source(ABC):
    """A set of files that can be listed and read, by several threads at once."""

    sizes_are_exact = True
    """False where files are made when they are read, so that their sizes in the list are guesses."""

    def __init__(self, title: str) -> None:
        """Names the source; `title` is for messages."""
        self.title = title

    @abstractmethod
    def files(self) -> Iterable[SourceFile]:
        """All files, in any order."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The bytes of one file."""

    def validation(self) -> Source | None:
        """The set that belongs to this one for validation, where it brings one along."""
        return None


class FolderSource(Source):
    """A folder on a file system; links are followed."""

    def __init__(self, root: Path) -> None:
        super().__init__(str(root))
        self._root = root

    def files(self) -> Iterator[SourceFile]:
        return self._walk(str(self._root), "", frozenset())

    def _walk(self, folder: str, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[SourceFile]:
        status = os.stat(folder)
        this = (status.st_dev, status.st_ino)
        if this in above:
            raise ValueError(f"{folder}: a link to a folder above itself; remove it")
        with os.scandir(folder) as entries:
            for entry in entries:
                name = prefix + entry.name
                if entry.is_dir():
                    yield from self._walk(entry.path, f"{name}/", above | {this})
                elif entry.is_file():
                    yield SourceFile(name, entry.stat().st_size, "")
                else:
                    raise ValueError(f"{entry.path}: neither a file nor a folder (a broken link?); remove it")

    def read(self, name: str) -> bytes:
        return (self._root / name).read_bytes()


class ZipSource(Source):
    """A zip file; names that lead out of it are refused when it is listed."""

    def __init__(self, path: Path) -> None:
        """Opens the zip.

        Raises:
            ValueError: it is damaged, or is no zip.
        """
        super().__init__(str(path))
        try:
            self._zip = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path}: not a readable zip file ({error}); copy it again from its source") from error

    def files(self) -> Iterator[SourceFile]:
        for info in self._zip.infolist():
            if info.is_dir():
                continue
            if info.filename.startswith("/") or ".." in info.filename.split("/"):
                raise ValueError(f"{self.title}: the name {info.filename!r} leads out of the zip; do not use this file")
            if "\\" in info.filename:
                raise ValueError(
                    f"{self.title}: the name {info.filename!r} has backslashes where folders need '/'; zip it again"
                )
            yield SourceFile(info.filename, info.file_size, f"{info.CRC:08x}")

    def read(self, name: str) -> bytes:
        return self._zip.read(name)  # checks the CRC; ZipFile locks its file between threads


class MemorySource(Source):
    """Files in memory."""

    def __init__(self, title: str, content: Mapping[str, bytes]) -> None:
        """Takes the files: `content` has the bytes of each by its name."""
        super().__init__(title)
        self._content = content

    def files(self) -> Iterator[SourceFile]:
        for name, data in self._content.items():
            yield SourceFile(name, len(data), f"{zlib.crc32(data):08x}")

    def read(self, name: str) -> bytes:
        return self._content[name]


def natural_key(text: str) -> tuple[list[Any], str]:
    """A sorting key that puts "a2" before "a10"; the case of letters decides only between names that are equal
    otherwise.
    """
    parts = enumerate(_DIGITS.split(text))
    return [(len(part.lstrip("0")), part.lstrip("0")) if i % 2 else part.lower() for i, part in parts], text
