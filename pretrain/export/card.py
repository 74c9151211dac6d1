"""What model cards (README.md) of all exports say alike: the layout, where weights come from, and their evaluations.

In: a `Backbone` or a `LoadedTokenizer`. Out: pieces of Markdown. It exists because weights without provenance cannot be
trusted or cited; all of it is read from the run, and what is not known is said to be unknown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from pretrain.checkpoint.folder import Folder
from pretrain.checkpoint.open_folder import open_folder
from pretrain.weights.backbone import Backbone

if TYPE_CHECKING:
    from pretrain.weights.tokenizer import LoadedTokenizer

UNKNOWN = "not recorded"
"""Stands for what the run does not tell."""
NO_RESULTS = "No results of these weights were recorded when they were exported."
"""Stands for the table of evaluations where it would be empty."""
NO_LICENSE = (
    "No license has been declared for these weights. Whoever publishes them states one here, with regard to the terms "
    "of the training images."
)
"""The last section of every card."""


def compose_card(
    title: str,
    tags: Sequence[str],
    summary: str,
    sections: Mapping[str, str],
    metadata: Mapping[str, str] | None = None,
) -> str:
    """The text of a README.md.

    Args:
        title: of the card.
        tags: for model hubs.
        summary: the first paragraph.
        sections: heading -> text; a section on the license is added.
        metadata: what else model hubs read, before the tags.
    """
    head = [f"{key}: {value}" for key, value in (metadata or {}).items()]
    parts = ["\n".join(["---", *head, "tags:", *(f"- {tag}" for tag in tags), "---"]), f"# {title}", summary]
    parts += [f"## {heading}\n\n{text}" for heading, text in (*sections.items(), ("License", NO_LICENSE))]
    return "\n\n".join(parts) + "\n"


def provenance(source: Backbone | LoadedTokenizer) -> dict[str, str]:
    """Where the weights come from, as label -> text; what is not known says so."""
    complete = source.complete or {}
    run = _read_json(open_folder(source.run_dir), "run.json") if source.run_dir is not None else {}
    state = _read_json(source.checkpoint, "state.json") if source.checkpoint is not None else {}
    order = state.get("order") or {}
    position = complete.get("position")
    return {
        "run": source.config.name if source.config is not None else UNKNOWN,
        "run uid": str(complete.get("run_uid") or UNKNOWN),
        "weights": source.weights,
        "optimizer step": str(source.step) if source.step is not None else UNKNOWN,
        "samples seen": f"{position:,}" if isinstance(position, int) else UNKNOWN,
        "configuration sha256": str(complete.get("config_sha256") or UNKNOWN),
        "training data fingerprint": str(order.get("fingerprint") or UNKNOWN),
        "code revision": _revision(run),
        "checkpoint digest": str(complete.get("digest") or UNKNOWN),
        "weights sha256": source.digest,
        "imported from": Path(source.source).name if source.checkpoint is None else "no: trained by this run",
    }


def top1_results(backbone: Backbone) -> list[dict[str, Any]]:
    """The run's evaluation results of exactly these weights that have a `top1`, in the order of their file names."""
    if backbone.run_dir is None:
        return []
    folder = open_folder(backbone.run_dir / "eval" / backbone.label)
    results = [_read_json(folder, name) for name in sorted(folder.files()) if name.endswith(".json")]
    return [
        result
        for result in results
        if "top1" in result.get("metrics", {}) and result.get("model_digest") == backbone.digest
    ]


def table(rows: Mapping[str, str]) -> str:
    """Two columns without a head, in Markdown."""
    return "\n".join(["| | |", "|---|---|", *(f"| {label} | {text} |" for label, text in rows.items())])


def numbers(values: Sequence[float]) -> str:
    """Numbers as a list, such as "[0.5, 0.25]"."""
    return "[" + ", ".join(f"{value:g}" for value in values) + "]"


def channels_text(count: int) -> str:
    """A number of channels, such as "1 channel" or "3 channels"."""
    return f"{count} channel{'s' if count > 1 else ''}"


def parameters_text(model: nn.Module) -> str:
    """The size of a model, such as "85.80 M parameters"."""
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M parameters"


def _revision(run: Mapping[str, Any]) -> str:
    """The revision of the code, by the run's run.json."""
    git = (run.get("environment") or {}).get("git") or {}
    return f"{git['revision']}{' (with local changes)' if git.get('dirty') else ''}" if "revision" in git else UNKNOWN


def _read_json(folder: Folder, name: str) -> dict[str, Any]:
    """The object in a JSON file; empty when the file is missing or unreadable: a card is written without it."""
    try:
        loaded = json.loads(folder.read(name))
    except (OSError, json.JSONDecodeError):
        return {}
    return loaded if isinstance(loaded, dict) else {}
