"""A frozen backbone's tokens, batch by batch, for probes that attend over them.

In: a subject, a data set of it, the samples of each batch. Out: token batches. It exists because the tokens of a large
set do not fit into memory: small ones are computed once and kept as float16, larger ones are computed again each time.

Legend: n samples, B batch, V views of each, N patch tokens of a view, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from typing import cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pretrain.evaluation.encoder.datasets import loading_config, read_labels
from pretrain.evaluation.encoder.features import FeatureModel, num_views
from pretrain.evaluation.encoder.subject import Subject


class Tokens:
    """The last block's patch tokens after the final norm; a class token is left out."""

    def __init__(self, subject: Subject, side: str, cache_limit_bytes: int) -> None:
        """Reads the labels; tokens are computed when they are asked for.

        Args:
            subject: what is evaluated.
            side: "train" or "test".
            cache_limit_bytes: tokens of up to this size are kept in main memory.

        Raises:
            ValueError: a sample has no label.
        """
        self.subject, self.side = subject, side
        self.dataset = subject.data.train if side == "train" else subject.data.test
        self.views = num_views(self.dataset)
        self.labels = read_labels(self.dataset, loading_config(subject.backbone).storage)
        """int64 [n]."""
        self.is_cached = size_bytes(subject, self.dataset) <= cache_limit_bytes
        self._cached: Tensor | None = None

    def batches(self, samples: Tensor, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The tokens of some samples, batch by batch.

        Args:
            samples: int64 [m]; batches follow their order.
            batch: samples per batch; the last batch may be smaller.

        Yields:
            (float32 tokens [B * V, N, D], int64 labels [B]) on the device.
        """
        device = self.subject.device
        if self.is_cached:
            tokens = self._all()
            for part in samples.split(batch):
                yield tokens[part].to(device).float().flatten(0, 1), self.labels[part].to(device)
            return
        for part, tokens in zip(samples.split(batch), self._computed(samples, batch), strict=True):
            yield tokens.float().flatten(0, 1), self.labels[part].to(device)

    def _all(self) -> Tensor:
        """The tokens of the whole set, float16 [n, V, N, D] on the CPU; computed in the first call."""
        if self._cached is None:
            step = max(1, self.subject.loading.batch_size // self.views)
            done, parts = 0, []
            for tokens in self._computed(torch.arange(len(self.labels)), step):
                parts.append(tokens.to("cpu", torch.float16))
                done += len(tokens)
                self.subject.say(f"{self.side} tokens", done, len(self.labels))
            self._cached = torch.cat(parts)
        return self._cached

    def _computed(self, samples: Tensor, batch: int) -> Iterator[Tensor]:
        """Computes the tokens of some samples batch by batch, [B, V, N, D] on the device."""
        subject = self.subject
        model, device = subject.backbone.model.to(subject.device).eval(), subject.device
        order = samples.tolist()
        loader = DataLoader(self.dataset, batch, sampler=order, num_workers=subject.loading.workers)
        for stored, _ in loader:
            parts = []
            for inputs in subject.prepare(stored.to(device)).split(subject.loading.batch_size):
                with torch.no_grad(), subject.accelerator.autocast():
                    parts.append(cast(FeatureModel, model).features(inputs, 1)[-1][1])
            yield torch.cat(parts).unflatten(0, (len(stored), -1))


def size_bytes(subject: Subject, dataset: Dataset[tuple[Tensor, int]]) -> int:
    """Bytes of all tokens of a data set in float16."""
    interface = subject.backbone.interface
    return 2 * len(cast(Sized, dataset)) * num_views(dataset) * interface.num_tokens * interface.width


def epoch_batches(
    tokens: Tokens,
    samples: Tensor,
    batch: int,
    epochs: int,
    generator: torch.Generator,
    progress: Callable[[int], None],
) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Batches of shuffled epochs.

    Args:
        tokens: of the training set.
        samples: int64 [m], those to train on.
        batch: samples per batch.
        epochs: passes over the samples.
        generator: draws the order of every epoch.
        progress: called after each epoch, with the number of epochs that are done.

    Yields:
        (tokens, labels) of `Tokens.batches`, and the share of the training that is done, in [0, 1).
    """
    per_epoch = -(-len(samples) // batch)
    for epoch in range(epochs):
        shuffled = samples[torch.randperm(len(samples), generator=generator)]
        for step, (inputs, labels) in enumerate(tokens.batches(shuffled, batch)):
            yield inputs, labels, (epoch * per_epoch + step) / (epochs * per_epoch)
        progress(epoch + 1)
