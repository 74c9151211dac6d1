"""Tessera from Python: what the command line does, as functions with types, for scripts and notebooks.

    import tessera

    config = tessera.load_config("configs/demo/digits.yaml", {"train.epochs": 5})
    result = tessera.train(config)
    backbone = tessera.load_backbone(result.run_dir)
    features = backbone.features(pictures)

These names stay; whatever lies in `pretrain` and `data_pipes` may move. A mistake is an exception, a ValueError or an
OSError, with the sentence that the command line prints. Importing this package imports nothing else; each name imports
what it needs when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tessera.backbones import FeatureExtractor, Features, load_backbone
    from tessera.configuration import load_config
    from tessera.loaders import Batches, open_loader
    from tessera.results import evaluate, export
    from tessera.tokenizers import Tokenizer, load_tokenizer
    from tessera.training import TrainingResult, train

__all__ = [
    "Batches",
    "FeatureExtractor",
    "Features",
    "Tokenizer",
    "TrainingResult",
    "evaluate",
    "export",
    "load_backbone",
    "load_config",
    "load_tokenizer",
    "open_loader",
    "train",
]

_MODULES = {
    "backbones": ("FeatureExtractor", "Features", "load_backbone"),
    "configuration": ("load_config",),
    "loaders": ("Batches", "open_loader"),
    "results": ("evaluate", "export"),
    "tokenizers": ("Tokenizer", "load_tokenizer"),
    "training": ("TrainingResult", "train"),
}
"""Module of this package -> the names that it gives."""


def __getattr__(name: str) -> Any:
    """Imports a name when it is first used."""
    for module, names in _MODULES.items():
        if name in names:
            globals()[name] = getattr(importlib.import_module(f"tessera.{module}"), name)
            return globals()[name]
    raise AttributeError(f"module 'tessera' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    """The names, imported or not."""
    return sorted({*globals(), *__all__})
