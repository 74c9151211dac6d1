"""A suite of evaluations from one YAML: features are extracted once and shared by all tasks.

In: backbones and a `SuiteConfig`. Out: one result record per model and task, as a JSON file under the run and as
metrics in its journal. A record says which protocol with which settings on how many samples gave which figures, how
every choice in it was made, and which weights (by digest) it is about.

Legend: n samples.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_pipes.files import write_atomically
from pretrain.config import load_typed, nearest
from pretrain.evaluation.backbone import Backbone
from pretrain.evaluation.datasets import EvaluationData, open_evaluation_data
from pretrain.evaluation.features import Features, Precision, extract
from pretrain.evaluation.knn import KNNConfig, evaluate_knn
from pretrain.evaluation.linear import LinearConfig, evaluate_linear
from pretrain.evaluation.outcome import Outcome
from pretrain.journal import JOURNAL_NAME, JournalWriter
from pretrain.models.normalise import Normalise

T = TypeVar("T")
Report = Callable[[str, int, int], None]  # (what is being done, done, in all)


class Run(Protocol):
    """How a protocol is called."""

    def __call__(
        self, train: Features, test: Features, config: Any, *, num_classes: int, device: torch.device
    ) -> Outcome: ...


PROTOCOLS: dict[str, tuple[type[Any], Run]] = {
    "knn_dino": (KNNConfig, evaluate_knn),
    "linear_dinov2_cached": (LinearConfig, evaluate_linear),
}
"""Name in `tasks.<task>.protocol` -> (dataclass of its settings, function)."""


@dataclass(frozen=True)
class TaskConfig:
    """One task of a suite."""

    protocol: str = MISSING
    """a key of PROTOCOLS"""
    settings: dict[str, Any] = field(default_factory=dict)
    """fields of that protocol's config; the others keep their defaults"""


@dataclass(frozen=True)
class SuiteConfig:
    """What is evaluated on which images."""

    train: str | None = None
    """folder of the labelled training set; null = the run's `data.train`"""
    test: str | None = None
    """folder of the labelled test set; null = the run's `data.val`"""
    batch_size: int = 256
    """images per process and forward pass"""
    workers: int = 0
    """decoding processes per process; 0 decodes in the process itself"""
    precision: Precision = "fp32"
    """of the backbone's forward pass"""
    feature_dtype: Literal["float32", "float16"] = "float32"
    """storage of the features in CPU memory"""
    resize_ratio: float | None = None
    """short side of the resized image / side of the centre crop; null = 256/224, and 1 for inputs up to 64 pixels.
    Images that already have the input's size stay as they are"""
    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    """name -> task"""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("the suite has no tasks: add for example tasks.knn.protocol: knn_dino")
        if self.batch_size < 1 or self.workers < 0 or (self.resize_ratio or 1.0) < 1.0:
            raise ValueError(
                f"batch_size={self.batch_size}, workers={self.workers}, resize_ratio={self.resize_ratio}: expected at "
                "least 1, 0 and 1"
            )
        for name, task in self.tasks.items():
            if task.protocol not in PROTOCOLS:
                raise ValueError(
                    f"tasks.{name}.protocol is {task.protocol!r}; known protocols: {', '.join(PROTOCOLS)}"
                    + nearest(task.protocol, list(PROTOCOLS))
                )
            typed_settings(PROTOCOLS[task.protocol][0], task.settings, f"tasks.{name}.settings")

    def task_settings(self, name: str) -> Any:
        """The typed settings of a task."""
        task = self.tasks[name]
        return typed_settings(PROTOCOLS[task.protocol][0], task.settings, f"tasks.{name}.settings")


def load_suite(path: Path, overrides: Sequence[str] = ()) -> SuiteConfig:
    """Reads a suite's YAML and applies `key.path=value` overrides.

    Raises:
        ValueError: no such file, an unknown key or protocol, or a value of another type.
    """
    return load_typed(SuiteConfig, path, overrides)


def typed_settings(schema: type[T], settings: Mapping[str, Any], where: str) -> T:
    """`settings` as an instance of the dataclass `schema`.

    Raises:
        ValueError: an unknown key (the message has the nearest known one) or a value of another type.
    """
    known = [entry.name for entry in dataclasses.fields(schema)]  # type: ignore[arg-type]
    for key in settings:
        if key not in known:
            raise ValueError(f"unknown key {where}.{key}{nearest(str(key), known)}; known keys: {', '.join(known)}")
    try:
        typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), dict(settings)))
    except OmegaConfBaseException as error:
        raise ValueError(f"{where}: {str(error).splitlines()[0]}") from error
    assert isinstance(typed, schema)
    return typed


def evaluate_backbone(
    backbone: Backbone, suite: SuiteConfig, accelerator: Any, *, report: Report | None = None
) -> list[dict[str, Any]]:
    """Every task of the suite for one backbone: result records on the main process, an empty list on the others.

    Args:
        backbone: on the CPU; it is moved to the accelerator's device.
        suite: what to evaluate.
        accelerator: of `features.make_accelerator`; all its processes call this.
        report: called now and then with (what is being done, done, in all).

    Raises:
        ValueError: datasets that are missing, unlabelled, or labelled with other classes; settings that do not apply.
    """
    data = open_evaluation_data(backbone, train=suite.train, test=suite.test, resize_ratio=suite.resize_ratio)
    settings = {name: suite.task_settings(name) for name in suite.tasks}
    num_blocks = max([1, *(max(s.blocks) for s in settings.values() if isinstance(s, LinearConfig))])
    depth = backbone.model.config.depth
    if num_blocks > depth:
        raise ValueError(
            f"a linear probe joins the last {num_blocks} blocks, the backbone has {depth}: set "
            f"tasks.<task>.settings.blocks to numbers up to {depth}"
        )
    say = report or (lambda what, done, total: None)
    started_s = time.perf_counter()
    sides: list[Features | None] = []
    for name, dataset in (("train", data.train), ("test", data.test)):
        sides.append(
            extract(
                backbone.model,
                dataset,
                accelerator,
                normalise=Normalise(backbone.mean, backbone.std),
                num_blocks=num_blocks,
                batch_size=suite.batch_size,
                workers=suite.workers,
                dtype=getattr(torch, suite.feature_dtype),
                progress=lambda done, total, name=name: say(f"{backbone.label}: {name} features", done, total),  # type: ignore[misc]
            )
        )
    extraction_s = time.perf_counter() - started_s
    train, test = sides
    if train is None or test is None:  # not the main process: it fits no heads and writes nothing
        return []
    records = []
    for index, (name, task) in enumerate(suite.tasks.items()):
        say(f"{backbone.label}: {name}", index, len(suite.tasks))
        started_s = time.perf_counter()
        outcome = PROTOCOLS[task.protocol][1](
            train, test, settings[name], num_classes=data.num_classes, device=accelerator.device
        )
        seconds = {"features": round(extraction_s, 2), "protocol": round(time.perf_counter() - started_s, 2)}
        records.append(_record(backbone, suite, data, name, settings[name], outcome, seconds))
    say(f"{backbone.label}: done", len(suite.tasks), len(suite.tasks))
    return records


def _record(
    backbone: Backbone,
    suite: SuiteConfig,
    data: EvaluationData,
    name: str,
    settings: Any,
    outcome: Outcome,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """One result, with everything that the figure depends on."""
    return {
        "protocol": suite.tasks[name].protocol,
        "task": name,
        "model": backbone.label,
        "model_digest": backbone.digest,
        "step": backbone.step,
        "weights": backbone.weights,
        "run_uid": (backbone.complete or {}).get("run_uid"),
        "num_train": outcome.num_train,
        "num_test": outcome.num_test,
        "num_classes": data.num_classes,
        "train_fingerprint": data.train_fingerprint,
        "test_fingerprint": data.test_fingerprint,
        "view": {
            "image_size": list(backbone.model.config.image_size),
            "resize_ratio": data.resize_ratio,
            "mean": list(backbone.mean),
            "std": list(backbone.std),
            "precision": suite.precision,
            "feature_dtype": suite.feature_dtype,
        },
        "settings": dataclasses.asdict(settings),
        "selection": outcome.selection,
        "metrics": outcome.metrics,
        "seconds": dict(seconds),
        "time_ms": time.time_ns() // 1_000_000,
    }


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
