"""The grid of heads against torch's own SGD, head by head; and that no head is chosen on the test set."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from pretrain.evaluation.encoder.features import Features
from pretrain.evaluation.encoder.linear import Head, LinearConfig, _batches, evaluate_linear, fit_heads
from pretrain.evaluation.encoder.split import held_out_mask

CPU = torch.device("cpu")


def random_features(
    num_samples: int, seed: int, *, num_blocks: int = 4, width: int = 6, num_classes: int = 3
) -> Features:
    """Features whose classes are partly separable."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, num_classes, (num_samples,), generator=generator)
    centres = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(99))
    tokens = centres[labels][:, None] + torch.randn(num_samples, num_blocks, width, generator=generator)
    average = centres[labels] + torch.randn(num_samples, width, generator=generator)
    return Features(tokens, average, labels)


def inputs_by_hand(features: Features, head: Head) -> Tensor:
    """Class tokens of the last blocks, oldest first, then the average."""
    parts = [features.class_tokens[:, index] for index in range(4 - head.blocks, 4)]
    return torch.cat([*parts, features.average] if head.average_pool else parts, dim=1)


@pytest.mark.parametrize("standardize", [False, True])
def test_every_head_equals_one_trained_alone_with_torch_sgd(standardize: bool) -> None:
    train = random_features(50, seed=0)
    config = LinearConfig(learning_rates=(1e-2, 1e-1), iterations=12, batch=32, standardize=standardize)
    fitted = fit_heads(train, config, 3, CPU, lambda done, total: None)
    assert len(fitted.heads) == 8
    # The same stream of batches: the generator draws every bank's initial weights first.
    generator = torch.Generator().manual_seed(config.seed)
    starts = [torch.empty(*bank.weight.shape).normal_(std=0.01, generator=generator) for bank in fitted.banks]
    rows = list(_batches(len(train), config.batch, config.iterations, generator))
    for bank, start in zip(fitted.banks, starts, strict=True):
        for number, head in enumerate(bank.heads):
            inputs = inputs_by_hand(train, head)
            if standardize:
                inputs = (inputs - inputs.mean(0)) / (inputs.var(0, unbiased=False) + 1e-6).sqrt()
            layer = nn.Linear(inputs.shape[1], 3)
            with torch.no_grad():
                layer.weight.copy_(start[:, number].T)
                layer.bias.zero_()
            optimizer = torch.optim.SGD(layer.parameters(), lr=head.learning_rate * 32 / 256, momentum=0.9)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.iterations)
            for batch in rows:
                loss = nn.functional.cross_entropy(layer(inputs[batch]), train.labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            assert torch.allclose(bank.weight[:, number], layer.weight.T, atol=1e-5), head
            assert torch.allclose(bank.bias[number], layer.bias, atol=1e-5), head


def test_the_default_grid_is_dinov2s_52_heads() -> None:
    fitted = fit_heads(
        random_features(20, seed=0), LinearConfig(iterations=1, batch=8), 3, CPU, lambda done, total: None
    )
    heads = fitted.heads
    assert len(heads) == 52
    assert {(head.blocks, head.average_pool) for head in heads} == {(1, False), (1, True), (4, False), (4, True)}
    rates = sorted({head.learning_rate for head in heads})
    assert len(rates) == 13
    assert (rates[0], rates[-1]) == (1e-5, 1e-1)


def test_batches_are_whole_epochs_in_a_row() -> None:
    generator = torch.Generator().manual_seed(0)
    stream = torch.cat(list(_batches(10, 4, 5, generator)))
    assert len(stream) == 20
    for epoch in (stream[:10], stream[10:]):
        assert sorted(epoch.tolist()) == list(range(10))


def test_separable_data_is_learned_as_well_as_by_logistic_regression() -> None:
    sklearn_linear = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is an optional dependency")
    train, test = random_features(600, seed=1), random_features(300, seed=2)
    config = LinearConfig(learning_rates=(1e-2, 1e-1), blocks=(4,), average_pool=(True,), iterations=300, batch=128)
    outcome = evaluate_linear(train, test, config, num_classes=3, device=CPU)
    head = Head(4, True, 0.1)
    model = sklearn_linear.LogisticRegression(max_iter=1000)
    model.fit(inputs_by_hand(train, head).numpy(), train.labels.numpy())
    reference = 100 * model.score(inputs_by_hand(test, head).numpy(), test.labels.numpy())
    assert outcome.metrics["top1"] == pytest.approx(reference, abs=2.0)
    assert outcome.metrics["top1"] > 90


def test_the_head_is_chosen_on_held_out_training_images_and_not_on_the_test_set() -> None:
    """On the training images the class token decides, on the test images only the average does.

    A probe that looks for the best head on the test set finds the averaging one; the honest one must not.
    """
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat(100)
    code = torch.nn.functional.one_hot(labels, 4).float() * 4

    def noise() -> Tensor:
        return torch.randn(400, 4, generator=generator)

    train = Features(code[:, None], 0.25 * code + noise(), labels)
    test = Features(noise()[:, None] * 4, code, labels)
    config = LinearConfig(
        learning_rates=(1e-5, 1e-1), blocks=(1,), average_pool=(False, True), iterations=150, batch=64, refit=False
    )
    outcome = evaluate_linear(train, test, config, num_classes=4, device=CPU)
    assert outcome.selection["head"] == {"blocks": 1, "average_pool": False, "learning_rate": 0.1}
    assert outcome.metrics["top1"] < outcome.metrics["top1_best_head_on_test"]
    assert outcome.selection["best_head_on_test"] != outcome.selection["head"]
    assert "optimistic" in str(outcome.selection["note"])


def test_refitting_uses_all_training_images_and_says_so() -> None:
    train, test = random_features(100, seed=1), random_features(40, seed=2)
    kept = evaluate_linear(train, test, LinearConfig(iterations=3, batch=16, refit=False), num_classes=3, device=CPU)
    again = evaluate_linear(train, test, LinearConfig(iterations=3, batch=16, refit=True), num_classes=3, device=CPU)
    assert again.num_train == 100
    assert kept.num_train == 100 - int(held_out_mask(train.labels, 0.1, 0).sum())
    assert again.num_test == kept.num_test == 40


def test_a_diverged_head_scores_zero() -> None:
    train = random_features(50, seed=0)
    fitted = fit_heads(train, LinearConfig(iterations=1, batch=8), 3, CPU, lambda done, total: None)
    fitted.banks[0].weight[:, 3] = math.nan
    assert fitted.accuracies(train)[3] == 0.0


def test_half_precision_features_give_the_same_probe() -> None:
    train, test = random_features(200, seed=1), random_features(100, seed=2)
    config = LinearConfig(learning_rates=(1e-1,), iterations=60, batch=64, standardize=True)
    full = evaluate_linear(train, test, config, num_classes=3, device=CPU)
    half_train, half_test = (Features(f.class_tokens.half(), f.average.half(), f.labels) for f in (train, test))
    half = evaluate_linear(half_train, half_test, config, num_classes=3, device=CPU)
    assert half.metrics["top1"] == pytest.approx(full.metrics["top1"], abs=1.0)


def test_more_blocks_than_the_features_hold_is_an_error() -> None:
    features = random_features(20, seed=0, num_blocks=2)
    with pytest.raises(ValueError, match=r"the features hold the last 2 blocks"):
        evaluate_linear(features, features, LinearConfig(), num_classes=3, device=CPU)


def test_an_empty_grid_is_an_error() -> None:
    with pytest.raises(ValueError, match="learning_rates is empty"):
        LinearConfig(learning_rates=())


def test_held_out_images_are_stratified_seeded_and_a_tenth() -> None:
    labels = torch.cat([torch.zeros(100), torch.ones(50), torch.full((4,), 2), torch.full((1,), 3)]).long()
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    mask = held_out_mask(labels, 0.1, seed=0)
    assert torch.bincount(labels[mask], minlength=4).tolist() == [10, 5, 1, 0]
    assert torch.equal(mask, held_out_mask(labels, 0.1, seed=0))
    assert not torch.equal(mask, held_out_mask(labels, 0.1, seed=1))


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_a_share_outside_of_0_to_1_is_an_error(fraction: float) -> None:
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        held_out_mask(torch.zeros(10, dtype=torch.int64), fraction, seed=0)
