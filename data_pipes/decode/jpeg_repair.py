"""Faults of a JPEG that have nothing to do with its pixels, taken out.

Enters: a JPEG, and the warning that libjpeg gave. Leaves: the same picture without that fault, or nothing. Why it
exists: libjpeg warns of much that phones and editors do to files whose pixels are all there; and it reports only its
first warning, so a harmless one hides what follows. Without the harmless fault the picture is decoded once more, as
strictly as before: what is missing then still shows.
Source: ITU-T T.81, annex B; the list of warnings in libjpeg's jerror.h.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

MAX_REPAIRS = 8
"""Faults of one picture that are taken out; of filling, libjpeg may report a part at a time."""

_SCAN, _END, _APP0, _APP14 = 0xDA, 0xD9, 0xE0, 0xEE
_ALONE = frozenset((0x01, *range(0xD0, 0xD9)))
"""Markers without a length: TEM, the restarts and the start of the picture."""
_EXTRANEOUS = re.compile(r"(\d+) extraneous bytes before marker 0x([0-9a-f]{2})")
_SURELY_FILLING = 8
"""So many equal bytes are no remains of compressed pixels, whatever their value; fewer are believed if 0 or 255."""


class _Segment(NamedTuple):
    """One part of a JPEG: a marker, its parameters, and behind a scan's its compressed pixels."""

    marker: int
    start: int
    """Where its 0xFF lies."""
    parameters: int
    """Where its parameters begin, behind the length."""
    end: int
    """Behind its parameters."""
    gap: int
    """Bytes before it that belong to nothing."""


def repaired(data: bytes, warning: str) -> bytes | None:
    """The same picture without the fault that a warning is about.

    Args:
        data: the file.
        warning: libjpeg's words.
    Returns:
        None: the warning is about the pixels, or the fault is not where it should be.
    """
    if "Invalid SOS parameters for sequential" in warning:
        # The first and the last coefficient of a scan, and their bits, are always the same here and read by nobody.
        scans = [segment for segment in _segments(data) if segment.marker == _SCAN]
        return _replaced(data, {scan.end - 3: b"\0\x3f\0" for scan in scans})
    if "unknown JFIF revision" in warning:
        heads = [segment.parameters for segment in _segments(data) if segment.marker == _APP0]
        return _replaced(data, {start + 5: b"\1\1" for start in heads if data[start : start + 5] == b"JFIF\0"})
    if "Unknown Adobe color transform" in warning:  # libjpeg goes on as if it said YCbCr, which is 1
        heads = [segment.parameters for segment in _segments(data) if segment.marker == _APP14]
        return _replaced(data, {start + 11: b"\1" for start in heads if data[start : start + 5] == b"Adobe"})
    found = _EXTRANEOUS.search(warning)
    return None if found is None else _without_filling(data, int(found[1]), int(found[2], 16))


def _without_filling(data: bytes, num_bytes: int, marker: int) -> bytes | None:
    """Without bytes between two segments of the header, or equal bytes between the pixels and the end."""
    is_header = True
    for segment in _segments(data):
        if is_header and segment.gap == num_bytes and segment.marker == marker:
            return data[: segment.start - num_bytes] + data[segment.start :]
        is_header = is_header and segment.marker != _SCAN
        if segment.marker == marker == _END:
            filling = data[segment.start - num_bytes : segment.start]
            if len(set(filling)) == 1 and (num_bytes >= _SURELY_FILLING or filling[0] in (0, 255)):
                return data[: segment.start - num_bytes] + data[segment.start :]
    return None


def _segments(data: bytes) -> Iterator[_Segment]:
    """The parts of a JPEG up to its end, or to where they make no sense."""
    place = 2
    while True:
        start = _next_marker(data, place)
        if start is None:
            return
        marker, behind = data[start + 1], start + 2
        if marker in _ALONE or marker == _END:
            yield _Segment(marker, start, behind, behind, start - place)
            place = behind
        else:
            length = int.from_bytes(data[behind : behind + 2], "big")
            if length < 2 or behind + length > len(data):
                return
            yield _Segment(marker, start, behind + 2, behind + length, start - place)
            place = behind + length
        if marker == _END:
            return
        if marker == _SCAN:
            place = _next_marker(data, place, in_scan=True) or len(data)


def _next_marker(data: bytes, place: int, in_scan: bool = False) -> int | None:
    """Where the next marker's last 0xFF lies; within a scan, zeros and restarts behind 0xFF belong to the pixels."""
    while True:
        place = data.find(b"\xff", place)
        if place < 0 or place + 1 >= len(data):
            return None
        code = data[place + 1]
        if code not in (0, 0xFF) and not (in_scan and 0xD0 <= code <= 0xD7):
            return place
        place += 1


def _replaced(data: bytes, parts: dict[int, bytes]) -> bytes | None:
    """With other bytes at some places; None where nothing changes."""
    changed = bytearray(data)
    for place, part in parts.items():
        changed[place : place + len(part)] = part
    return None if changed == data else bytes(changed)
