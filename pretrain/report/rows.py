"""A run's reconstructions for its report: pictures and films over time, as data URIs with captions.

Enters: a run's folder. Leaves: rows of {"caption", "uri"}, the newest first; few of many, so that the page stays small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.report.picture_strips import film_uri, picture_uri

MAX_PICTURES = 8
MAX_FILMS = 3


def picture_rows(run_dir: Path) -> list[dict[str, str]]:
    """Strips, `pictures/step-*.png`."""
    return _rows(sorted(run_dir.glob("pictures/step-*.png")), MAX_PICTURES, picture_uri)


def film_rows(run_dir: Path) -> list[dict[str, str]]:
    """Films, `films/step-*.gif`."""
    return _rows(sorted(run_dir.glob("films/step-*.gif")), MAX_FILMS, film_uri)


def _rows(paths: list[Path], most: int, uri_of: Callable[[Path], str]) -> list[dict[str, str]]:
    if len(paths) > most:  # evenly spread, with the first and the last
        paths = [paths[round(i * (len(paths) - 1) / (most - 1))] for i in range(most)]
    found = [(path.stem.removeprefix("step-"), uri_of(path)) for path in reversed(paths)]
    return [{"caption": f"step {int(step):,}" if step.isdigit() else step, "uri": uri} for step, uri in found if uri]


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
