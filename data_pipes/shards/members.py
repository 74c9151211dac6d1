"""From the members of a sample, as they are stored, to its parts: picture, label, caption, metadata.

Enters: a `RawSample`. Leaves: a tensor, a label, a text, an object. Why it exists: training, evaluation and the tools
that look at data sets must agree on which member is what. Nothing here runs code that a member holds: there is no
pickle, and a member of an unknown kind is left alone.

JSON is read strictly, since two readers of a lenient dialect see two data sets: UTF-8, one object, no key twice in an
object, bounded in bytes and depth. Numbers that are none (NaN, which Python writes for a missing one, and infinities)
are null: they are a gap in the metadata, and no fault of the picture.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from data_pipes.decode import formats
from data_pipes.decode.video import VIDEO_EXTENSIONS
from data_pipes.errors import Cause, SampleError
from data_pipes.shards.reader import RawSample
from data_pipes.shards.wanted import is_pattern

IMAGE_EXTENSIONS = formats.IMAGE_EXTENSIONS
"""Extensions of members that are pictures, in the order of preference where a sample has several."""
LABEL_EXTENSIONS = ("cls", "json")
"""Extensions of members that hold a label; the first that is there counts."""
CAPTION_EXTENSIONS = ("txt", "caption", "json")
"""Extensions of members that hold a caption; the first that is there counts."""

MAX_METADATA_BYTES = 1 << 20
"""Size of a `json` member, at most."""
MAX_METADATA_DEPTH = 32
"""Levels of nested objects and lists in a `json` member, at most."""
MAX_CAPTION_BYTES = 1 << 16
"""Bytes of a caption in UTF-8, at most."""


def encoded_picture(raw: RawSample, member: str | None = None) -> bytes:
    """The bytes of a sample's picture.

    Args:
        raw: the sample.
        member: which member it is, a name or a pattern; None: the first of `IMAGE_EXTENSIONS`.

    Raises:
        SampleError: "no_image".
    """
    return _first_of(raw, IMAGE_EXTENSIONS, member, "no_image", "picture")


def encoded_video(raw: RawSample, member: str | None = None) -> bytes:
    """The bytes of a sample's video.

    Args:
        raw: the sample.
        member: which member it is, a name or a pattern; None: the first of `VIDEO_EXTENSIONS`.

    Raises:
        SampleError: "no_video".
    """
    return _first_of(raw, VIDEO_EXTENSIONS, member, "no_video", "video")


def _first_of(raw: RawSample, extensions: Sequence[str], member: str | None, cause: Cause, what: str) -> bytes:
    """The named member, else that with the first of the extensions that the sample has; an error with the given cause
    without one.
    """
    if member is not None and is_pattern(member):
        extensions = [extension for extension in raw.found if fnmatchcase(extension, member)]
    elif member is not None:
        extensions = (member,)
    for extension in extensions:
        if extension in raw.members:
            return raw.members[extension]
    named = "" if member is None else f" of the name {member} (data.image_member)"
    raise SampleError(cause, f"no {what}{named} among the members {list(raw.found)}")


def no_media(place: str, what: str, extensions: Sequence[str], member: str | None = None) -> str:
    """What is said of a data set in which no sample has a picture or a video.

    Args:
        place: of the data set.
        what: that no sample has, in words.
        extensions: of the members that are there.
        member: as which it was searched for; None: by the known endings.
    """
    known = formats.FILE_EXTENSIONS + VIDEO_EXTENSIONS
    likely = next((name for name in extensions if name.rpartition(".")[2] in known), None)
    advice = "no ending is one of a picture or video: were the files downloaded?"
    if likely is not None and likely.rpartition(".")[2] in VIDEO_EXTENSIONS and what == "picture":
        advice = "these are videos: see data.video"
    elif likely is not None:
        advice = (
            f"say which of them it is, e.g. data.image_member={likely}, or by a pattern such as *.jpg (`tessera data` "
            "takes it as --image-member)"
        )
    named = "" if member is None else f" named {member} (data.image_member)"
    shown = ", ".join(f".{name}" for name in extensions[:8]) + (", ..." if len(extensions) > 8 else "")
    return f"{place}: no sample has a {what}{named}; the members are {shown}; {advice}"


def label_of(raw: RawSample, classes: Sequence[str] | int, label_key: str = "label") -> int:
    """The class of a sample: from `cls` (an integer in ASCII digits), else from `json` (an integer, or the name of a
    class).

    Args:
        raw: the sample.
        classes: the names of the classes, or their number; empty or 0 where they are not known.
        label_key: the key of the label in the object of `json`.

    Returns:
        The number of the class, -1 where the sample has no label.

    Raises:
        SampleError: "label" where the label is anything else or beyond the classes; "metadata" where the JSON cannot be
            read.
    """
    if "cls" in raw.members:
        text = raw.members["cls"].strip()
        number = int(text) if text.isdigit() and len(text) <= 9 else None
        return _checked_label(number, text[:40], ".cls", classes)
    value = (metadata_of(raw) or {}).get(label_key)
    if value is None:
        return -1
    number = value if type(value) is int else None
    if isinstance(value, str) and not isinstance(classes, int) and value in classes:
        number = classes.index(value)  # 10 us among 1,000 names
    found = value if isinstance(value, int) else value[:40] if isinstance(value, str) else type(value).__name__
    return _checked_label(number, found, f".json, {label_key!r}", classes)


def _checked_label(number: int | None, found: object, place: str, classes: Sequence[str] | int) -> int:
    """The number of a class, if it is one.

    Args:
        number: the label; None: it is no number and no name of a class.
        found: what stands in the member, for the message.
        place: where it stands, for the message.
        classes: see `label_of`.

    Raises:
        SampleError: "label".
    """
    num_classes = classes if isinstance(classes, int) else len(classes)
    if number is None or not 0 <= number < (num_classes or 10**9):
        expected = f"0 to {num_classes - 1}" if num_classes else "an integer in ASCII digits"
        if place != ".cls":
            named = num_classes and not isinstance(classes, int)
            expected += " or the name of a class" if named else "; the data set names no classes"
        raise SampleError("label", f"the label ({place}) is {found!r}; expected {expected}")
    return number


def caption_of(raw: RawSample) -> str | None:
    """The text of a sample without white space around it: from `txt`, `caption`, or `json` under "caption"; None where
    there is none.

    Raises:
        SampleError: "caption" where it is no UTF-8 text of at most `MAX_CAPTION_BYTES`; "metadata" where the JSON
            cannot be read.
    """
    for extension in ("txt", "caption"):
        if extension in raw.members:
            data = raw.members[extension]
            break
    else:
        value = (metadata_of(raw) or {}).get("caption")
        if value is None:
            return None
        if not isinstance(value, str):
            raise SampleError("caption", f"the caption (.json) is a {type(value).__name__}; expected a text")
        extension, data = "json", value.encode("utf-8", "surrogatepass")
    if len(data) > MAX_CAPTION_BYTES:
        raise SampleError(
            "caption", f"the caption (.{extension}) has {len(data):,} bytes; expected at most {MAX_CAPTION_BYTES:,}"
        )
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise SampleError(
            "caption", f"the caption (.{extension}) is no UTF-8 ({error.reason} at byte {error.start})"
        ) from error


def metadata_of(raw: RawSample) -> dict[str, Any] | None:
    """The object in the member `json`, with null for numbers that are not finite; None without such a member.

    Raises:
        SampleError: "metadata" where the JSON is not as strict as the module's head says.
    """
    data = raw.members.get("json")
    if data is None:
        return None
    if len(data) > MAX_METADATA_BYTES:
        raise _bad_metadata(f"it has {len(data):,} bytes; expected at most {MAX_METADATA_BYTES:,}")
    try:
        value = json.loads(
            data.decode("utf-8-sig"),
            parse_constant=lambda name: None,  # NaN, Infinity, -Infinity
            parse_float=_finite,
            object_pairs_hook=_without_repeats,
        )
    except (ValueError, RecursionError) as error:  # also bytes that are no UTF-8, and integers of over 4,300 digits
        raise _bad_metadata(f"{type(error).__name__}: {error}") from error
    if not isinstance(value, dict):
        raise _bad_metadata(f"it holds a {type(value).__name__}; expected an object")
    if data.count(b"{") + data.count(b"[") > MAX_METADATA_DEPTH and _depth(value) > MAX_METADATA_DEPTH:
        raise _bad_metadata(f"it is nested deeper than {MAX_METADATA_DEPTH} levels")
    return value


def _bad_metadata(found: str) -> SampleError:
    return SampleError("metadata", f"the metadata (.json) cannot be used: {found[:400]}")


def _finite(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        repeated = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {repeated[:40]!r} stands twice in one object")
    return content


def _depth(value: Any) -> int:
    """Levels of objects and lists; without recursion, as a hostile member chooses the depth."""
    depth, level = 0, [value]
    while level:
        level = [child for child in level if isinstance(child, dict | list)]
        depth += bool(level)
        level = [inner for child in level for inner in (child.values() if isinstance(child, dict) else child)]
    return depth
