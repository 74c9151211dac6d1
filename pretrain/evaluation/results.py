"""Results of evaluations: their records, their files, and their points in the run's journal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipes.store.files import write_atomically
from pretrain.tracking.journal import JOURNAL_NAME, JournalWriter
from pretrain.weights.backbone import Backbone


def write_results(records: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Writes each record to `folder/<model>/<task>.json`, whole or not at all; returns the files."""
    paths = []
    for record in records:
        path = folder / str(record["model"]) / f"{record['task']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(record, indent=1) + "\n").encode())
        paths.append(path)
    return paths


def journal_results(backbone: Backbone, records: Sequence[Mapping[str, Any]]) -> None:
    """Adds `eval/<task>/<metric>` (`eval_ema/...`, `eval_untrained/...`) to the journal of the backbone's run.

    The points carry the checkpoint's own step and time, so that evaluating the same weights again changes nothing.
    """
    if backbone.run_dir is None or not (backbone.run_dir / JOURNAL_NAME).is_file() or not records:
        return
    prefix = {"trained": "eval", "ema": "eval_ema", "untrained": "eval_untrained"}[backbone.weights]
    metrics = {
        f"{prefix}/{record['task']}/{name}": value for record in records for name, value in record["metrics"].items()
    }
    assert backbone.complete is not None
    writer = JournalWriter(backbone.run_dir / JOURNAL_NAME)
    try:
        writer.append("metrics", {"step": backbone.step, "metrics": metrics}, time_ms=int(backbone.complete["time_ms"]))
    finally:
        writer.close()
