"""Results of evaluations: their records, their files, and their points in the run's journal."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipes.store.files import write_atomically
from pretrain.evaluation.outcome import Outcome
from pretrain.tracking.journal import JOURNAL_NAME, JournalWriter
from pretrain.weights.backbone import Backbone
from pretrain.weights.tokenizer import LoadedTokenizer


def make_record(
    model: Backbone | LoadedTokenizer,
    task: str,
    protocol: str,
    settings: Any,
    outcome: Outcome,
    *,
    data: Mapping[str, object],
    view: Mapping[str, object],
    precision: Mapping[str, str],
    seconds: Mapping[str, float],
    details: Mapping[str, object] | None = None,
) -> dict[str, Any]:
    """One result, with everything that its figures depend on; this is what a result file holds.

    Args:
        model: what was evaluated.
        task: the task's name in the suite.
        protocol: the protocol's name.
        settings: the protocol's settings, a dataclass.
        outcome: what the protocol found.
        data: fingerprints, and where there are some the number of classes, of the data sets.
        view: how samples were cut and resized.
        precision: of the forward pass, and of what was stored between.
        seconds: part of the work -> its duration.
        details: what else the protocol says of its figures; None: it says nothing more.
    """
    return {
        "protocol": protocol,
        "task": task,
        "model": model.label,
        "model_digest": model.digest,
        "step": model.step,
        "weights": model.weights,
        "run_uid": (model.complete or {}).get("run_uid"),
        "num_train": outcome.num_train,
        "num_test": outcome.num_test,
        **data,
        "view": {**view, "mean": list(model.mean), "std": list(model.std), **precision},
        "settings": dataclasses.asdict(settings),
        "selection": outcome.selection,
        "metrics": outcome.metrics,
        **({} if details is None else {"details": dict(details)}),
        "seconds": {part: round(duration_s, 2) for part, duration_s in seconds.items()},
        "time_ms": time.time_ns() // 1_000_000,
    }


def save_results(
    model: Backbone | LoadedTokenizer, records: Sequence[Mapping[str, Any]], folder: Path | None = None
) -> list[Path]:
    """Writes the records of one model to files, and their figures into the journal of the model's run.

    Args:
        model: what was evaluated.
        records: its results, of `make_record`.
        folder: gets the files; None: `eval` in the run's folder, and no files where there is no run.

    Returns:
        The files.
    """
    if folder is None and model.run_dir is not None:
        folder = model.run_dir / "eval"
    paths = [] if folder is None else write_results(records, folder)
    journal_results(model, records)
    return paths


def write_results(records: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Writes each record to `folder/<model>/<task>.json`, whole or not at all.

    Returns:
        The files, in the order of the records.
    """
    paths = []
    for record in records:
        path = folder / str(record["model"]) / f"{record['task']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(record, indent=1) + "\n").encode())
        paths.append(path)
    return paths


def journal_results(model: Backbone | LoadedTokenizer, records: Sequence[Mapping[str, Any]]) -> None:
    """Adds `eval/<task>/<metric>` (`eval_ema/...`, `eval_untrained/...`) to the journal of the model's run.

    The points carry the checkpoint's own step and time, so that evaluating the same weights again changes nothing.
    """
    if model.run_dir is None or not (model.run_dir / JOURNAL_NAME).is_file() or not records:
        return
    prefix = {"trained": "eval", "ema": "eval_ema", "untrained": "eval_untrained"}[model.weights]
    metrics = {
        f"{prefix}/{record['task']}/{name}": value for record in records for name, value in record["metrics"].items()
    }
    assert model.complete is not None
    writer = JournalWriter(model.run_dir / JOURNAL_NAME)
    try:
        writer.append("metrics", {"step": model.step, "metrics": metrics}, time_ms=int(model.complete["time_ms"]))
    finally:
        writer.close()
