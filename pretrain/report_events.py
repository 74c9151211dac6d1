"""The events of a journal in words, for the report.

Enters: journal records. Leaves: rows of (time in ms, title, details), oldest first; many of one kind are cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

_SHOWN = 50
_HIDDEN = ("time_ms", "type", "name", "samples", "folder", "global_batch")


class EventRow(NamedTuple):
    """One line of the table."""

    time_ms: int
    title: str
    details: str


def event_rows(records: Sequence[dict[str, Any]]) -> tuple[list[EventRow], int]:
    """(the newest rows, how many older ones are not among them)."""
    events = [record for record in records if record.get("type") == "event"]
    rows = [_row(event) for event in events[-_SHOWN:]]
    return rows, len(events) - len(rows)


def _row(event: dict[str, Any]) -> EventRow:
    parts = [f"{name.replace('_', ' ')} {value}" for name, value in event.items() if name not in _HIDDEN]
    samples = event.get("samples") or []
    if samples:
        more = int(event.get("num_samples", len(samples))) - 3
        parts.append(f"samples {', '.join(map(str, samples[:3]))}" + (f" and {more} more" if more > 0 else ""))
    if event.get("folder"):
        parts.append(f"files in {event['folder']}")
    return EventRow(int(event["time_ms"]), str(event.get("name", "?")).replace("_", " "), "; ".join(parts))
