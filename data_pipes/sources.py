"""What can be packed: folders, zips and built-in pictures, as one list of pictures with keys and labels.

Enters: a path, or the name of a built-in set. Leaves: a `Listing` of pictures in natural order, and their bytes. Why it
exists: a zip and the folder it was made of must give the same keys, labels and order, hence the same shards.

Class folders: the first folder level is the class. Folders that wrap everything (`train/` around all classes) are
passed over. Pictures in one single folder are unlabelled.
"""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipes.manifest import check_class_names

PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"})
# A picture file is smaller; a larger declared size is an attack on the memory or a mistake.
MAX_FILE_BYTES = 1 << 30

_SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test"})
_DIGITS = re.compile(r"([0-9]+)")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a source: its path with "/", its size, and a checksum where the source knows one (else "")."""

    name: str
    size_bytes: int
    checksum: str


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture to pack. `label` is -1 where there are no classes; `key` is unique in the listing and has no dot."""

    key: str
    label: int
    file: SourceFile


@dataclass(frozen=True)
class Listing:
    """The pictures of a source in natural order of their names, and what was passed over."""

    pictures: list[Picture]
    classes: tuple[str, ...]
    ignored: list[str]
    # names of files that are no pictures, or hidden

    def digest(self) -> str:
        """sha256 (hex) over names, sizes, checksums and labels; equal for a folder that was moved."""
        digest = hashlib.sha256(repr(self.classes).encode("utf-8", "surrogateescape"))
        for picture in self.pictures:
            file = picture.file
            line = f"{picture.key}\n{file.size_bytes}\n{file.checksum}\n{picture.label}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


class Source(ABC):
    """A set of files that can be listed and read, by several threads at once."""

    def __init__(self, title: str) -> None:
        self.title = title  # for messages

    @abstractmethod
    def files(self) -> Iterable[SourceFile]:
        """All files, in any order."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The bytes of one file."""


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
    """A zip file. Raises ValueError when it is damaged or holds names that lead out of it."""

    def __init__(self, path: Path) -> None:
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
    """Files in memory: name -> bytes."""

    def __init__(self, title: str, content: Mapping[str, bytes]) -> None:
        super().__init__(title)
        self._content = content

    def files(self) -> Iterator[SourceFile]:
        for name, data in self._content.items():
            yield SourceFile(name, len(data), f"{zlib.crc32(data):08x}")

    def read(self, name: str) -> bytes:
        return self._content[name]


def list_pictures(source: Source, classes: Sequence[str] | None = None) -> Listing:
    """Lists a source. `classes` is given for a validation source: its labels must mean the same as in training.

    Raises ValueError for a source without pictures, pictures beside class folders, folders that are splits and not
    classes, a file above `MAX_FILE_BYTES`, and a class that is not in `classes`.
    """
    files, ignored = [], []
    for file in source.files():
        base = file.name.rpartition("/")[2]
        is_picture = not base.startswith(".") and PurePosixPath(base.lower()).suffix in PICTURE_SUFFIXES
        if is_picture and file.size_bytes > MAX_FILE_BYTES:
            raise ValueError(
                f"{source.title}: {file.name} has {file.size_bytes:,} bytes; a picture has at most "
                f"{MAX_FILE_BYTES:,}; remove the file"
            )
        if is_picture:
            files.append(file)
        else:
            ignored.append(file.name)
    if not files:
        raise ValueError(
            f"{source.title}: no pictures found among {len(ignored)} files; expected "
            f"{', '.join(sorted(PICTURE_SUFFIXES))} in class folders, or in one folder for an unlabelled set"
        )
    files.sort(key=lambda file: natural_key(file.name))
    for before, after in pairwise(files):
        if before.name == after.name:
            raise ValueError(f"{source.title}: two files have the name {after.name}; give them distinct names")
    depth = _wrapping_depth([file.name for file in files], frozenset(classes or ()))
    names = ["/".join(file.name.split("/")[depth:]) for file in files]
    found = _class_names(source, names)
    if classes is not None:
        _check_known(source, found, classes)
        found = tuple(classes)
    label_of = {name: label for label, name in enumerate(found)}
    pictures = [
        Picture(key, label_of[name.split("/")[0]] if found else -1, file)
        for key, name, file in zip(_keys(names), names, files, strict=True)
    ]
    return Listing(pictures, found, sorted(ignored, key=natural_key))


def natural_key(text: str) -> tuple[list[Any], str]:
    """Sorts "a2" before "a10"; the case of letters decides only between names that are equal otherwise."""
    parts = enumerate(_DIGITS.split(text))
    return [(len(part.lstrip("0")), part.lstrip("0")) if i % 2 else part.lower() for i, part in parts], text


def _wrapping_depth(names: list[str], known_classes: frozenset[str]) -> int:
    """How many leading folders all names share, up to a known class (a validation set may have only one)."""
    first, *others = [name.split("/")[:-1] for name in names]
    for depth, folder in enumerate(first):
        if folder in known_classes or any(path[depth : depth + 1] != [folder] for path in others):
            return depth
    return len(first)


def _class_names(source: Source, names: list[str]) -> tuple[str, ...]:
    flat = [name for name in names if "/" not in name]
    folders = {name.split("/")[0] for name in names if "/" in name}
    if not folders:
        return ()
    if flat:
        raise ValueError(
            f"{source.title}: {len(flat)} pictures lie beside the class folders, e.g. {flat[0]}; move them into a "
            "class folder, or pack a folder that holds pictures only (unlabelled)"
        )
    if {name.lower() for name in folders} <= _SPLIT_NAMES:
        first, *others = sorted(folders, key=lambda name: (not name.lower().startswith("train"), name))
        raise ValueError(
            f"{source.title}: the folders {', '.join([first, *others])} look like splits, not classes; pack "
            f"{first} as SRC and give the other one with --val"
        )
    return check_class_names(sorted(folders, key=natural_key))


def _check_known(source: Source, found: tuple[str, ...], classes: Sequence[str]) -> None:
    if bool(found) != bool(classes):
        kinds = ("class folders", "unlabelled")
        raise ValueError(
            f"{source.title}: {kinds[not found]}, but the training source is {kinds[not classes]}; give both in "
            "the same form"
        )
    unknown = [name for name in found if name not in set(classes)]
    if unknown:
        raise ValueError(
            f"{source.title}: {len(unknown)} classes are not in the training source, e.g. {unknown[0]!r}; known "
            f"are {', '.join(classes[:5])}, ..."
        )


def _keys(names: list[str]) -> Iterator[str]:
    """Keys as webdataset wants them: no dot in the last part, unique. "a/b.c.jpg" -> "a/b_c"; a second "a/b_c" becomes
    "a/b_c-1".
    """
    used: set[str] = set()
    for name in names:
        folder, slash, base = name.rpartition("/")
        stem = base.rpartition(".")[0].replace(".", "_")
        plain = "".join(c if c.isprintable() else "_" for c in folder + slash + stem)
        plain = "x" + plain if plain.startswith("__") else plain  # webdataset skips __*__
        key, number = plain, 0
        while key in used:
            number += 1
            key = f"{plain}-{number}"
        used.add(key)
        yield key
