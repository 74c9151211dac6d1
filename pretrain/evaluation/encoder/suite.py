"""A suite of evaluations from one YAML: features are extracted once and shared by all tasks.

In: backbones and a `SuiteConfig`. Out: one result record per model and task, as a JSON file under the run and as
metrics in its journal. A record says which protocol with which settings on how many samples gave which figures, how
every choice in it was made, and which weights (by digest) it is about.

Legend: n samples.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import MISSING

from pretrain.config import load_typed, nearest
from pretrain.evaluation.encoder.datasets import EvaluationData, open_evaluation_data
from pretrain.evaluation.encoder.features import Precision
from pretrain.evaluation.encoder.protocols import PROTOCOLS, num_blocks
from pretrain.evaluation.encoder.subject import Loading, Report, Subject
from pretrain.evaluation.encoder.views import Frames, Look, VideoConfig, Views
from pretrain.evaluation.outcome import Outcome
from pretrain.evaluation.settings import typed_settings
from pretrain.weights.backbone import Backbone


@dataclass(frozen=True)
class TaskConfig:
    """One task of a suite."""

    protocol: str = MISSING
    """a key of PROTOCOLS"""
    settings: dict[str, Any] = field(default_factory=dict)
    """fields of that protocol's config; the others keep their defaults"""
    frames: Frames = "all"
    """for encoders of clips: `single` shows one frame in place of all, the baseline that knows nothing of motion"""
    views: Views | None = None
    """for encoders of clips: of a test video; null = the suite's `video.views`"""

    def looks(self, video: VideoConfig) -> Look:
        """What the task sees of a video; tasks that see the same share features."""
        return Look(self.frames, self.views or video.views)


@dataclass(frozen=True)
class SuiteConfig:
    """What is evaluated on which images or videos."""

    train: str | None = None
    """folder of the labelled training set; null = the run's `data.train`"""
    test: str | None = None
    """folder of the labelled test set; null = the run's `data.val`"""
    batch_size: int = 256
    """images, or views of videos, per process and forward pass"""
    workers: int = 0
    """decoding processes per process; 0 decodes in the process itself"""
    precision: Precision = "fp32"
    """of the backbone's forward pass"""
    feature_dtype: Literal["float32", "float16"] = "float32"
    """storage of the features in CPU memory"""
    resize_ratio: float | None = None
    """short side of the resized image / side of the centre crop; null = 256/224, and 1 for inputs up to 64 pixels.
    Images that already have the input's size stay as they are"""
    video: VideoConfig = field(default_factory=VideoConfig)
    """for encoders of clips: how many views, and of what"""
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
            self.task_settings(name)

    def task_settings(self, name: str) -> Any:
        """The typed settings of a task."""
        task = self.tasks[name]
        return typed_settings(PROTOCOLS[task.protocol].config, task.settings, f"tasks.{name}.settings")


def load_suite(path: Path, overrides: Sequence[str] = ()) -> SuiteConfig:
    """Reads a suite's YAML and applies `key.path=value` overrides.

    Raises:
        ValueError: no such file, an unknown key or protocol, or a value of another type.
    """
    return load_typed(SuiteConfig, path, overrides)


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
    for name, task in suite.tasks.items():
        if task.views is not None and backbone.sampling is None:
            raise ValueError(f"tasks.{name}.views is for encoders of clips; this one takes images: leave it out")
    settings = {name: suite.task_settings(name) for name in suite.tasks}
    blocks = num_blocks(settings.values())
    loading = Loading(suite.batch_size, suite.workers, getattr(torch, suite.feature_dtype), blocks)
    say = report or (lambda what, done, total: None)
    looks = {name: task.looks(suite.video) for name, task in suite.tasks.items()}
    subjects = {
        look: Subject(backbone, _open_data(backbone, suite, look), look.frames, accelerator, loading, say)
        for look in dict.fromkeys(looks.values())
    }
    for name, task in suite.tasks.items():  # what cannot work is said before anything is computed
        PROTOCOLS[task.protocol].check(subjects[looks[name]], settings[name], f"tasks.{name}.settings")
    records = []
    for index, (name, task) in enumerate(suite.tasks.items()):
        subject, protocol = subjects[looks[name]], PROTOCOLS[task.protocol]
        if protocol.on_features:
            subject.features()
        subject.say(name, index, len(suite.tasks))
        started_s = time.perf_counter()
        outcome = protocol.run(subject, settings[name])
        if outcome is None:  # not the main process: it fits no heads and writes nothing
            continue
        features_s = subject.features_s if protocol.on_features else 0.0
        seconds = {"features": round(features_s, 2), "protocol": round(time.perf_counter() - started_s, 2)}
        records.append(_record(subject, suite, name, settings[name], outcome, seconds))
    say(f"{backbone.label}: done", len(suite.tasks), len(suite.tasks))
    return records


def _open_data(backbone: Backbone, suite: SuiteConfig, look: Look) -> EvaluationData:
    """The data as some of the tasks see them."""
    video = dataclasses.replace(suite.video, views=look.views)
    return open_evaluation_data(
        backbone, train=suite.train, test=suite.test, resize_ratio=suite.resize_ratio, video=video
    )


def _record(
    subject: Subject, suite: SuiteConfig, name: str, settings: Any, outcome: Outcome, seconds: Mapping[str, float]
) -> dict[str, Any]:
    """One result, with everything that the figure depends on."""
    backbone, data = subject.backbone, subject.data
    frames = {} if backbone.sampling is None else {"frames": subject.frames}
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
            **data.view,
            **frames,
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
