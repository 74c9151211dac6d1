"""What exports to transformers share: files under the names of version 4, and a strict reload with what is installed.

Enters: settings and tensors under transformers' names. Leaves: config.json and model.safetensors, and their model as
transformers loads it, 4 or 5. It exists because there a wrong name or a setting left at its default (an eps of 1e-12, a
mean pooling that drops the norm) only warns or is silent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain.export.pictures import Errors
from pretrain.export.publish import load_completely, write_tensors
from pretrain.weights.files import EXPORT_WEIGHTS
from pretrain.weights.finding import EXPORT_CONFIG

PREPROCESSOR = "preprocessor_config.json"
"""The file that transformers' image processors read."""
TOLERANCE = 1e-5
"""Largest relative error of features, predictions and loss that is published."""


@dataclass(frozen=True)
class TransformersExport:
    """What was published."""

    folder: Path
    """where it is"""
    architecture: str
    """transformers' class, such as ViTModel or VideoMAEForPreTraining"""
    errors: dict[str, float]
    """|theirs - ours| / |ours| of the "features" of all tokens, and with the decoder of "predictions" and "loss"; of a
    video model also "eps_effect", that of the predictions with our own eps of the decoder's norm, 1e-6 and not 1e-5"""
    digest: str
    """`weights_digest` of the backbone"""
    has_processor: bool = True
    """there is a preprocessor_config.json"""
    pictures: Errors = field(default_factory=dict)
    """of the pictures that were compared from the file on, see `compare_pictures`"""


def write_model(folder: Path, architecture: str, described: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Writes config.json and model.safetensors.

    Args:
        folder: gets the files.
        architecture: transformers' class.
        described: the other settings.
        state: tensors under the names of transformers 4.
    """
    (folder / EXPORT_CONFIG).write_text(json.dumps({"architectures": [architecture], **described}, indent=2) + "\n")
    write_tensors(folder / EXPORT_WEIGHTS, state)


def load_strictly(folder: Path, architecture: str, described: Mapping[str, Any], **arguments: bool) -> Any:
    """The model of a folder, on the CPU in evaluation mode.

    Args:
        folder: holds the export.
        architecture: transformers' class.
        described: the settings that were written.
        arguments: of the class's constructor.

    Raises:
        ImportError: transformers is not installed.
        ExportError: as `load_completely`.
    """
    theirs = getattr(transformers_library(), architecture)
    return load_completely(
        "transformers", theirs, folder, described, lambda config, name: getattr(config, name, None), **arguments
    )


def transformers_library() -> Any:
    """The package.

    Raises:
        ImportError: it is not installed; the message says what to do.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "exporting to transformers needs that package: pip install 'tessera-pretrain[export]'"
        ) from error
    return transformers
