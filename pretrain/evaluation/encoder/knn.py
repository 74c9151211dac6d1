"""k-nearest-neighbour classification on frozen features, as DINO does it (Caron et al., arXiv 2104.14294).

In: `Features` of a training and a test set. Out: an `Outcome` with the accuracy for every k. It exists as the cheapest
label check of a representation: nothing is trained. The k of the reported figure is fixed in advance, or chosen on
held-out training images; it is never the best of several on the test set.

Legend: n training rows, m queries, D feature width, k neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipes.bounds import bounded
from pretrain.evaluation.encoder.features import Features
from pretrain.evaluation.encoder.split import held_out_mask
from pretrain.evaluation.outcome import Outcome, percentage_correct


@dataclass(frozen=True)
class KNNConfig:
    """Settings of the protocol `knn_dino`."""

    k: tuple[int, ...] = bounded((10, 20, 100, 200), least=1)
    """neighbours; every value's accuracy is reported"""
    temperature: float = bounded(0.07, above=0)
    """T of the votes' weights exp(cosine / T)"""
    feature: Literal["class", "average", "class+average"] = "class"
    """last block's class token, the mean of its patch tokens, or both joined"""
    select: Literal["fixed", "held_out"] = "fixed"
    """where the k of `top1` comes from: `fixed` is `primary_k`, `held_out` the best k on held-out training images"""
    primary_k: int = bounded(20, least=1)
    """the k of `top1` when select is `fixed`; one of `k`"""
    held_out_fraction: float = bounded(0.1, least=0, below=1)
    """share of the training images that choose k when select is `held_out`, in (0, 1)"""
    seed: int = bounded(0, least=0, most=2**53)
    """of the held-out choice"""


def knn_predict(
    train: Tensor,
    train_labels: Tensor,
    queries: Tensor,
    *,
    k: Sequence[int],
    temperature: float,
    num_classes: int,
    query_chunk: int = 512,
    train_chunk: int = 131_072,
) -> dict[int, Tensor]:
    """Predicts classes by votes of the nearest neighbours, weighted with exp(cosine / temperature).

    Args:
        train: float [n, D]; need not be normalised. May be fp16: similarities are fp32.
        train_labels: int64 [n] in [0, num_classes).
        queries: float [m, D].
        k: neighbour counts, each in [1, n].
        temperature: above 0.
        num_classes: how many classes are voted for.
        query_chunk: queries per block of the similarity matrix, which bounds memory and changes nothing else.
        train_chunk: training rows per block, the same.

    Returns:
        k -> predicted classes, int64 [m].

    Raises:
        ValueError: a k that is not in [1, n].
    """
    for count in k:
        if not 1 <= count <= len(train):
            raise ValueError(
                f"k={count} with {len(train)} training images: list values of k between 1 and {len(train)}"
            )
    largest = max(k)
    predictions: dict[int, list[Tensor]] = {count: [] for count in k}
    for start in range(0, len(queries), query_chunk):
        block = F.normalize(queries[start : start + query_chunk].float(), dim=1)
        similarity, neighbours = _nearest(train, block, largest, train_chunk)
        # exp(s/T) with the largest s moved to 0: the same votes up to a common factor, and no overflow at small T.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        labels = train_labels.to(block.device)[neighbours]
        for count in k:
            votes = torch.zeros(len(block), num_classes, device=block.device)
            votes.scatter_add_(1, labels[:, :count], weights[:, :count])
            predictions[count].append(votes.argmax(dim=1))
    return {count: torch.cat(parts) for count, parts in predictions.items()}


def _nearest(train: Tensor, queries: Tensor, k: int, train_chunk: int) -> tuple[Tensor, Tensor]:
    """Finds the nearest training rows by cosine.

    Args:
        train: float [n, D].
        queries: [m, D], normalised.
        k: neighbours of each query.
        train_chunk: training rows that are compared at a time.

    Returns:
        The k largest cosines [m, k], descending, and the rows [m, k] that they belong to.
    """
    best = torch.empty(len(queries), 0, device=queries.device)
    rows = torch.empty(len(queries), 0, device=queries.device, dtype=torch.int64)
    for start in range(0, len(train), train_chunk):
        block = F.normalize(train[start : start + train_chunk].to(queries.device).float(), dim=1)
        similarity, index = (queries @ block.T).topk(min(k, len(block)), dim=1)
        best, rows = torch.cat([best, similarity], dim=1), torch.cat([rows, index + start], dim=1)
        best, order = best.topk(min(k, best.shape[1]), dim=1)
        rows = rows.gather(1, order)
    return best, rows


def evaluate_knn(
    train: Features, test: Features, config: KNNConfig, *, num_classes: int, device: torch.device
) -> Outcome:
    """Measures the accuracy of k-NN on `test` with the neighbours in `train`.

    The views of a sample are averaged into one feature.

    Args:
        train: where neighbours are searched.
        test: what is classified.
        config: of the task.
        num_classes: of both sets.
        device: computes the similarities.

    Returns:
        The metrics `top1`, and `top1_k<k>` for every k.

    Raises:
        ValueError: `primary_k` is not in `k`, or a k exceeds the number of training images.
    """
    if config.select == "fixed" and config.primary_k not in config.k:
        raise ValueError(
            f"primary_k={config.primary_k} is not among k={list(config.k)}: add it to k or name one of these"
        )
    train, test = train.averaged(), test.averaged()
    memory, queries = _features(train, config.feature).to(device), _features(test, config.feature).to(device)

    def accuracies(rows: Tensor, row_labels: Tensor, points: Tensor, point_labels: Tensor) -> dict[int, float]:
        found = knn_predict(
            rows, row_labels, points, k=config.k, temperature=config.temperature, num_classes=num_classes
        )
        return {
            k: percentage_correct(int((predicted.cpu() == point_labels).sum()), len(point_labels))
            for k, predicted in found.items()
        }

    selection: dict[str, object] = {"by": "fixed in advance", "k": config.primary_k}
    chosen = config.primary_k
    if config.select == "held_out":
        held_out = held_out_mask(train.labels, config.held_out_fraction, config.seed)
        scores = accuracies(memory[~held_out], train.labels[~held_out], memory[held_out], train.labels[held_out])
        chosen = max(scores, key=lambda k: scores[k])
        selection = {
            "by": "held-out training images",
            "k": chosen,
            "top1_held_out": scores[chosen],
            "num_held_out": int(held_out.sum()),
        }
    test_scores = accuracies(memory, train.labels, queries, test.labels)
    metrics = {"top1": test_scores[chosen]} | {f"top1_k{k}": score for k, score in test_scores.items()}
    return Outcome(metrics, selection, num_train=len(train), num_test=len(test))


def _features(features: Features, kind: Literal["class", "average", "class+average"]) -> Tensor:
    """The rows [n, D], or [n, 2 D] for both kinds, that are compared."""
    last = features.class_tokens[:, -1]
    if kind == "class":
        return last
    if kind == "average":
        return features.average
    return torch.cat([F.normalize(last.float(), dim=1), F.normalize(features.average.float(), dim=1)], dim=1)
