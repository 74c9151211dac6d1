"""What a report lists: reconstructions over time, evaluations, and events.

Enters: a run's folder, or the records of its journal. Leaves: rows for the template. Of many pictures and events few
are shown, so that the page stays small.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.report.curves import format_value
from pretrain.report.embedded import film_uri, picture_uri

MAX_PICTURES = 8
"""Strips of one report."""
MAX_FILMS = 3
"""Films of one report."""
_MAX_EVENTS = 50
"""Events of one report."""
_FIELDS_APART = ("time_ms", "type", "name", "samples", "folder", "global_batch")
"""Fields of an event that its details leave out, or word in their own way."""


def picture_rows(run_dir: Path) -> list[dict[str, str]]:
    """The run's strips, `pictures/step-*.png`, as {"caption", "uri"} with data URIs, the newest first."""
    return _image_rows(sorted(run_dir.glob("pictures/step-*.png")), MAX_PICTURES, picture_uri)


def film_rows(run_dir: Path) -> list[dict[str, str]]:
    """The run's films, `films/step-*.gif`, in the same form."""
    return _image_rows(sorted(run_dir.glob("films/step-*.gif")), MAX_FILMS, film_uri)


def _image_rows(paths: list[Path], most: int, uri_of: Callable[[Path], str]) -> list[dict[str, str]]:
    """Rows of at most `most` files, without those that `uri_of` cannot read."""
    if len(paths) > most:  # evenly spread, with the first and the last
        paths = [paths[round(i * (len(paths) - 1) / (most - 1))] for i in range(most)]
    found = [(path.stem.removeprefix("step-"), uri_of(path)) for path in reversed(paths)]
    return [{"caption": f"step {int(step):,}" if step.isdigit() else step, "uri": uri} for step, uri in found if uri]


def evaluation_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The results in `eval/**/*.json`, sorted by task, protocol and step.

    Untrained baselines have no step; they come first, since the others are read against them.
    """
    results = [read_json(path) for path in sorted(run_dir.glob("eval/**/*.json"))]
    rows = [_evaluation_row(result) for result in results if isinstance(result.get("metrics"), dict)]
    return sorted(rows, key=lambda row: (row["task"], row["protocol"], -1 if row["step"] is None else row["step"]))


def _evaluation_row(result: dict[str, Any]) -> dict[str, Any]:
    """One record of `evaluation.results.make_record`, in words; what it lacks is left empty."""
    metrics, settings = result["metrics"], result.get("settings") or {}
    numbers = [(name, v) for name, v in metrics.items() if isinstance(v, (int, float)) and not isinstance(v, bool)]
    return {
        "task": str(result.get("task", "?")),
        "protocol": str(result.get("protocol", "?")),
        "step": result.get("step"),
        "weights": str(result.get("weights", "?")),
        "num_train": result.get("num_train"),
        "num_test": result.get("num_test"),
        "selection": _words(result.get("selection")),
        "metrics": [(name, f"{value:.4f}" if abs(value) < 1e4 else format_value(value)) for name, value in numbers],
        "settings": ", ".join(f"{key}={value}" for key, value in settings.items())
        if isinstance(settings, dict)
        else "",
        "model_digest": str(result.get("model_digest", ""))[:12],
    }


def _words(value: object) -> str:
    """A small mapping or text of a record as words."""
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_words(item)}" for key, item in value.items())
    return "" if value is None else str(value)


class EventRow(NamedTuple):
    """One line of the table of events."""

    time_ms: int
    """when it happened, in ms since 1970"""
    title: str
    """its name"""
    details: str
    """its other fields"""


def event_rows(records: Sequence[dict[str, Any]]) -> tuple[list[EventRow], int]:
    """The newest events of a journal, and how many older ones are not among them."""
    events = [record for record in records if record.get("type") == "event"]
    rows = [_event_row(event) for event in events[-_MAX_EVENTS:]]
    return rows, len(events) - len(rows)


def _event_row(event: dict[str, Any]) -> EventRow:
    """One event in words."""
    parts = [f"{name.replace('_', ' ')} {value}" for name, value in event.items() if name not in _FIELDS_APART]
    samples = event.get("samples") or []
    if samples:
        more = int(event.get("num_samples", len(samples))) - 3
        parts.append(f"samples {', '.join(map(str, samples[:3]))}" + (f" and {more} more" if more > 0 else ""))
    if event.get("folder"):
        parts.append(f"files in {event['folder']}")
    return EventRow(int(event["time_ms"]), str(event.get("name", "?")).replace("_", " "), "; ".join(parts))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when the file is absent, torn or something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
