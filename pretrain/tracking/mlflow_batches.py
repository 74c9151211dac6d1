"""Journal lines as what MLflow takes: batches within its limits, names that it accepts.

In: the journal from an offset on. Out: a `Batch` of metrics, params, tags, artifacts and the last status, and the
offset after it.

Names: `@` becomes `_at_`, other characters that MLflow refuses become `_`. Values are cut to MLflow's limits. MLflow
stores NaN as NaN, and infinity as 1.8e308. A `resume` record becomes the tag `tessera.resumed_at_step`.
"""

import logging
import posixpath
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.tracking.journal import read_lines

# MLflow's limits (mlflow.utils.validation): metrics, params and tags per call; length of names and values.
METRICS_PER_CALL, ENTITIES_PER_CALL = 1000, 100
NAME_LENGTH, PARAM_LENGTH, TAG_LENGTH = 250, 6000, 5000

logger = logging.getLogger(__name__)


@dataclass
class Batch:
    """The content of consecutive journal lines, and the offset in bytes just after the last of them."""

    end: int
    num_records: int = 0
    metrics: list[tuple[str, float, int, int]] = field(default_factory=list)  # name, value, time_ms, step
    params: list[tuple[str, str]] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    artifacts: list[list[str]] = field(default_factory=list)  # [path, artifact_dir]
    status: tuple[str, int] | None = None  # the last one, time_ms

    @property
    def is_full(self) -> bool:
        return (
            len(self.metrics) >= METRICS_PER_CALL
            or len(self.params) + len(self.tags) >= 1000
            or len(self.artifacts) >= 8
        )

    def add(self, record: dict[str, Any]) -> None:
        match record["type"]:
            case "metrics":
                time_ms, step = int(record["time_ms"]), int(record["step"])
                self.metrics += [
                    (legal_name(name), float(value), time_ms, step) for name, value in record["metrics"].items()
                ]
            case "params":
                self.params += [(legal_name(name), value[:PARAM_LENGTH]) for name, value in record["params"].items()]
            case "tags":
                self.tags |= {legal_name(name): value[:TAG_LENGTH] for name, value in record["tags"].items()}
            case "resume":
                self.tags["tessera.resumed_at_step"] = str(record["step"])
            case "artifact":
                self.artifacts.append([record["path"], record["artifact_dir"]])
            case "status":
                self.status = (record["status"], int(record["time_ms"]))


def read_batch(journal: Path, offset: int) -> Batch:
    """Complete lines from `offset` on, up to about one call's worth. Lines that cannot be read are stepped over."""
    batch = Batch(end=offset)
    for record, end in read_lines(journal, offset):
        if record is not None:
            try:
                batch.add(record)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                logger.warning("%s: left out a line before byte %d that is no record: %r", journal, end, error)
        batch.end = end
        batch.num_records += 1
        if batch.is_full:
            break
    return batch


def legal_name(name: str) -> str:
    """A name that MLflow accepts for metrics, params and tags."""
    name = re.sub(r"[^\w\-./: ]", "_", name.replace("@", "_at_"))[:NAME_LENGTH]
    # MLflow also refuses what is no plain relative path, and every name that begins with two dots.
    return posixpath.normpath(name).lstrip("./") or "unnamed"
