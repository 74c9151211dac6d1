"""Linear probe with DINOv2's grid of heads (Oquab et al., arXiv 2304.07193), trained on cached features.

In: `Features` of a training and a test set. Out: an `Outcome`. It exists to say how much of the labels is linearly
readable from the backbone, without a learning rate tuned on the test set: all heads train at once, held-out training
images choose one, and that one's test accuracy is `top1`. The best head on the test set is reported too, under a name
that says so.

The name `linear_dinov2_cached` says what differs from the original: features are extracted once, from the evaluation
view, where the original augments (random resized crop and flip) and runs the backbone in every iteration.

Legend: n samples, V views of each, B batch, D backbone width, F a head's input width, H heads that share an input, K
classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product

import torch
from torch import Tensor

from data_pipes.bounds import bounded
from pretrain.evaluation.encoder.features import Features, Progress
from pretrain.evaluation.encoder.split import held_out_mask
from pretrain.evaluation.encoder.views import vote
from pretrain.evaluation.outcome import Outcome, percentage_correct

LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
"""DINOv2's 13, per 256 images."""


@dataclass(frozen=True)
class LinearConfig:
    """Settings of the protocol `linear_dinov2_cached`; the defaults are DINOv2's 52 heads."""

    learning_rates: tuple[float, ...] = bounded(LEARNING_RATES, above=0)
    """per 256 images: the step size is rate * batch / 256"""
    blocks: tuple[int, ...] = bounded((1, 4), least=1)
    """how many last blocks' class tokens are joined; each at most the backbone's depth"""
    average_pool: tuple[bool, ...] = (False, True)
    """whether the mean patch token of the last block is joined to them"""
    iterations: int = bounded(12_500, least=1)
    """optimizer steps"""
    batch: int = bounded(1024, least=1)
    """training images per step"""
    momentum: float = bounded(0.9, least=0, below=1)
    """of the SGD; there is no weight decay"""
    standardize: bool = False
    """shift and scale every input to zero mean and unit variance over the training images, as MAE's probe does"""
    held_out_fraction: float = bounded(0.1, least=0, below=1)
    """share of the training images that chooses the head, in (0, 1)"""
    refit: bool = True
    """train the heads again on all training images once the choice is made; false reports those of the first fit"""
    seed: int = bounded(0, least=0, most=2**53)
    """of the initial heads, the order of the images and the held-out choice"""

    def __post_init__(self) -> None:
        for name in ("learning_rates", "blocks", "average_pool"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; give at least one value, there is one head per combination")
        if min(self.blocks) < 1 or self.iterations < 1 or self.batch < 1:
            raise ValueError(
                f"blocks={list(self.blocks)}, iterations={self.iterations}, batch={self.batch}: each must be at least 1"
            )


@dataclass(frozen=True)
class Head:
    """One cell of the grid."""

    blocks: int
    """how many last blocks' class tokens it sees"""
    average_pool: bool
    """whether it sees the mean patch token too"""
    learning_rate: float
    """the highest of its schedule, per 256 images"""


class HeadBank:
    """H linear classifiers on the same input, with a learning rate each: one matrix product serves them all."""

    def __init__(
        self, heads: list[Head], width: int, num_classes: int, generator: torch.Generator, device: torch.device
    ):
        """Weights are drawn from N(0, 0.01), biases are 0.

        Args:
            heads: H cells of the grid that differ in their learning rates alone.
            width: F.
            num_classes: K.
            generator: on the CPU, so that the weights are the same on every device.
            device: where the heads train.
        """
        self.heads = heads
        self.blocks, self.average_pool = heads[0].blocks, heads[0].average_pool
        weight = torch.empty(width, len(heads), num_classes).normal_(std=0.01, generator=generator)
        self.weight = weight.to(device)  # [F, H, K]
        self.bias = torch.zeros(len(heads), num_classes, device=device)  # [H, K]
        self.weight_velocity, self.bias_velocity = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        self.rates = torch.tensor([head.learning_rate for head in heads], device=device)[:, None]  # [H, 1]

    def logits(self, inputs: Tensor) -> Tensor:
        """Inputs [B, F] to the logits of every head [B, H, K]."""
        return (inputs @ self.weight.flatten(1)).view(len(inputs), *self.bias.shape) + self.bias

    def step(self, inputs: Tensor, labels: Tensor, *, rate_factor: float, momentum: float) -> None:
        """One SGD step of every head on its mean cross-entropy.

        The gradient is written out, (softmax - one-hot) / B: autograd would keep every head's log-softmax alive.

        Args:
            inputs: [B, F].
            labels: int64 [B].
            rate_factor: what every head's learning rate is multiplied with in this step.
            momentum: of the SGD.
        """
        error = self.logits(inputs).softmax(dim=2)
        error[torch.arange(len(labels), device=labels.device), :, labels] -= 1.0
        error /= len(labels)
        self.weight_velocity.mul_(momentum).add_((inputs.T @ error.flatten(1)).view_as(self.weight))
        self.bias_velocity.mul_(momentum).add_(error.sum(dim=0))
        self.weight -= rate_factor * self.rates * self.weight_velocity
        self.bias -= rate_factor * self.rates * self.bias_velocity


class InputStatistics:
    """Shift and scale that bring class tokens [L, D] and the average [D] to zero mean and unit variance."""

    def __init__(self, train: Features, eps: float = 1e-6):
        """Measures the training features.

        Args:
            train: what has zero mean and unit variance afterwards.
            eps: added to the variances.
        """
        # Over chunks: the features may be fp16 and larger than what fits in memory a second time.
        parts = train.class_tokens.split(65_536), train.average.split(65_536)
        rows = len(train.average)
        self.means = [sum(part.double().sum(0) for part in chunks) / rows for chunks in parts]
        self.scales = []
        for chunks, mean in zip(parts, self.means, strict=True):
            variance = sum((part.double() - mean).square().sum(0) for part in chunks) / rows
            self.scales.append((torch.as_tensor(variance) + eps).rsqrt())

    def __call__(self, class_tokens: Tensor, average: Tensor) -> tuple[Tensor, Tensor]:
        """Standardizes class tokens [B, L, D] and averages [B, D]; both are float32 afterwards."""
        first, second = (
            ((values - mean) * scale).float()
            for values, mean, scale in zip((class_tokens, average), self.means, self.scales, strict=True)
        )
        return first, second


def evaluate_linear(
    train: Features,
    test: Features,
    config: LinearConfig,
    *,
    num_classes: int,
    device: torch.device,
    progress: Progress | None = None,
) -> Outcome:
    """Trains the grid of heads, chooses one on held-out training images, and measures its accuracy on `test`.

    Every view of a training sample is an example of its own; a test sample's class is that of the mean softmax of its
    views.

    Args:
        train: what the heads are trained and chosen on.
        test: what the figures are measured on.
        config: of the task.
        num_classes: K.
        device: where the heads train.
        progress: called after each optimizer step with steps.

    Returns:
        The metrics `top1` (of the chosen head) and `top1_best_head_on_test` (optimistic: chosen on the test set).

    Raises:
        ValueError: the features hold fewer blocks than a head joins, or nothing can be held out.
    """
    if max(config.blocks) > train.class_tokens.shape[1]:
        raise ValueError(
            f"blocks={list(config.blocks)}, but the features hold the last {train.class_tokens.shape[1]} blocks: "
            "set blocks to numbers up to the backbone's depth"
        )
    held_out = held_out_mask(train.labels, config.held_out_fraction, config.seed)
    rest = train.subset(~held_out)
    total = config.iterations * (2 if config.refit else 1)
    report = progress or (lambda done, total: None)
    fitted = fit_heads(rest, config, num_classes, device, lambda done, _: report(done, total))
    choice_scores = fitted.accuracies(train.subset(held_out))
    chosen = max(range(len(choice_scores)), key=lambda index: choice_scores[index])
    if config.refit:
        fitted = fit_heads(train, config, num_classes, device, lambda done, _: report(config.iterations + done, total))
    scores = fitted.accuracies(test)
    best_on_test = max(range(len(scores)), key=lambda index: scores[index])
    selection: dict[str, object] = {
        "by": "held-out training images",
        "head": asdict(fitted.heads[chosen]),
        "top1_held_out": choice_scores[chosen],
        "num_held_out": int(held_out.sum()),
        "num_heads": len(scores),
        "best_head_on_test": asdict(fitted.heads[best_on_test]),
        "note": "top1_best_head_on_test is optimistic: its head was chosen on the test set",
    }
    metrics = {"top1": scores[chosen], "top1_best_head_on_test": scores[best_on_test]}
    return Outcome(metrics, selection, num_train=len(train if config.refit else rest), num_test=len(test))


@dataclass(frozen=True)
class FittedHeads:
    """The grid after training."""

    banks: list[HeadBank]
    """one per input that a head can have"""
    statistics: InputStatistics | None
    """None: inputs are not standardized"""
    device: torch.device
    """where the heads are"""

    @property
    def heads(self) -> list[Head]:
        """The cells of the grid, in the order of `accuracies`."""
        return [head for bank in self.banks for head in bank.heads]

    def accuracies(self, features: Features, chunk: int = 4096) -> list[float]:
        """Top-1 of every head, in percent; samples on which a head's logits are not finite count as wrong.

        Args:
            features: what is classified; the views of a sample vote by their mean softmax.
            chunk: rows at a time.
        """
        correct = [torch.zeros(len(bank.heads), dtype=torch.int64, device=self.device) for bank in self.banks]
        for samples in torch.arange(len(features)).split(max(1, chunk // features.views)):
            labels, rows = features.labels[samples].to(self.device), features.rows_of(samples)
            for count, bank, inputs in zip(correct, self.banks, self.inputs(features, rows), strict=True):
                scores = vote(bank.logits(inputs), features.views)
                right = (scores.argmax(dim=2) == labels[:, None]) & scores.isfinite().all(dim=2)
                count += right.sum(dim=0)
        return [percentage_correct(int(count), len(features)) for count in torch.cat(correct).tolist()]

    def inputs(self, features: Features, rows: Tensor) -> Iterator[Tensor]:
        """Each bank's float32 input [B, F] on the device, for int64 [B] rows of the features."""
        class_tokens, average = features.class_tokens[rows], features.average[rows]
        if self.statistics is not None:
            class_tokens, average = self.statistics(class_tokens, average)
        class_tokens, average = class_tokens.to(self.device).float(), average.to(self.device).float()
        for bank in self.banks:
            joined = class_tokens[:, -bank.blocks :].flatten(1)
            yield torch.cat([joined, average], dim=1) if bank.average_pool else joined


def fit_heads(
    train: Features, config: LinearConfig, num_classes: int, device: torch.device, progress: Progress
) -> FittedHeads:
    """Trains the whole grid: SGD with a half cosine to 0, iteration by iteration.

    Args:
        train: every view of a sample is an example.
        config: of the task.
        num_classes: K.
        device: where the heads train.
        progress: called after each iteration, with iterations.
    """
    generator = torch.Generator().manual_seed(config.seed)
    width, factor = train.average.shape[1], config.batch / 256
    banks = []
    for blocks, pool in product(config.blocks, config.average_pool):
        heads = [Head(blocks, pool, rate) for rate in config.learning_rates]
        banks.append(HeadBank(heads, (blocks + pool) * width, num_classes, generator, device))
    fitted = FittedHeads(banks, InputStatistics(train) if config.standardize else None, device)
    row_labels = train.labels.repeat_interleave(train.views)
    for iteration, rows in enumerate(_batches(len(row_labels), config.batch, config.iterations, generator)):
        labels = row_labels[rows].to(device)
        cosine = 0.5 * (1 + math.cos(math.pi * iteration / config.iterations))
        for bank, inputs in zip(banks, fitted.inputs(train, rows), strict=True):
            bank.step(inputs, labels, rate_factor=factor * cosine, momentum=config.momentum)
        progress(iteration + 1, config.iterations)
    return fitted


def _batches(num_samples: int, batch: int, iterations: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Row indices, int64 [batch] for each iteration, cut from one shuffled epoch after the other without a gap."""
    pending = torch.empty(0, dtype=torch.int64)
    for _ in range(iterations):
        while len(pending) < batch:
            pending = torch.cat([pending, torch.randperm(num_samples, generator=generator)])
        yield pending[:batch]
        pending = pending[batch:]
