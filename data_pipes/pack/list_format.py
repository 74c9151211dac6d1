"""From the text of a list of labels to its pairs of path and label.

Enters: the text, and what the user says about its form. Leaves: the pairs, and in words how the text was understood.
Why it exists: lists are handed out with commas, tabs, semicolons or blanks, with titles or without, or as JSON. What is
not said is taken from all lines together, never from the first one alone, and is printed before anything is packed.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

PATH_TITLES = ("path", "video", "video_path", "file", "filename", "file_name", "image", "image_path", "id", "video_id")
"""Titles of the column with the paths, in the order of preference."""
LABEL_TITLES = ("template", "label", "class", "class_name", "category")
"""Titles of the column with the labels, in the order of preference; Something-Something's class is its template."""
_KINETICS = ("youtube_id", "time_start", "time_end")
"""Columns of which the names of Kinetics' files are made."""
_DELIMITERS = {"comma": ",", "tab": "\t", "semicolon": ";", "blank": " "}
_WORDS = {delimiter: name for name, delimiter in _DELIMITERS.items()}
_NUMBERS_BEHIND = re.compile(r"\S.*\.\w{2,5}(?:\s+-?\d+){2,}\s*")
"""A path and several numbers."""


@dataclass(frozen=True)
class ListFormat:
    """How a list of labels is written; what is None is taken from the list."""

    delimiter: str | None = None
    """Between the columns: a character, or comma, tab, semicolon or blank."""
    image: str | None = None
    """The column with the paths: its title, or its number from 0 in a list without titles."""
    label: str | None = None
    """The column with the labels, likewise."""

    def __post_init__(self) -> None:
        if self.delimiter is not None and len(self.delimiter) != 1 and self.delimiter not in _DELIMITERS:
            raise ValueError(
                f"the delimiter is {self.delimiter!r}; expected one character, or {', '.join(_DELIMITERS)}"
            )
        if (self.image is None) != (self.label is None):
            raise ValueError("one column is named and one is not; expected both, as in image=path,label=category")

    @property
    def character(self) -> str | None:
        """The delimiter itself."""
        return None if self.delimiter is None else _DELIMITERS.get(self.delimiter, self.delimiter)


def parse_columns(text: str) -> tuple[str, str]:
    """The columns of paths and labels in "image=path,label=category".

    Raises:
        ValueError: it is written otherwise.
    """
    parts = dict(part.partition("=")[::2] for part in text.split(","))
    if parts.keys() != {"image", "label"} or not all(parts.values()):
        raise ValueError(
            f"--columns is {text!r}; expected image=TITLE,label=TITLE (or numbers from 0: image=0,label=1)"
        )
    return parts["image"], parts["label"]


class Row(NamedTuple):
    """One line of a list."""

    line: int
    """Its number, from 1."""
    path: str
    label: str


class ReadList(NamedTuple):
    """The pairs of a list."""

    rows: list[Row]
    has_titles: bool
    understood: str
    """How the list was read, in words."""


def parse_list(place: str, text: str, form: ListFormat) -> ReadList:
    """The pairs of path and label in a text.

    Args:
        place: of the list, for messages.
        text: the list.
        form: what the user says about it.
    Raises:
        ValueError: the text cannot be read so; the message has the number of the line.
    """
    if text.lstrip().startswith(("[", "{")):
        return _with_columns(place, _json_rows(place, text), form, "JSON")
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{place}: the list of labels is empty; expected lines of `path,label` or `path label`")
    delimiter = form.character or _common_delimiter([line for _, line in lines])
    if delimiter == " " and form.image is None:
        return _from_words(place, lines)
    rows = [(number, line.split()) for number, line in lines] if delimiter == " " else _cells(place, lines, delimiter)
    return _with_columns(place, rows, form, f"columns by {_WORDS.get(delimiter, repr(delimiter))}")


def _common_delimiter(lines: Sequence[str]) -> str:
    """The delimiter that gives all lines the same number of columns; a blank where there is none, as long as all lines
    have one.
    """
    for delimiter in ("\t", ",", ";"):
        numbers = {len(row) for row in csv.reader(lines, delimiter=delimiter)}
        if len(numbers) == 1 and numbers.pop() > 1:
            return delimiter
    if all(len(line.split()) > 1 for line in lines):
        return " "
    return next((delimiter for delimiter in ("\t", ",", ";") if delimiter in lines[0]), " ")


def _cells(place: str, lines: list[tuple[int, str]], delimiter: str) -> list[tuple[int, list[str]]]:
    """The number of each line and its columns."""
    rows = []
    for number, line in lines:
        try:
            rows.append((number, [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter, strict=True))]))
        except csv.Error as error:
            raise ValueError(f'{place}, line {number}: {error}; expected cells in "" to be closed') from error
    return rows


def _json_rows(place: str, text: str) -> list[tuple[int, list[str]]]:
    """A row of titles, and one of each object."""
    try:
        objects = json.loads(text)
        if isinstance(objects, dict):
            pairs = [(n, [path, str(label)]) for n, (path, label) in enumerate(objects.items(), 1)]
            return [(1, ["path", "label"]), *pairs]
        titles = list(objects[0])
        return [(1, titles)] + [(n, [str(item[title]) for title in titles]) for n, item in enumerate(objects, 1)]
    except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise ValueError(
            f"{place}: no list of objects with the same keys ({type(error).__name__}: {error}); expected JSON such as "
            '[{"id": "78687", "template": "Holding [something]"}] or {"78687": "Holding [something]"}'
        ) from error


def _with_columns(place: str, rows: list[tuple[int, list[str]]], form: ListFormat, how: str) -> ReadList:
    """Chooses the columns of paths and labels."""
    number, titles = rows[0]
    names = [title.lower() for title in titles]
    if form.image is not None and form.label is not None:
        columns = [_named_column(place, name, titles) for name in (form.image, form.label)]
        has_titles = not (form.image.isdigit() and form.label.isdigit())
    elif {*_KINETICS, "label"} <= {*names}:
        columns, has_titles = [names.index("youtube_id"), names.index("label")], True
    else:
        found = [next((names.index(t) for t in known if t in names), None) for known in (PATH_TITLES, LABEL_TITLES)]
        has_titles = None not in found
        if not has_titles and len(titles) != 2:
            raise ValueError(
                f"{place}, line {number}: {len(titles)} columns; expected `path,label`, or a first line that names the "
                f"columns, one of {', '.join(PATH_TITLES)} and one of {', '.join(LABEL_TITLES)}; or name them with "
                "--columns image=TITLE,label=TITLE"
            )
        columns = [column for column in found if column is not None] if has_titles else [0, 1]
    pairs = []
    for line, row in rows[has_titles:]:
        if len(row) != len(titles):
            raise ValueError(f"{place}, line {line}: {len(row)} columns; expected {len(titles)} as in the first line")
        path = row[columns[0]]
        if has_titles and names[columns[0]] == "youtube_id" and {*_KINETICS} <= {*names}:
            start, end = (float(row[names.index(title)]) for title in _KINETICS[1:])
            path = f"{path}_{int(start):06d}_{int(end):06d}"
        pairs.append(Row(line, path, row[columns[1]]))
    where = [f"{titles[column]!r}" if has_titles else str(column) for column in columns]
    return ReadList(pairs, has_titles, f"{how}, path in {where[0]}, label in {where[1]}")


def _named_column(place: str, name: str, titles: list[str]) -> int:
    """The number of a column that the user named."""
    if name in titles:
        return titles.index(name)
    if name.isdigit() and int(name) < len(titles):
        return int(name)
    raise ValueError(f"{place}: no column {name!r}; the first line has {', '.join(titles)}")


def _from_words(place: str, lines: list[tuple[int, str]]) -> ReadList:
    """A path, which may have blanks, white space and a label without."""
    rows = []
    if all(_NUMBERS_BEHIND.fullmatch(line) and line.split()[-1] == "-1" for _, line in lines):  # VideoMAE's own lists
        rows = [Row(number, line.rsplit(maxsplit=2)[0].strip(), "-1") for number, line in lines]
        return ReadList(rows, False, "path, number of frames and -1 by blank")
    for number, line in lines:
        words = line.strip().rsplit(maxsplit=1)
        if len(words) != 2:
            raise ValueError(
                f"{place}, line {number}: found {line.strip()[:80]!r}; expected a path, a blank and a label"
            )
        if _NUMBERS_BEHIND.fullmatch(line):
            raise ValueError(
                f"{place}, line {number}: several numbers behind a path: {line.strip()[:80]!r}; a file has one label, "
                "so say which column it is, with --delimiter blank --columns image=0,label=1"
            )
        rows.append(Row(number, *words))
    return ReadList(rows, False, "path and label by blank")
