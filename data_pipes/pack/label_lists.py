"""Labels from a list, as Kinetics and Something-Something come with: one line per file.

Enters: a text file (see data_pipes.pack.list_format). Leaves: which class each file of a source has. Why it exists:
video sets are handed out as one folder of files and a list per split.

Labels that are all numbers without a leading zero are the classes 0, 1, ... up to the largest; all others are names,
`001` too, and names are sorted. `-1` means that a file has no label. A path is that of a file below the source; its
suffix may be left out (Something-Something: `78687` for `78687.webm`), and folders that lie above the source may stand
before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from data_pipes.decode.formats import FILE_EXTENSIONS
from data_pipes.decode.video import VIDEO_EXTENSIONS
from data_pipes.pack.list_format import ListFormat, Row, parse_list
from data_pipes.pack.sources import natural_key
from data_pipes.shards.manifest import check_class_names

NO_LABEL = "-1"
"""The label of files that have none."""
_MAX_CLASSES = 1_000_000
"""Numbers of classes are below this; a larger one is taken for something else, such as an id."""


class Matched(NamedTuple):
    """A list of labels and the files of a source."""

    label_of: dict[str, str]
    """Name of a file -> its label."""
    missing: list[str]
    """Paths of the list that are no file of the source."""
    unlabelled: list[str]
    """Files that are in the list and have no label."""


@dataclass(frozen=True)
class LabelList:
    """A list of labels."""

    place: str
    """The path of the list, for messages."""
    label_of: dict[str, str]
    """Path of a file, as the list has it -> label."""
    understood: str = ""
    """How the list was read, in words."""
    first: Row | None = None
    """The first line, where nothing says whether it has titles."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes; numbers count from 0 to the largest."""
        names = set(self.label_of.values()) - {NO_LABEL}
        if names and all(map(_is_number, names)):
            return tuple(str(number) for number in range(max(map(int, names)) + 1))
        return check_class_names(sorted(names, key=natural_key)) if names else ()

    def match(self, names: Sequence[str], title: str) -> Matched:
        """Finds the files that the list is about.

        Args:
            names: of the source's files.
            title: of the source, for messages.

        Raises:
            ValueError: no path fits, two lines give one file two labels, or the first line looks like titles.
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
                f"paths below it, as {names[0]!r}; the list was read as {self.understood}; if that is wrong, use "
                "--columns and --delimiter"
            )
        if self.first is not None and self.first.path in missing:
            self._refuse_titles(self.first)
        unlabelled = [name for name, label in found.items() if label == NO_LABEL]
        labelled = {name: label for name, label in found.items() if label != NO_LABEL}
        return Matched(labelled, missing, unlabelled)

    def _refuse_titles(self, first: Row) -> None:
        """Refuses a first line that looks like titles which nobody declared: its label would become a class."""
        suffix = PurePosixPath(first.path.lower()).suffix[1:]
        is_alone = list(self.label_of.values()).count(first.label) == 1
        if is_alone and suffix not in (*FILE_EXTENSIONS, *VIDEO_EXTENSIONS) and not any(map(str.isdigit, first.path)):
            raise ValueError(
                f"{self.place}, line {first.line}: {first.path!r} is no file and looks like a title; say "
                f"--columns image={first.path},label={first.label}, or --columns image=0,label=1 if it is a file"
            )


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


def read_labels(path: Path, form: ListFormat | None = None) -> LabelList:
    """Reads a list of labels.

    Args:
        path: of the list.
        form: what is said about its form; None: nothing.
    Raises:
        ValueError: the file is no list of labels; the message has the number of the line.
        OSError: the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: no UTF-8 text ({error.reason} at byte {error.start})") from error
    form = form or ListFormat()
    rows, has_titles, understood = parse_list(str(path), text, form)
    label_of: dict[str, str] = {}
    for number, name, label in rows:
        if not name or not label:
            raise ValueError(
                f"{path}, line {number}: found {name!r} with the label {label!r}; expected a path and a label"
            )
        if label_of.setdefault(name, label) != label:
            raise ValueError(f"{path}, line {number}: {name} has the labels {label_of[name]!r} and {label!r}")
    if not label_of:
        raise ValueError(f"{path}: the list of labels has titles and no line behind them")
    labels = LabelList(str(path), label_of, understood, None if has_titles or form.image is not None else rows[0])
    names = set(label_of.values()) - {NO_LABEL}
    largest = max(map(int, names), default=0) if all(map(_is_number, names)) else 0
    if largest >= _MAX_CLASSES:
        raise ValueError(f"{path}: the label {largest}; expected numbers of classes, counted from 0")
    return labels


def _is_number(text: str) -> bool:
    """Whether it is the number of a class: with a leading zero it is a name."""
    return text.isascii() and text.isdigit() and len(text) <= 9 and (text == "0" or text[0] != "0")
