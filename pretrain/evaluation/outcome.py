"""What a protocol hands back: figures, and how every figure was chosen.

In: nothing. Out: `Outcome`, which the suite writes into a result file. It exists so that no protocol can report a
number without saying which choices (k, learning rate, pooling) led to it and on which samples they were made.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """One protocol's result for one model."""

    metrics: dict[str, float]
    """name -> figure; accuracies are percentages in [0, 100]; `top1` is the figure to quote"""
    selection: dict[str, object]
    """what was selected (k, head), on which samples, and the score there"""
    num_train: int
    """training images that the protocol was fitted on"""
    num_test: int
    """test images behind every figure in `metrics`"""


def percentage_correct(num_correct: int, num_samples: int) -> float:
    """Accuracy in percent, of at least one sample."""
    return 100.0 * num_correct / num_samples
