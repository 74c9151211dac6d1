"""Labels from a list, as Kinetics and Something-Something come with: one line per file.

Enters: a text file of `path,label` or `path label` lines. Leaves: which class each file of a source has. Why it exists:
video sets are handed out as one folder of files and a list per split.

With commas the file is read as CSV, and a first line that names the columns (path, video, file or id; label or class)
chooses among more than two. Without commas, a line is a path, white space, and a label without white space. Labels that
are all numbers are the classes 0, 1, ... up to the largest; names are sorted. A path is that of a file below the
source; its suffix may be left out (Something-Something: `78687` for `78687.webm`), and folders that lie above the
source may stand before it.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipes.pack.sources import natural_key
from data_pipes.shards.manifest import check_class_names

_PATH_COLUMNS = ("path", "video", "video_path", "file", "filename", "id", "video_id")
"""Titles of the column with the paths."""
_LABEL_COLUMNS = ("label", "class", "class_name")
"""Titles of the column with the labels."""
_MAX_CLASSES = 1_000_000
"""Numbers of classes are below this; a larger one is taken for something else, such as an id."""


@dataclass(frozen=True)
class LabelList:
    """A list of labels."""

    place: str
    """The path of the list, for messages."""
    label_of: dict[str, str]
    """Path of a file, as the list has it -> label."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes; numbers count from 0 to the largest."""
        names = set(self.label_of.values())
        if all(map(_is_number, names)):
            return tuple(str(number) for number in range(max(map(int, names)) + 1))
        return check_class_names(sorted(names, key=natural_key))

    def match(self, names: Sequence[str], title: str) -> tuple[dict[str, str], list[str]]:
        """Finds the files that the list is about.

        Args:
            names: of the source's files.
            title: of the source, for messages.

        Returns:
            The label of each file by its name, and the paths of the list that are no file of the source.

        Raises:
            ValueError: no path fits, or two lines give one file two labels.
        """
        known = set(names)
        by_stem: dict[str, str | None] = {}
        for name in names:
            stem = name.rpartition(".")[0]
            by_stem[stem] = name if stem not in by_stem else None  # None: a.mp4 and a.webm
        found: dict[str, str] = {}
        missing = []
        for path, label in self.label_of.items():
            file = _find(path, known, by_stem)
            if file is None:
                missing.append(path)
            elif found.setdefault(file, label) != label:
                raise ValueError(f"{self.place}: {file} has the labels {found[file]!r} and {label!r}; keep one of them")
        if not found:
            raise ValueError(
                f"{self.place}: none of its {len(missing):,} paths is a file of {title}, e.g. {missing[0]!r}; expected "
                f"paths below it, as {names[0]!r}"
            )
        return found, missing


def _find(path: str, known: set[str], by_stem: dict[str, str | None]) -> str | None:
    """The name of the file that a path of the list means; None if there is no such file.

    Args:
        path: as the list has it.
        known: the names of the source's files.
        by_stem: name without its suffix -> name; None where several files share it.
    """
    parts = [part for part in path.replace("\\", "/").split("/") if part not in ("", ".")]
    for start in range(len(parts)):  # folders above the source are left off, one after the other
        rest = "/".join(parts[start:])
        if rest in known:
            return rest
        if by_stem.get(rest) is not None:
            return by_stem[rest]
    return None


def read_labels(path: Path) -> LabelList:
    """Reads a list of labels.

    Raises:
        ValueError: the file is no list of labels; the message has the number of the line.
        OSError: the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: no UTF-8 text ({error.reason} at byte {error.start})") from error
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{path}: the list of labels is empty; expected lines of `path,label` or `path label`")
    pairs = _from_csv(path, lines) if "," in lines[0][1] else _from_words(path, lines)
    label_of: dict[str, str] = {}
    for number, name, label in pairs:
        if not name or not label:
            raise ValueError(
                f"{path}, line {number}: found {name!r} with the label {label!r}; expected a path and a label"
            )
        if label_of.setdefault(name, label) != label:
            raise ValueError(f"{path}, line {number}: {name} has the labels {label_of[name]!r} and {label!r}")
    largest = max((int(label) for label in label_of.values() if _is_number(label)), default=0)
    if largest >= _MAX_CLASSES:
        raise ValueError(f"{path}: the label {largest}; expected numbers of classes, counted from 0")
    return LabelList(str(path), label_of)


def _from_csv(path: Path, lines: list[tuple[int, str]]) -> Iterator[tuple[int, str, str]]:
    """The number of each line, its path and its label."""
    rows = [(number, [cell.strip() for cell in next(csv.reader([line]))]) for number, line in lines]
    titles = [cell.lower() for cell in rows[0][1]]
    paths = [column for column, title in enumerate(titles) if title in _PATH_COLUMNS]
    labels = [column for column, title in enumerate(titles) if title in _LABEL_COLUMNS]
    has_titles = bool(paths and labels)
    if not has_titles and len(titles) != 2:
        raise ValueError(
            f"{path}, line {rows[0][0]}: {len(titles)} columns; expected `path,label`, or a first line that names the "
            f"columns, one of {', '.join(_PATH_COLUMNS)} and one of {', '.join(_LABEL_COLUMNS)}"
        )
    path_column, label_column = (paths[0], labels[0]) if has_titles else (0, 1)
    for number, row in rows[has_titles:]:
        if len(row) != len(titles):
            raise ValueError(f"{path}, line {number}: {len(row)} columns; expected {len(titles)} as in the first line")
        yield number, row[path_column], row[label_column]


def _from_words(path: Path, lines: list[tuple[int, str]]) -> Iterator[tuple[int, str, str]]:
    """The number of each line, its path, which may have blanks, and its label."""
    for number, line in lines:
        words = line.strip().rsplit(maxsplit=1)
        if len(words) != 2:
            raise ValueError(
                f"{path}, line {number}: found {line.strip()[:80]!r}; expected a path, a blank and a label"
            )
        yield number, words[0], words[1]


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 9
