"""What a protocol is given: a backbone, the labelled data it is evaluated on, and where it runs.

In: a backbone, opened data, an accelerator. Out: features, extracted once for all protocols that ask for them, and the
parts themselves for those that train through the backbone or on its tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pretrain.evaluation.encoder.datasets import EvaluationData
from pretrain.evaluation.encoder.features import Features, extract
from pretrain.evaluation.encoder.views import Frames, Prepare, make_prepare
from pretrain.weights.backbone import Backbone

Report = Callable[[str, int, int], None]  # (what is being done, done, in all)


@dataclass(frozen=True)
class Loading:
    """How samples and features travel."""

    batch_size: int
    """images, or views of videos, per process and forward pass"""
    workers: int
    """decoding processes per process; 0 decodes in the process itself"""
    feature_dtype: torch.dtype
    """storage of the features in CPU memory"""
    num_blocks: int
    """how many last blocks' class tokens are kept"""


class Subject:
    """One backbone on one pair of data sets, seen through all frames of a clip or a single one."""

    def __init__(
        self,
        backbone: Backbone,
        data: EvaluationData,
        frames: Frames,
        accelerator: Any,
        loading: Loading,
        report: Report,
    ) -> None:
        """Raises ValueError for frames that the backbone cannot be shown."""
        self.backbone, self.data, self.frames = backbone, data, frames
        self.accelerator, self.loading = accelerator, loading
        self.prepare: Prepare = make_prepare(backbone, frames)
        self.features_s = 0.0
        """seconds that the features took"""
        self._report = report
        self._features: tuple[Features | None, Features | None] | None = None

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    def say(self, what: str, done: int, total: int) -> None:
        """Reports progress."""
        still = " (single frame)" if self.frames == "single" else ""
        self._report(f"{self.backbone.label}{still}: {what}", done, total)

    def features(self) -> tuple[Features, Features] | None:
        """Of the training and the test set; None off the main process. The first call is a collective.

        Raises ValueError as `extract` does.
        """
        if self._features is None:
            started_s = time.perf_counter()
            self._features = self._extract("train"), self._extract("test")
            self.features_s = time.perf_counter() - started_s
        train, test = self._features
        return None if train is None or test is None else (train, test)

    def _extract(self, side: str) -> Features | None:
        return extract(
            self.backbone.model,
            self.data.train if side == "train" else self.data.test,
            self.accelerator,
            normalise=self.prepare,
            num_blocks=self.loading.num_blocks,
            batch_size=self.loading.batch_size,
            workers=self.loading.workers,
            dtype=self.loading.feature_dtype,
            progress=lambda done, total: self.say(f"{side} features", done, total),
        )
