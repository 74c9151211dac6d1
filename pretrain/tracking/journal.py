"""The journal: what a run measured, as append-only lines of JSON in `RUN/journal.jsonl`.

In: records (metrics, params, tags, artifacts, status, resumes). Out: one line per record, in the file before `append`
returns. It is the truth about a run: MLflow and the report are copies that can be rebuilt from it, so no server is
ever on the path of a training step.

A record is `{"time_ms": int, "type": str, ...}`:

| type | further fields |
|---|---|
| run | run_uid, run_name, experiment, tracking_uri (without a password; null: mlflow.db beside the run) |
| metrics | step, metrics {name: number, or "NaN" / "Infinity" / "-Infinity"} |
| params, tags | params / tags {name: string} |
| artifact | path (relative to the run's folder when inside it), artifact_dir |
| status | status: RUNNING, FINISHED, FAILED or KILLED |
| resume | step: the checkpoint that training went on from; later steps written before this line are superseded |
| event | name, and what else belongs to it: a skipped step, a rollback, a checkpoint that was not saved |
| artifact_skipped, rejected | what the shipper could not deliver for good, and why |
"""

import json
import logging
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

JOURNAL_NAME = "journal.jsonl"

logger = logging.getLogger(__name__)


class MetricPoint(NamedTuple):
    """One value of one metric: optimizer step, wall-clock time in ms since 1970, value (may be NaN or infinite)."""

    step: int
    time_ms: int
    value: float


class JournalWriter:
    """Appends records to one journal file, from any number of threads, and processes on a local file system.

    Each record is one `write` on an O_APPEND descriptor: after it returns the line survives the death of the process,
    though not the loss of power (for that, `flush_to_disk`). Where a killed writer left half a line, the next writer
    starts on a fresh one.

    A write that fails (full disk, quota) does not raise into training: the lines stay in memory, one warning is
    logged and the next `append` tries again. `flush_to_disk` and `close` do raise the OSError, so that a checkpoint
    never claims more than the disk holds.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        # Re-entrant: a signal handler that logs while the main thread is inside `append` must not deadlock.
        self._lock = threading.RLock()
        self._unwritten = b""
        self._warned = False
        self._descriptor: int | None = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        size_bytes = os.fstat(self._descriptor).st_size
        if size_bytes and os.pread(self._descriptor, 1, size_bytes - 1) != b"\n":
            self._unwritten = b"\n"

    def append(self, record_type: str, fields: Mapping[str, object], time_ms: int | None = None) -> None:
        """Write one record.

        Args:
            record_type: see the table above.
            fields: of the record, JSON-able.
            time_ms: Unix time; None is the clock's now.

        Raises:
            ValueError: the journal was closed.
        """
        record = {"time_ms": now_ms() if time_ms is None else time_ms, "type": record_type, **fields}
        line = encode_record(record)
        with self._lock:
            self._unwritten += line
            try:
                self._write_out()
            except OSError as error:
                if not self._warned:
                    logger.warning(
                        "cannot write %s (%s); its lines wait in memory until it can be written", self.path, error
                    )
                self._warned = True

    def flush_to_disk(self) -> None:
        """Wait until every record so far is on the disk (fsync).

        Raises:
            OSError: the disk refuses.
        """
        with self._lock:
            self._write_out()
            os.fsync(self._open_descriptor())

    def close(self) -> None:
        """Write what waits in memory and close the file; closing twice is allowed.

        Raises:
            OSError: the disk refuses.
        """
        with self._lock:
            if self._descriptor is None:
                return
            try:
                self._write_out()
            finally:
                os.close(self._descriptor)
                self._descriptor = None

    def _write_out(self) -> None:
        while self._unwritten:
            try:
                num_written = os.write(self._open_descriptor(), self._unwritten)
            except OSError as error:  # a full disk does not say which file
                raise OSError(error.errno, error.strerror, str(self.path)) from error
            self._unwritten = self._unwritten[num_written:]

    def _open_descriptor(self) -> int:
        if self._descriptor is None:
            raise ValueError(f"the journal {self.path} was closed; log before the tracker is finished")
        return self._descriptor


def now_ms() -> int:
    """The wall clock, in milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def encode_record(record: Mapping[str, object]) -> bytes:
    """One line of strict JSON, ending in a newline; non-finite floats become the strings that `float()` reads back."""
    try:
        text = json.dumps(record, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    except ValueError:
        text = json.dumps(_name_non_finite(record), allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", errors="replace") + b"\n"


def _name_non_finite(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: _name_non_finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_name_non_finite(item) for item in value]
    return value


def read_lines(path: Path, offset: int = 0) -> Iterator[tuple[dict[str, Any] | None, int]]:
    """Yield (record, offset in bytes just after its line) from `offset` on; None for a complete line that is no record.

    A last line without its newline was torn by a kill, or is being written: it is not yielded. An absent file yields
    nothing.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield _decode_line(line), offset


def _decode_line(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:  # also covers lines that are not UTF-8
        return None
    return record if isinstance(record, dict) and isinstance(record.get("type"), str) else None


def read_journal(run_dir: Path) -> Iterator[dict[str, Any]]:
    """Every readable record of a run, in the order of writing.

    Unreadable lines (torn by a kill or a crash) are left out.
    """
    for record, _ in read_lines(Path(run_dir) / JOURNAL_NAME):
        if record is not None:
            yield record


def read_metrics(run_dir: Path) -> dict[str, list[MetricPoint]]:
    """The curves of a run: per metric its points in the order of their steps, at most one per step.

    A `resume` record supersedes every point of a later step that was written before it (the steps between the last
    checkpoint and the crash, which were then trained again), and of two points of one step the later line counts.
    """
    curves: dict[str, dict[int, MetricPoint]] = {}
    for record in read_journal(run_dir):
        if record["type"] == "resume":
            last_valid = int(record["step"])
            curves = {name: {s: p for s, p in points.items() if s <= last_valid} for name, points in curves.items()}
        elif record["type"] == "metrics":
            step, time_ms = int(record["step"]), int(record["time_ms"])
            for name, value in record["metrics"].items():
                curves.setdefault(name, {})[step] = MetricPoint(step, time_ms, float(value))
    return {name: [points[step] for step in sorted(points)] for name, points in curves.items() if points}
