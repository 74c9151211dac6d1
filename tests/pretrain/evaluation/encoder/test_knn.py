"""k-NN against a slow literal reference, and that its k is never chosen on the test set."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pretrain.evaluation.encoder.features import Features
from pretrain.evaluation.encoder.knn import KNNConfig, evaluate_knn, knn_predict

CPU = torch.device("cpu")


def literal_knn(
    train: Tensor, labels: Tensor, queries: Tensor, k: int, temperature: float, num_classes: int
) -> list[int]:
    """One query, one neighbour at a time."""
    predictions = []
    for query in queries:
        similarities = [float(torch.dot(row / row.norm(), query / query.norm())) for row in train]
        nearest = sorted(range(len(train)), key=lambda index: -similarities[index])[:k]
        votes = [0.0] * num_classes
        for index in nearest:
            votes[int(labels[index])] += math.exp(similarities[index] / temperature)
        predictions.append(max(range(num_classes), key=lambda label: votes[label]))
    return predictions


def features_of(values: Tensor, labels: Tensor) -> Features:
    """One block whose class token and average are both `values`."""
    return Features(values[:, None], values, labels)


@pytest.mark.parametrize("train_chunk", [7, 1000])
def test_equals_the_literal_reference_for_every_k_and_chunking(train_chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    train, queries = torch.randn(60, 8, generator=generator), torch.randn(25, 8, generator=generator)
    labels = torch.randint(0, 4, (60,), generator=generator)
    found = knn_predict(
        train, labels, queries, k=(1, 5, 60), temperature=0.07, num_classes=4, query_chunk=9, train_chunk=train_chunk
    )
    for k in (1, 5, 60):
        assert found[k].tolist() == literal_knn(train, labels, queries, k, 0.07, 4), k


def test_votes_are_weighted_by_similarity_and_not_counted() -> None:
    # Two far neighbours of class 1 against one near neighbour of class 0: a count says 1, the weights say 0.
    train = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]])
    found = knn_predict(
        train, torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.05]]), k=(3,), temperature=0.07, num_classes=2
    )
    assert found[3].tolist() == [0]


def test_scale_of_the_features_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(1)
    train, queries = torch.randn(40, 6, generator=generator), torch.randn(20, 6, generator=generator)
    labels = torch.randint(0, 3, (40,), generator=generator)
    scales = torch.rand(40, 1, generator=generator) * 100 + 0.1
    plain = knn_predict(train, labels, queries, k=(5,), temperature=0.07, num_classes=3)[5]
    scaled = knn_predict(train * scales, labels, queries * 7, k=(5,), temperature=0.07, num_classes=3)[5]
    assert plain.tolist() == scaled.tolist()


def test_the_primary_k_is_fixed_even_when_another_one_is_better_on_the_test_set() -> None:
    """The queries' own training twins are mislabelled: k=1 is always wrong where k=15 is always right."""
    generator = torch.Generator().manual_seed(2)
    angles = torch.cat([torch.zeros(20), torch.full((20,), math.pi / 2)]) + 0.05 * torch.randn(40, generator=generator)
    train = torch.stack([angles.cos(), angles.sin()], dim=1)
    labels = torch.tensor([0] * 20 + [1] * 20)
    noisy = labels.clone()
    noisy[:5] = 1
    outcome = evaluate_knn(
        features_of(train, noisy),
        features_of(train[:5], labels[:5]),
        KNNConfig(k=(1, 15), primary_k=1, temperature=0.5),
        num_classes=2,
        device=CPU,
    )
    assert outcome.metrics == {"top1": 0.0, "top1_k1": 0.0, "top1_k15": 100.0}
    assert outcome.selection == {"by": "fixed in advance", "k": 1}
    assert (outcome.num_train, outcome.num_test) == (40, 5)


def test_held_out_selection_chooses_on_training_images() -> None:
    """On the training images small k is right, on the (shuffled) test labels it is not: the choice must not move."""
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(10, 16, generator=generator)
    labels = torch.arange(10).repeat(12)
    train = centres[labels] + 0.01 * torch.randn(120, 16, generator=generator)
    config = KNNConfig(k=(3, 100), select="held_out", temperature=10.0, primary_k=3)
    test = features_of(train[:50], torch.randint(0, 10, (50,), generator=generator))
    outcome = evaluate_knn(features_of(train, labels), test, config, num_classes=10, device=CPU)
    assert outcome.selection["k"] == 3
    assert outcome.selection["top1_held_out"] == 100.0
    assert outcome.selection["num_held_out"] == 10
    assert outcome.metrics["top1"] == outcome.metrics["top1_k3"]


def test_the_feature_can_be_the_average() -> None:
    labels = torch.tensor([0, 1] * 10)
    good = torch.nn.functional.one_hot(labels, 2).float()
    features = Features(torch.ones(20, 1, 2), good, labels)  # the class token says nothing
    config = KNNConfig(k=(3,), primary_k=3, feature="average")
    assert evaluate_knn(features, features, config, num_classes=2, device=CPU).metrics["top1"] == 100.0
    config = KNNConfig(k=(3,), primary_k=3, feature="class")
    assert evaluate_knn(features, features, config, num_classes=2, device=CPU).metrics["top1"] < 100.0


def test_a_k_beyond_the_training_images_is_an_error() -> None:
    features = features_of(torch.randn(10, 4), torch.arange(10) % 2)
    with pytest.raises(ValueError, match=r"k=20 with 10 training images: list values of k between 1 and 10"):
        evaluate_knn(features, features, KNNConfig(k=(5, 20)), num_classes=2, device=CPU)


def test_a_primary_k_that_is_not_listed_is_an_error() -> None:
    features = features_of(torch.randn(10, 4), torch.arange(10) % 2)
    with pytest.raises(ValueError, match=r"primary_k=20 is not among k=\[5\]"):
        evaluate_knn(features, features, KNNConfig(k=(5,)), num_classes=2, device=CPU)
