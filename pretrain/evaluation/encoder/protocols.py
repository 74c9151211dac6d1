"""The protocols that a suite can name. Adding one: its file, a line in the table here, a YAML, a test.

Outside of this package, a `Protocol` in any module does: a suite names it by its import path,
`my_package.my_module:PROTOCOL`, or by an entry point of the group `tessera.protocols`.

In: a subject and typed settings. Out: an `Outcome`. It exists so that the suite treats all protocols alike, whether
they work on features, on tokens, or train the backbone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pretrain.evaluation.encoder.attentive import AttentiveConfig, check_attentive, evaluate_attentive
from pretrain.evaluation.encoder.finetune import FinetuneConfig, ImageFinetuneConfig, check_finetune, evaluate_finetuned
from pretrain.evaluation.encoder.knn import KNNConfig, evaluate_knn
from pretrain.evaluation.encoder.linear import LinearConfig, evaluate_linear
from pretrain.evaluation.encoder.subject import Subject
from pretrain.evaluation.outcome import Outcome


@dataclass(frozen=True)
class Protocol:
    """One entry of the table, or somebody's own."""

    config: type[Any]
    """dataclass of its settings"""
    run: Callable[[Subject, Any], Outcome | None]
    """(subject, settings) -> what was found; all processes call it, and get None off the main process"""
    check: Callable[[Subject, Any, str], None] = lambda subject, config, where: None
    """(subject, settings, their place in the suite): a ValueError for settings that do not fit the subject"""
    on_features: bool = False
    """whether it works on `Subject.features`"""


def _on_features(evaluate: Callable[..., Outcome]) -> Callable[[Subject, Any], Outcome | None]:
    """Makes a protocol of a function of the training set's and the test set's features."""

    def run(subject: Subject, config: Any) -> Outcome | None:
        features = subject.features()
        if features is None:
            return None
        return evaluate(*features, config, num_classes=subject.data.num_classes, device=subject.device)

    return run


def _check_linear(subject: Subject, config: LinearConfig, where: str) -> None:
    """Refuses heads on more blocks than the backbone has; `where` is the settings' place in the suite.

    Raises:
        ValueError: there are such heads.
    """
    depth = subject.backbone.interface.depth
    if depth is not None and max(config.blocks) > depth:
        raise ValueError(
            f"a linear probe joins the last {max(config.blocks)} blocks, the backbone has {depth}: set {where}.blocks "
            f"to numbers up to {depth}"
        )


PROTOCOLS: dict[str, Protocol] = {
    "knn_dino": Protocol(KNNConfig, _on_features(evaluate_knn), on_features=True),
    "linear_dinov2_cached": Protocol(LinearConfig, _on_features(evaluate_linear), _check_linear, on_features=True),
    "attentive_vjepa2": Protocol(AttentiveConfig, evaluate_attentive, check_attentive),
    "finetune_mae": Protocol(ImageFinetuneConfig, evaluate_finetuned, check_finetune),
    "finetune_videomae": Protocol(FinetuneConfig, evaluate_finetuned, check_finetune),
}
"""Name in `tasks.<task>.protocol` -> entry."""


def num_blocks(settings: Iterable[Any]) -> int:
    """How many last blocks' class tokens the tasks with these settings need; at least 1."""
    return max([1, *(max(config.blocks) for config in settings if isinstance(config, LinearConfig))])
