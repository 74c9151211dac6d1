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

Report = Callable[[str, int, int], None]
"""Progress as (what is being done, how much of it is done, how much there is in all)."""


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
        """Nothing is computed yet.

        Args:
            backbone: what is evaluated.
            data: opened for this backbone.
            frames: what is shown of a clip.
            accelerator: of `features.make_accelerator`.
            loading: how samples and features travel.
            report: called now and then.

        Raises:
            ValueError: a single frame for a backbone that takes images.
        """
        self.backbone, self.data, self.frames = backbone, data, frames
        self.accelerator, self.loading = accelerator, loading
        self.prepare: Prepare = make_prepare(backbone, frames)
        self.features_s = 0.0
        """Seconds that the features took; 0 until they are there."""
        self._report = report
        self._features: tuple[Features | None, Features | None] | None = None

    @property
    def device(self) -> torch.device:
        """Of the accelerator."""
        device: torch.device = self.accelerator.device
        return device

    def say(self, what: str, done: int, total: int) -> None:
        """Reports progress, see `Report`."""
        single = " (single frame)" if self.frames == "single" else ""
        self._report(f"{self.backbone.label}{single}: {what}", done, total)

    def features(self) -> tuple[Features, Features] | None:
        """The features of the training and the test set. The first call is a collective.

        Returns:
            (training, test) on the main process, None on the others.

        Raises:
            ValueError: a data set is empty, or a sample has no label.
        """
        if self._features is None:
            started_s = time.perf_counter()
            self._features = self._extract("train"), self._extract("test")
            self.features_s = time.perf_counter() - started_s
        train, test = self._features
        return None if train is None or test is None else (train, test)

    def _extract(self, side: str) -> Features | None:
        """The features of one data set; None off the main process."""
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
