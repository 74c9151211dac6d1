"""`tessera report`: a run's folder as one self-contained HTML page.

In: whatever a run has written so far: run.json, config.yaml, journal.jsonl, mlflow.json, pictures/, films/,
eval/**/*.json; every one of them may be missing, since crashed and running runs need a report most. Out:
`report.html` without a single reference to anything outside: styles, curves (inline SVG) and pictures are in the
page. Text from files is escaped by the template.
"""

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipes.store.files import write_atomically
from pretrain.report.curves import format_value
from pretrain.report.panels import Curves, evaluation_charts, other_charts, panel_charts
from pretrain.report.rows import evaluation_rows, event_rows, film_rows, picture_rows, read_json
from pretrain.tracking.environment import redact_argument, redact_url
from pretrain.tracking.journal import JOURNAL_NAME, now_ms, read_journal, read_metrics
from pretrain.tracking.mlflow_shipper import STATE_NAME

TEMPLATE = "report.html"
"""Of jinja2, in this folder."""
STALE_AFTER_S = 600
"""A run that says RUNNING but has been silent for longer has probably died."""


def build_report(run_dir: Path, out: Path | None = None) -> Path:
    """Writes the page of a run.

    Args:
        run_dir: folder of the run.
        out: file of the page; None: report.html in the run's folder.

    Returns:
        The file of the page.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: nothing in the folder is a run's.
    """
    import jinja2

    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise FileNotFoundError(f"no folder {run_dir}; give the folder of a run, <output_dir>/<name>")
    if not any((run_dir / name).exists() for name in (JOURNAL_NAME, "config.yaml", "run.json")):
        raise ValueError(f"{run_dir} is not a run's folder: expected journal.jsonl, config.yaml or run.json in it")
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = templates.get_template(TEMPLATE).render(collect(run_dir))
    out = run_dir / "report.html" if out is None else Path(out)
    write_atomically(out, page.encode("utf-8", errors="replace"))
    return out


def collect(run_dir: Path) -> dict[str, Any]:
    """Everything that the template shows."""
    run = read_json(run_dir / "run.json")
    records, curves = list(read_journal(run_dir)), read_metrics(run_dir)
    config_text = _read_text(run_dir / "config.yaml")
    marks = sorted({int(record["step"]) for record in records if record["type"] == "resume" and record["step"] > 0})
    events, num_older_events = event_rows(records)
    return {
        "name": run.get("name") or run_dir.resolve().name,
        "status": run_status(records),
        "written": _utc(now_ms()),
        "facts": _facts(run, records, marks),
        "tiles": _tiles(records, curves, _parse_config(config_text)),
        "panels": panel_charts(curves, marks),
        "other_panels": other_charts(curves, marks),
        "pictures": picture_rows(run_dir),
        "films": film_rows(run_dir),
        "evaluations": evaluation_rows(run_dir),
        "evaluation_curves": evaluation_charts(curves),
        "events": [(_utc(event.time_ms), event.title, event.details) for event in events],
        "num_older_events": num_older_events,
        "config": redact_url(config_text),
        "commands": _commands(run, run_dir),
        "environment": json.dumps(_redacted(run.get("environment", {})), indent=2) if run.get("environment") else "",
        "tracking": _tracking(run_dir, records),
    }


def run_status(records: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The last status in the journal as "word", and what may be wrong with it as "note"."""
    word = next((record["status"] for record in reversed(records) if record["type"] == "status"), "EMPTY")
    if word != "RUNNING":
        return {"word": word, "note": "" if records else "the journal has no records"}
    silent_s = (now_ms() - records[-1]["time_ms"]) / 1e3
    if silent_s > STALE_AFTER_S:
        return {"word": "INTERRUPTED?", "note": f"says RUNNING, but its last record is {_duration(silent_s)} old"}
    return {"word": word, "note": f"last record {_duration(silent_s)} ago"}


def _facts(run: dict[str, Any], records: Sequence[dict[str, Any]], marks: Sequence[int]) -> list[tuple[str, str]]:
    """When, where and with what the run went, as (label, text); what is not known is left out."""
    environment = run.get("environment") or {}
    git, torch_build, cpu = environment.get("git") or {}, environment.get("torch") or {}, environment.get("cpu") or {}
    gpus = environment.get("gpus") or []
    facts = []
    if records:
        facts.append(("Started", _utc(records[0]["time_ms"])))
    if marks:
        facts.append(("Resumed at step", ", ".join(f"{step:,}" for step in marks)))
    if run.get("world_size"):
        facts.append(("Ranks", str(run["world_size"])))
    if gpus:
        facts.append(("GPUs on the main node", ", ".join(f"{gpus.count(name)} x {name}" for name in sorted(set(gpus)))))
    if cpu:
        facts.append(("CPU", f"{cpu.get('model', '?')}, {cpu.get('count', '?')} usable"))
    if git:
        facts.append(
            ("Code", f"{git.get('revision', '?')[:12]}{' with uncommitted changes' if git.get('dirty') else ''}")
        )
    if torch_build:
        cuda = f", CUDA {torch_build['cuda']}" if torch_build.get("cuda") and gpus else ""
        facts.append(
            ("Software", f"Python {environment.get('python', '?')}, torch {torch_build.get('version', '?')}{cuda}")
        )
    return facts


def _tiles(records: Sequence[dict[str, Any]], curves: Curves, config: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The page's large figures, as (label, value, note)."""
    tiles = []
    trained = [points[-1].step for name, points in curves.items() if name.startswith("train/")]
    if trained:
        train = config.get("train") or {}
        global_batch, step = train.get("global_batch"), max(trained)
        tiles.append(("Optimizer steps", f"{step:,}", f"of {train['steps']:,}" if train.get("steps") else ""))
        if isinstance(global_batch, int):
            epoch = curves.get("train/epoch")
            note = f"{epoch[-1].value:.4g} epochs" if epoch else f"{global_batch:,} per step"
            tiles.append(("Samples seen", format_value(step * global_batch), note))
    if records:
        tiles.append(
            ("Time", _duration((records[-1]["time_ms"] - records[0]["time_ms"]) / 1e3), "first to last record")
        )
    for label, name in (("Training loss", "train/loss"), ("Validation loss", "val/loss")):
        if name in curves:
            best = min(curves[name], key=lambda point: point.value if point.value == point.value else float("inf"))
            note = f"lowest {format_value(best.value)} at step {best.step:,}"
            tiles.append((label, format_value(curves[name][-1].value), note))
    for label, name, factor, note in (
        ("Throughput", "throughput/samples_per_s", 1, "samples/s, median"),
        ("Waiting for data", "data/wait_fraction", 100, "% of the time, median"),
        ("MFU", "throughput/mfu", 100, "%, median"),
    ):
        if name in curves:
            median = statistics.median(point.value for point in curves[name])
            tiles.append(
                (label, f"{factor * median:,.3g}" if median * factor < 1000 else f"{factor * median:,.0f}", note)
            )
    return tiles


def _commands(run: dict[str, Any], run_dir: Path) -> list[tuple[str, str]]:
    """What a reader may want to start, as (label, command line without secrets)."""
    started = run.get("command")
    commands = [
        ("Resume this run", run.get("resume_command") or f"tessera train {run_dir / 'config.yaml'}"),
        ("Reproduce it from the beginning", run.get("reproduce_command")),
        ("It was started by", " ".join(map(str, started)) if isinstance(started, list) else None),
        ("Send what MLflow lacks", f"tessera sync {run_dir}"),
    ]
    return [(label, " ".join(map(redact_argument, str(line).split(" ")))) for label, line in commands if line]


def _tracking(run_dir: Path, records: Sequence[dict[str, Any]]) -> list[str]:
    """Says what is in MLflow, and what is not and why."""
    state, lines = read_json(run_dir / STATE_NAME), []
    if state.get("mlflow_run_id"):
        size_bytes = (run_dir / JOURNAL_NAME).stat().st_size if (run_dir / JOURNAL_NAME).exists() else 0
        left = size_bytes - int(state.get("offset", 0))
        rest = "everything was sent" if left <= 0 else f"{left:,} bytes of the journal are not sent yet"
        lines.append(f"MLflow run {state['mlflow_run_id']} at {redact_url(str(state.get('tracking_uri')))}: {rest}.")
    left_out = [record for record in records if record["type"] in ("rejected", "artifact_skipped")]
    return lines + [
        f"{record.get('name') or record.get('path')} is not in MLflow: {record.get('reason')}"
        for record in left_out[:20]
    ]


def _read_text(path: Path) -> str:
    """A file's text; empty where there is none."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _parse_config(text: str) -> dict[str, Any]:
    """The config as plain containers; empty when it is none, which must not cost the reader the rest of the page."""
    from omegaconf import OmegaConf

    try:
        content = OmegaConf.to_container(OmegaConf.create(text)) if text else {}
    except Exception:
        return {}
    return {str(key): value for key, value in content.items()} if isinstance(content, dict) else {}


def _redacted(value: Any) -> Any:
    """The same containers without secrets in their texts."""
    if isinstance(value, dict):
        return {key: _redacted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_redacted(item) for item in value]
    return redact_argument(value) if isinstance(value, str) else value


def _utc(time_ms: int) -> str:
    """A point in time for people, to the minute."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(time_ms / 1e3))


def _duration(seconds: float) -> str:
    """A duration for people: 12 s, 3 min 20 s, 5 h 12 min, 2 d 3 h."""
    seconds = max(0.0, seconds)
    for size, unit, smaller, smaller_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} {int(seconds % size // smaller)} {smaller_unit}"
    return f"{seconds:.0f} s"
