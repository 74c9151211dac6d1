"""A run's reconstructions for its report: pictures and films over time, as data URIs with captions.

Enters: a run's folder. Leaves: rows of {"caption", "uri"}, the newest first; few of many, so that the page stays small.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pretrain.pictures import film_uri, picture_uri

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
