"""A suite of evaluations from one YAML: features are extracted once and shared by all tasks.

In: backbones and a `SuiteConfig`. Out: one result record per model and task, as a JSON file under the run and as
metrics in its journal. A record says which protocol with which settings on how many samples gave which figures, how
every choice in it was made, and which weights (by digest) it is about.

Legend: n samples.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from omegaconf import MISSING

from data_pipes.bounds import bounded
from pretrain.evaluation.encoder.datasets import EvaluationData, open_evaluation_data
from pretrain.evaluation.encoder.features import Precision
from pretrain.evaluation.encoder.protocols import PROTOCOLS, Protocol, num_blocks
from pretrain.evaluation.encoder.subject import Loading, Report, Subject
from pretrain.evaluation.encoder.views import Frames, TaskView, VideoConfig, Views
from pretrain.evaluation.outcome import Outcome
from pretrain.evaluation.results import make_record
from pretrain.evaluation.settings import named_protocol, typed_settings
from pretrain.weights.backbone import Backbone


@dataclass(frozen=True)
class TaskConfig:
    """One task of a suite."""

    protocol: str = MISSING
    """a key of PROTOCOLS, an entry point of `tessera.protocols`, or an import path"""
    settings: dict[str, Any] = field(default_factory=dict)
    """fields of that protocol's config; the others keep their defaults"""
    frames: Frames = "all"
    """for encoders of clips: `single` shows one frame in place of all, the baseline that knows nothing of motion"""
    views: Views | None = None
    """for encoders of clips: of a test video; null = the suite's `video.views`"""

    def view(self, video: VideoConfig) -> TaskView:
        """What the task sees of a test video; tasks that see the same share features.

        Args:
            video: the suite's.
        """
        return TaskView(self.frames, self.views or video.views)


@dataclass(frozen=True)
class SuiteConfig:
    """What is evaluated on which images or videos."""

    train: str | None = None
    """folder of the labelled training set; null = the run's `data.train`"""
    test: str | None = None
    """folder of the labelled test set; null = the run's `data.val`"""
    batch_size: int = bounded(256, least=1)
    """images, or views of videos, per process and forward pass"""
    workers: int = bounded(0, least=0)
    """decoding processes per process; 0 decodes in the process itself"""
    precision: Precision = "fp32"
    """of the backbone's forward pass"""
    feature_dtype: Literal["float32", "float16"] = "float32"
    """storage of the features in CPU memory"""
    resize_ratio: float | None = bounded(None, least=1)
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
        for name in self.tasks:
            self.task_settings(name)

    def task_settings(self, name: str) -> Any:
        """The settings of a task, as an instance of its protocol's dataclass.

        Raises:
            ValueError: as `settings.named_protocol` and `settings.typed_settings`.
        """
        return typed_settings(self.protocol(name).config, self.tasks[name].settings, f"tasks.{name}.settings")

    def protocol(self, name: str) -> Protocol:
        """The protocol of a task.

        Raises:
            ValueError: as `settings.named_protocol`.
        """
        return named_protocol(name, self.tasks[name].protocol, PROTOCOLS, Protocol)


def evaluate_backbone(
    backbone: Backbone, suite: SuiteConfig, accelerator: Any, *, report: Report | None = None
) -> list[dict[str, Any]]:
    """Evaluates one backbone on every task of the suite.

    Args:
        backbone: on the CPU; it is moved to the accelerator's device.
        suite: what to evaluate.
        accelerator: of `features.make_accelerator`; all its processes call this.
        report: called now and then, see `Report`.

    Returns:
        One record per task, of `results.make_record`, on the main process; an empty list on the others.

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
    views = {name: task.view(suite.video) for name, task in suite.tasks.items()}
    subjects = {
        view: Subject(backbone, _open_data(backbone, suite, view), view.frames, accelerator, loading, say)
        for view in dict.fromkeys(views.values())
    }
    for name in suite.tasks:  # what cannot work is said before anything is computed
        suite.protocol(name).check(subjects[views[name]], settings[name], f"tasks.{name}.settings")
    records = []
    for index, name in enumerate(suite.tasks):
        subject, protocol = subjects[views[name]], suite.protocol(name)
        if protocol.on_features:
            subject.features()
        subject.say(name, index, len(suite.tasks))
        started_s = time.perf_counter()
        outcome = protocol.run(subject, settings[name])
        if outcome is None:  # not the main process: it fits no heads and writes nothing
            continue
        features_s = subject.features_s if protocol.on_features else 0.0
        seconds = {"features": features_s, "protocol": time.perf_counter() - started_s}
        records.append(_record(subject, suite, name, outcome, seconds))
    say(f"{backbone.label}: done", len(suite.tasks), len(suite.tasks))
    return records


def _open_data(backbone: Backbone, suite: SuiteConfig, view: TaskView) -> EvaluationData:
    """The suite's data as the tasks with this view see them."""
    video = dataclasses.replace(suite.video, views=view.views)
    return open_evaluation_data(
        backbone, train=suite.train, test=suite.test, resize_ratio=suite.resize_ratio, video=video
    )


def _record(
    subject: Subject, suite: SuiteConfig, name: str, outcome: Outcome, seconds: Mapping[str, float]
) -> dict[str, Any]:
    """The result of one task."""
    data = subject.data
    frames = {} if subject.backbone.sampling is None else {"frames": subject.frames}
    return make_record(
        subject.backbone,
        name,
        suite.tasks[name].protocol,
        suite.task_settings(name),
        outcome,
        data={
            "num_classes": data.num_classes,
            "train_fingerprint": data.train_fingerprint,
            "test_fingerprint": data.test_fingerprint,
        },
        view={**data.view, **frames},
        precision={"precision": suite.precision, "feature_dtype": suite.feature_dtype},
        seconds=seconds,
    )
