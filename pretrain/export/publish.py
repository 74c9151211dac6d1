"""What every export does around its own files: a folder that appears whole or not at all, a comparison, a model card.

Enters: where to publish. Leaves: the published folder. It exists so that a half-written export, or one that computes
something else, is never found where a user looks for a good one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

NO_LICENSE = (
    "No license has been declared for these weights. Whoever publishes them states one here, with regard to the terms "
    "of the training images."
)


class ExportError(RuntimeError):
    """The exported model does not compute what ours does; nothing was published."""


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Gives an empty folder beside `folder` to write into, which becomes `folder` unless the block raises.

    Raises FileExistsError when something is at `folder` already.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists: exports are never overwritten, choose another folder or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def relative_error(what: str, theirs: Tensor, ours: Tensor) -> float:
    """|theirs - ours| / |ours| over all values, Euclidean; infinite where a value is not finite.

    what: for the message. Raises ExportError when the shapes differ.
    """
    if theirs.shape != ours.shape:
        raise ExportError(f"the export gives {what} of shape {list(theirs.shape)}, ours are {list(ours.shape)}")
    error = float((theirs.double() - ours.double()).norm() / ours.double().norm())
    return error if error < float("inf") else float("inf")  # NaN too


def check_error(what: str, error: float, tolerance: float) -> None:
    """Raises ExportError when `error` is larger than `tolerance`, or not a number."""
    if not error <= tolerance:
        raise ExportError(
            f"the exported model's {what} differ from ours by {error:.3g} of their size, more than {tolerance:.3g}: "
            "nothing was published"
        )


def compose_card(title: str, tags: Sequence[str], summary: str, sections: Mapping[str, str]) -> str:
    """The text of a README.md: tags for model hubs, a title, a paragraph, and sections by their headings."""
    parts = ["\n".join(["---", "tags:", *(f"- {tag}" for tag in tags), "---"]), f"# {title}", summary]
    parts += [f"## {heading}\n\n{text}" for heading, text in (*sections.items(), ("License", NO_LICENSE))]
    return "\n\n".join(parts) + "\n"


def table(rows: Mapping[str, str]) -> str:
    """Two columns without a head, in Markdown."""
    return "\n".join(["| | |", "|---|---|", *(f"| {label} | {text} |" for label, text in rows.items())])


def numbers(values: Sequence[float]) -> str:
    """[0.5, 0.25]"""
    return "[" + ", ".join(f"{value:g}" for value in values) + "]"


@dataclass(frozen=True)
class PretrainingErrors:
    """How far transformers' predictions and loss are from ours on fixed clips and masks."""

    predictions: float
    """|theirs - ours| / |ours| over all hidden tokens, ours computed with their eps of the decoder's norm"""
    loss: float
    """|theirs - ours| / ours, the same"""
    eps_effect: float
    """|theirs - ours| / |ours| of the predictions with our own eps: what their 1e-5 instead of 1e-6 changes"""


@dataclass(frozen=True)
class VideoMAEExport:
    """What was published."""

    folder: Path
    architecture: str
    """transformers' class: VideoMAEModel or VideoMAEForPreTraining"""
    feature_error: float
    """|theirs - ours| / |ours| over the features of all tokens"""
    pretraining: PretrainingErrors | None
    """None for an encoder alone"""
    has_processor: bool
    """there is a preprocessor_config.json: `VideoMAEImageProcessor` takes 1 and 3 channels"""
    digest: str
    """`weights_digest` of the backbone"""

    @property
    def errors(self) -> dict[str, float]:
        """All differences from ours, by name."""
        return {"features": self.feature_error} | ({} if self.pretraining is None else asdict(self.pretraining))
