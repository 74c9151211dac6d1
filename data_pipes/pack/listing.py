"""What is packed: the pictures or the videos of a source, with keys and labels.

Enters: a source, and a list of labels where there is one. Leaves: a `Listing` in natural order. Why it exists: keys,
labels and order follow from the names alone, so a zip and the folder it was made of become the same shards.

The first level of folders is the class. Folders that wrap everything (`train/` around all classes) are passed over.
Files in one single folder are unlabelled. With a list of labels, folders mean nothing.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Literal

from data_pipes.decode.formats import FILE_EXTENSIONS
from data_pipes.decode.video import VIDEO_EXTENSIONS
from data_pipes.pack.label_lists import NO_LABEL, LabelList
from data_pipes.pack.sources import Source, SourceFile, natural_key
from data_pipes.shards.manifest import check_class_names

Media = Literal["pictures", "videos"]
SUFFIXES: Mapping[Media, frozenset[str]] = {
    "pictures": frozenset(f".{extension}" for extension in FILE_EXTENSIONS),
    "videos": frozenset(f".{extension}" for extension in VIDEO_EXTENSIONS),
}
"""Suffixes of the files of each kind, in lower case."""
MAX_FILE_BYTES = 1 << 30
"""A picture or a short video is smaller; a larger declared size is an attack on the memory or a mistake."""

_SYSTEM_FOLDERS = frozenset({
    "@eaDir", "@tmp", "@Recycle", "#recycle", "#snapshot", "$RECYCLE.BIN", "System Volume Information", "__MACOSX",
    "lost+found",
})  # fmt: skip
"""Folders that network storage, Windows, macOS and Linux make: thumbnails, waste, the forks of zips."""
_SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test"})
"""Folders with these names only are taken for splits, not for classes."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One file to pack."""

    key: str
    """Unique in the listing, without a dot in its last part."""
    label: int
    """-1 where there are no classes."""
    file: SourceFile


@dataclass(frozen=True)
class Listing:
    """The pictures or videos of a source in natural order of their names, and what was passed over."""

    media: Media
    entries: list[Entry]
    classes: tuple[str, ...]
    ignored: list[str]
    """Names of files that are something else, hidden, or not in the list of labels."""
    missing: list[str] = field(default_factory=list)
    """Names in the list of labels that the source does not have."""

    def digest(self) -> str:
        """The sha256 (hex) over names, sizes, checksums and labels; equal for a folder that was moved."""
        digest = hashlib.sha256(repr(self.classes).encode("utf-8", "surrogateescape"))
        for entry in self.entries:
            file = entry.file
            line = f"{entry.key}\n{file.size_bytes}\n{file.checksum}\n{entry.label}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def list_source(
    source: Source,
    media: Media | None = None,
    classes: Sequence[str] | None = None,
    labels: LabelList | None = None,
) -> Listing:
    """Lists the pictures or the videos of a source.

    Args:
        source: the files.
        media: which of the two; None takes what is there, if it is of one kind.
        classes: the classes of the training source, given for a validation source: its labels must mean the same.
        labels: the labels of the files, instead of class folders.

    Raises:
        ValueError: the source has neither pictures nor videos, or has both; files lie beside class folders; folders are
            splits and not classes; a file is larger than `MAX_FILE_BYTES`; a class is not in `classes`.
    """
    media, files, ignored = _chosen_files(source, media, labels is not None)
    files.sort(key=lambda file: natural_key(file.name))
    for before, after in pairwise(files):
        if before.name == after.name:
            raise ValueError(f"{source.title}: two files have the name {after.name}; give them distinct names")
    label_names: dict[str, str] = {}
    missing: list[str] = []
    if labels is not None:
        label_names, missing, unlabelled = labels.match([file.name for file in files], source.title)
        listed = {*label_names, *unlabelled}
        ignored += [file.name for file in files if file.name not in listed]
        files = [file for file in files if file.name in listed]
    depth = _wrapping_depth([file.name for file in files], frozenset(classes or ()))
    names = ["/".join(file.name.split("/")[depth:]) for file in files]
    if labels is not None:
        found, of_file = labels.classes, [label_names.get(file.name, NO_LABEL) for file in files]
    else:
        found, of_file = _class_names(source, names, media), [name.split("/")[0] for name in names]
    if classes is not None:
        known = {*of_file} - {NO_LABEL} if labels is not None else {*of_file}
        _check_known(source, sorted(known, key=natural_key) if found else (), classes)
        found = tuple(classes)
    label_of = {name: label for label, name in enumerate(found)}
    if labels is not None:
        label_of[NO_LABEL] = -1
    entries = [
        Entry(key, label_of[class_name] if found else -1, file)
        for key, class_name, file in zip(_keys(names), of_file, files, strict=True)
    ]
    return Listing(media, entries, found, sorted(ignored, key=natural_key), missing)


def describe(listing: Listing, title: str, labels: LabelList | None) -> str:
    """What was found in a source, in words.

    Args:
        listing: of the source.
        title: of the source.
        labels: the list of labels, where there is one.
    """
    counts = Counter(entry.label for entry in listing.entries)
    shown = [f"{name} ({counts[label]:,})" for label, name in enumerate(listing.classes)]
    classes = f"{len(shown):,} classes: {', '.join(shown[:6])}" + (", ..." if len(shown) > 6 else "")
    found = f"{len(listing.entries):,} {listing.media} of {title}, {classes if shown else 'unlabelled'}"
    if labels is not None:
        found += f"; {labels.place} read as {labels.understood}, {len(listing.missing):,} of its files missing"
        first = listing.entries[0]
        label = listing.classes[first.label] if first.label >= 0 else "no label"
        found += f"; e.g. {first.file.name} is {label}"
    num_unlabelled = counts[-1] if shown else 0
    num_hidden = sum(map(is_hidden, listing.ignored))
    found += f"; {num_unlabelled:,} without a label" if num_unlabelled else ""
    return found + (f"; {num_hidden:,} hidden files left out" if num_hidden else "")


def is_hidden(name: str) -> bool:
    """Whether a file lies in a hidden folder, in one that a system keeps for itself, or is hidden itself."""
    return any(part.startswith(".") or part in _SYSTEM_FOLDERS for part in name.split("/"))


def _chosen_files(source: Source, media: Media | None, is_listed: bool) -> tuple[Media, list[SourceFile], list[str]]:
    """The kind of files to pack, the files of that kind, and the names of all other files.

    Args:
        source: the files.
        media: see `list_source`.
        is_listed: whether a list of labels says what is packed: it may name hidden files.
    """
    of_kind: dict[Media, list[SourceFile]] = {"pictures": [], "videos": []}
    hidden: dict[Media, list[SourceFile]] = {"pictures": [], "videos": []}
    ignored: list[str] = []
    for file in source.files():
        base = file.name.rpartition("/")[2]
        suffix = PurePosixPath(base.lower()).suffix
        kind = next((kind for kind, suffixes in SUFFIXES.items() if suffix in suffixes), None)
        if kind is None or (is_hidden(file.name) and not is_listed):
            ignored.append(file.name)
        else:
            (hidden if is_hidden(file.name) else of_kind)[kind].append(file)
    if media is None and all(of_kind.values()):
        raise ValueError(
            f"{source.title}: {len(of_kind['pictures']):,} pictures and {len(of_kind['videos']):,} videos; say which "
            "of them to pack, with --media pictures or --media videos"
        )
    media = media or ("videos" if of_kind["videos"] else "pictures")
    files = of_kind.pop(media) + hidden.pop(media)
    ignored += [file.name for others in hidden.values() for file in others]
    if not files:
        wanted = ", ".join(sorted(frozenset().union(*(SUFFIXES[kind] for kind in [media, *of_kind]))))
        raise ValueError(
            f"{source.title}: no {media} found among {len(ignored) + sum(map(len, of_kind.values()))} files; expected "
            f"{wanted} in class folders, or in one folder for an unlabelled set"
        )
    for file in files:
        if file.size_bytes > MAX_FILE_BYTES:
            raise ValueError(
                f"{source.title}: {file.name} has {file.size_bytes:,} bytes; expected at most {MAX_FILE_BYTES:,} in "
                f"one of the {media}; remove the file, or cut it into shorter ones"
            )
    return media, files, ignored + [file.name for others in of_kind.values() for file in others]


def _wrapping_depth(names: list[str], known_classes: frozenset[str]) -> int:
    """How many leading folders all names share, up to a known class (a validation set may have only one)."""
    first, *others = [name.split("/")[:-1] for name in names]
    for depth, folder in enumerate(first):
        if folder in known_classes or any(path[depth : depth + 1] != [folder] for path in others):
            return depth
    return len(first)


def _class_names(source: Source, names: list[str], media: Media) -> tuple[str, ...]:
    """The class folders in natural order; none for files that lie in a single folder."""
    flat = [name for name in names if "/" not in name]
    folders = {name.split("/")[0] for name in names if "/" in name}
    if not folders:
        return ()
    if flat:
        raise ValueError(
            f"{source.title}: {len(flat)} {media} lie beside the class folders, e.g. {flat[0]}; move them into a "
            f"class folder, or pack a folder that holds {media} only (unlabelled)"
        )
    if {name.lower() for name in folders} <= _SPLIT_NAMES:
        first, *others = sorted(folders, key=lambda name: (not name.lower().startswith("train"), name))
        raise ValueError(
            f"{source.title}: the folders {', '.join([first, *others])} look like splits, not classes; pack "
            f"{first} as SRC and give the other one with --val"
        )
    return check_class_names(sorted(folders, key=natural_key))


def _check_known(source: Source, found: Sequence[str], classes: Sequence[str]) -> None:
    """Refuses classes of a validation source that the training source does not have.

    Args:
        source: the validation source.
        found: its classes; empty if it is unlabelled.
        classes: those of the training source; empty if it is unlabelled.

    Raises:
        ValueError: a class is not known, or only one of the two is labelled.
    """
    if bool(found) != bool(classes):
        kinds = ("labelled", "unlabelled")
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
    """Keys as webdataset wants them: unique, and without a dot in the last part. "a/b.c.jpg" becomes "a/b_c", and a
    second "a/b_c" becomes "a/b_c-1".
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
