"""Attentive probe with V-JEPA 2's grid of heads (Assran et al., arXiv 2506.09985), on a frozen backbone's tokens.

In: a subject. Out: an `Outcome`. It exists because what a masked autoencoder knows is spread over its tokens: a probe
that may look at them one by one reads what their mean has lost. All heads (learning rate x weight decay) train at once
on the same batches, held-out training samples choose one, and that one's test accuracy is `top1`. The best head on the
test set is reported too, under a name that says so: it is what V-JEPA 2 publishes.

Differs from the original: training clips are not augmented, and lie at the suite's `video.train_views`.

Legend: n samples, B batch, V views of each, N tokens of a view, D width, P probes, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from data_pipes.bounds import bounded
from pretrain.evaluation.encoder.split import held_out_mask
from pretrain.evaluation.encoder.subject import Subject
from pretrain.evaluation.encoder.tokens import Tokens, epoch_batches
from pretrain.evaluation.encoder.views import vote
from pretrain.evaluation.outcome import Outcome, percentage_correct
from pretrain.models.attention import attend
from pretrain.optim import parameter_groups


@dataclass(frozen=True)
class AttentiveConfig:
    """Settings of the protocol `attentive_vjepa2`; the defaults are V-JEPA 2's 20 heads."""

    learning_rates: tuple[float, ...] = bounded((5e-3, 3e-3, 1e-3, 3e-4, 1e-4), above=0)
    """used as they are; each falls to 0 along a half cosine"""
    weight_decays: tuple[float, ...] = bounded((0.01, 0.1, 0.4, 0.8), least=0)
    """of all but biases and one-dimensional parameters"""
    blocks: int = bounded(4, least=1)
    """of a probe: all but the last are self-attention over the tokens, the last is cross-attention from one query"""
    heads: int = bounded(16, least=1)
    """attention heads of a block; divides the backbone's width"""
    epochs: int = bounded(20, least=1)
    """passes over the training samples"""
    batch: int = bounded(128, least=1)
    """training samples per step"""
    held_out_fraction: float = bounded(0.1, least=0, below=1)
    """share of the training samples that chooses the head, in (0, 1)"""
    refit: bool = True
    """train the probes again on all training samples once the choice is made; false reports those of the first fit"""
    cache_limit_gb: float = bounded(4.0, least=0)
    """tokens of the training or test set up to this size are kept in main memory as float16, larger ones are computed
    again in each epoch; 0 = never keep them"""
    seed: int = bounded(0, least=0, most=2**53)
    """of the initial probes, the order of the samples and the held-out choice"""

    def __post_init__(self) -> None:
        if not self.learning_rates or not self.weight_decays:
            raise ValueError("learning_rates or weight_decays is empty; there is one head per combination")
        if min(self.blocks, self.heads, self.epochs, self.batch) < 1 or self.cache_limit_gb < 0:
            raise ValueError(
                f"blocks={self.blocks}, heads={self.heads}, epochs={self.epochs}, batch={self.batch}, "
                f"cache_limit_gb={self.cache_limit_gb}: expected at least 1 of each, and a limit of 0 or more"
            )


@dataclass(frozen=True)
class AttentiveHead:
    """One cell of the grid."""

    learning_rate: float
    """the highest of its schedule"""
    weight_decay: float
    """of all but biases and one-dimensional parameters"""


class CrossAttentionBlock(nn.Module):
    """A query attends to tokens, then an MLP: neither the query is normed before, nor is there an output projection."""

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, query: Tensor, tokens: Tensor) -> Tensor:
        """What the queries gather from the tokens.

        Args:
            query: [B, Q, D].
            tokens: [B, N, D].

        Returns:
            [B, Q, D].
        """
        key, value = self.key_value(self.norm1(tokens)).chunk(2, dim=-1)
        queries, keys, values = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query(query), key, value)
        )
        query = query + attend(queries, keys, values).transpose(1, 2).flatten(2)
        mixed: Tensor = query + self.mlp(self.norm2(query))
        return mixed


class AttentiveProbe(nn.Module):
    """Self-attention blocks, pooling by one query, and a linear classifier."""

    def __init__(self, width: int, heads: int, blocks: int, num_classes: int) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm, eps=1e-5)
        self.blocks = nn.ModuleList(Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(blocks - 1))
        self.query = nn.Parameter(torch.zeros(1, 1, width))
        self.pool = CrossAttentionBlock(width, heads)
        self.classifier = nn.Linear(width, num_classes)
        self._init_weights()

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, N, D] to logits [B, K]."""
        for block in self.blocks:
            tokens = block(tokens)
        pooled = self.pool(self.query.expand(len(tokens), -1, -1), tokens)
        logits: Tensor = self.classifier(pooled[:, 0])
        return logits

    @torch.no_grad()
    def _init_weights(self) -> None:
        """N(0, 0.02) cut at two deviations; what is added to the residual stream shrinks with depth."""
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.trunc_normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        self.pool.mlp.fc2.weight.div_(math.sqrt(2.0))
        for depth, block in enumerate(self.blocks, 2):
            assert isinstance(block, Block)
            block.attn.proj.weight.div_(math.sqrt(2.0 * depth))
            block.mlp.fc2.weight.div_(math.sqrt(2.0 * depth))


def check_attentive(subject: Subject, config: AttentiveConfig, where: str) -> None:
    """Refuses what cannot run.

    Args:
        subject: what is evaluated.
        config: of the task.
        where: its place in the suite, for messages.

    Raises:
        ValueError: a number of heads that does not fit the backbone, or several processes.
    """
    width = subject.backbone.interface.width
    if width % config.heads:
        raise ValueError(f"{where}.heads is {config.heads}, which does not divide the backbone's width of {width}")
    if subject.accelerator.num_processes > 1:
        raise ValueError("attentive_vjepa2 trains in one process: start it without torchrun, in a suite of its own")


def evaluate_attentive(subject: Subject, config: AttentiveConfig) -> Outcome:
    """Trains the grid of probes, chooses one on held-out training samples, and measures its accuracy on the test set.

    Every view of a training sample is an example of its own; a test sample's class is that of the mean softmax of its
    views.

    Returns:
        The metrics `top1` (of the chosen head) and `top1_best_head_on_test` (optimistic: chosen on the test set).

    Raises:
        ValueError: a sample has no label, or nothing can be held out.
    """
    limit = int(config.cache_limit_gb * 1e9)
    train, test = Tokens(subject, "train", limit), Tokens(subject, "test", limit)
    held_out = held_out_mask(train.labels, config.held_out_fraction, config.seed)
    everything = torch.arange(len(train.labels))
    rest = everything[~held_out]
    probes = fit_probes(subject, train, rest, config)
    choice_scores = accuracies(subject, probes, train, everything[held_out], config.batch)
    chosen = max(range(len(choice_scores)), key=lambda index: choice_scores[index])
    if config.refit:
        probes = fit_probes(subject, train, everything, config)
    scores = accuracies(subject, probes, test, torch.arange(len(test.labels)), config.batch)
    best_on_test = max(range(len(scores)), key=lambda index: scores[index])
    grid = heads_of(config)
    selection: dict[str, object] = {
        "by": "held-out training samples",
        "head": asdict(grid[chosen]),
        "top1_held_out": choice_scores[chosen],
        "num_held_out": int(held_out.sum()),
        "num_heads": len(grid),
        "best_head_on_test": asdict(grid[best_on_test]),
        "note": "top1_best_head_on_test is optimistic: its head was chosen on the test set",
        "tokens": "kept as float16" if train.is_cached else "computed again in each epoch",
    }
    metrics = {"top1": scores[chosen], "top1_best_head_on_test": scores[best_on_test]}
    num_train = len(everything) if config.refit else len(rest)
    return Outcome(metrics, selection, num_train=num_train, num_test=len(test.labels))


def heads_of(config: AttentiveConfig) -> list[AttentiveHead]:
    """The cells of the grid, in the order of the probes."""
    return [AttentiveHead(rate, decay) for rate, decay in product(config.learning_rates, config.weight_decays)]


def fit_probes(subject: Subject, tokens: Tokens, samples: Tensor, config: AttentiveConfig) -> list[AttentiveProbe]:
    """Trains one probe per cell of the grid: AdamW, a half cosine to 0 step by step, no warm-up.

    Args:
        subject: what is evaluated.
        tokens: of the training set.
        samples: int64 [m], those to train on.
        config: of the task.

    Returns:
        The probes on the device, in the order of `heads_of`.
    """
    width = subject.backbone.interface.width
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        probes = [
            AttentiveProbe(width, config.heads, config.blocks, subject.data.num_classes) for _ in heads_of(config)
        ]
    optimizer, rates = _optimizer([probe.to(subject.device).train() for probe in probes], config)
    generator = torch.Generator().manual_seed(config.seed)
    report: Callable[[int], None] = lambda epoch: subject.say("attentive probe, epochs", epoch, config.epochs)
    for inputs, labels, done in epoch_batches(tokens, samples, config.batch, config.epochs, generator, report):
        targets = labels.repeat_interleave(tokens.views)
        for probe in probes:  # one after the other: the memory of one
            with subject.accelerator.autocast():
                loss = F.cross_entropy(probe(inputs).float(), targets)
            loss.backward()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * done))
        optimizer.step()
        optimizer.zero_grad()
    return probes


def _optimizer(probes: list[AttentiveProbe], config: AttentiveConfig) -> tuple[torch.optim.AdamW, list[float]]:
    """AdamW over all probes, and the highest learning rate of each of its parameter groups."""
    groups: list[dict[str, object]] = []
    rates: list[float] = []
    for probe, head in zip(probes, heads_of(config), strict=True):
        own = parameter_groups(probe.named_parameters(), head.weight_decay)
        groups += own
        rates += [head.learning_rate] * len(own)
    return torch.optim.AdamW(groups, fused=True), rates


@torch.no_grad()
def accuracies(
    subject: Subject, probes: list[AttentiveProbe], tokens: Tokens, samples: Tensor, batch: int
) -> list[float]:
    """Top-1 of every probe, in percent; samples on which a probe's scores are not finite count as wrong.

    Args:
        subject: what is evaluated.
        probes: to be measured.
        tokens: of the set that `samples` belong to.
        samples: int64 [m].
        batch: samples per pass.
    """
    correct = [0] * len(probes)
    for inputs, labels in tokens.batches(samples, batch):
        for index, probe in enumerate(probes):
            with subject.accelerator.autocast():
                logits = probe.eval()(inputs)
            scores = vote(logits.float(), tokens.views)
            right = (scores.argmax(dim=1) == labels) & scores.isfinite().all(dim=1)
            correct[index] += int(right.sum())
    return [percentage_correct(count, len(samples)) for count in correct]
