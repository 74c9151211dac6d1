"""The model card (README.md) of an export: what the weights are, where they come from, how to load them.

In: a `Backbone`, what was exported and how closely it was reproduced. Out: Markdown. It exists because weights without
provenance cannot be trusted or cited; all of it is read from the run, and what is not known is said to be unknown.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pretrain.checkpoint.folder import Folder
from pretrain.checkpoint.open_folder import open_folder
from pretrain.weights.backbone import Backbone

if TYPE_CHECKING:
    from pretrain.config import RunConfig

UNKNOWN = "not recorded"


class Origin(Protocol):
    """What a card tells of where weights come from: a `Backbone`, or a `LoadedTokenizer`."""

    @property
    def weights(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def step(self) -> int | None: ...
    @property
    def config(self) -> RunConfig | None: ...
    @property
    def checkpoint(self) -> Folder | None: ...
    @property
    def complete(self) -> Mapping[str, Any] | None: ...
    @property
    def run_dir(self) -> Path | None: ...


def model_card(
    backbone: Backbone,
    name: str,
    description: Mapping[str, Any],
    *,
    pool: str,
    max_difference: float,
    tolerance: float,
) -> str:
    """The README.md of an exported folder.

    Args:
        backbone: what was exported.
        name: the folder's name, used as title.
        description: the export's config.json.
        pool: `token` or `avg`.
        max_difference: largest absolute difference of timm's features from ours, as measured.
        tolerance: what was allowed, relative to the size of features larger than 1.
    """
    sections = [
        "---\nlibrary_name: timm\npipeline_tag: image-feature-extraction\ntags:\n- image-feature-extraction\n- timm\n"
        "- masked-autoencoder\n---",
        f"# {name}",
        _summary(backbone, pool),
        "## Use\n\n" + _snippets(name, description),
        "## Provenance\n\n" + _table(provenance(backbone)),
        "## Reproduction\n\n"
        "Reloaded with timm before publication, strictly and in both ways shown above. Largest absolute difference of "
        f"any feature (all tokens and pooled, random inputs, fp32): {max_difference:.3g}; allowed: {tolerance:.3g}, "
        "times the largest value where that exceeds 1.",
        "## Evaluation\n\n" + _evaluation(backbone),
        "## License\n\nNo license has been declared for these weights. Whoever publishes them states one here, with "
        "regard to the terms of the training images.",
    ]
    return "\n\n".join(sections) + "\n"


def provenance(backbone: Origin) -> dict[str, str]:
    """Where the weights come from, as label -> text; unknown entries say so."""
    complete = backbone.complete or {}
    run = _read_json(open_folder(backbone.run_dir), "run.json") if backbone.run_dir is not None else {}
    state = _read_json(backbone.checkpoint, "state.json") if backbone.checkpoint is not None else {}
    order = state.get("order") or {}
    position = complete.get("position")
    return {
        "run": backbone.config.name if backbone.config is not None else UNKNOWN,
        "run uid": str(complete.get("run_uid") or UNKNOWN),
        "weights": backbone.weights,
        "optimizer step": str(backbone.step) if backbone.step is not None else UNKNOWN,
        "samples seen": f"{position:,}" if isinstance(position, int) else UNKNOWN,
        "configuration sha256": str(complete.get("config_sha256") or UNKNOWN),
        "training data fingerprint": str(order.get("fingerprint") or UNKNOWN),
        "code revision": _revision(run),
        "checkpoint digest": str(complete.get("digest") or UNKNOWN),
        "weights sha256": backbone.digest,
        "imported from": Path(backbone.source).name if backbone.checkpoint is None else "no: trained by this run",
    }


def read_results(run_dir: Path, label: str) -> list[dict[str, Any]]:
    """The evaluation results of one model of a run, in the order of their file names."""
    folder = open_folder(run_dir / "eval" / label)
    return [_read_json(folder, name) for name in sorted(folder.files()) if name.endswith(".json")]


def _summary(backbone: Backbone, pool: str) -> str:
    config = backbone.model.config
    height, width = config.image_size
    patch = " x ".join(str(side) for side in config.patch_size)
    num_parameters = sum(parameter.numel() for parameter in backbone.model.parameters())
    pooled = "the class token" if pool == "token" else "the average of the patch tokens, normalised after averaging"
    pixels = f"{config.in_channels} channel{'s' if config.in_channels > 1 else ''} of {height} x {width} pixels"
    return (
        f"A vision transformer backbone without a head: width {config.width}, depth {config.depth}, {config.heads} "
        f"heads, patches of {patch} pixels, {num_parameters / 1e6:.2f} M parameters. Input: {pixels}, "
        f"in [0, 1], then normalised with mean {_numbers(backbone.mean)} and std "
        f"{_numbers(backbone.std)}. Pooled feature: {pooled}."
    )


def _snippets(name: str, description: Mapping[str, Any]) -> str:
    arguments = ", ".join(f"{key}={value!r}" for key, value in description["model_args"].items())
    return (
        "```python\nimport timm\n\n"
        f'model = timm.create_model("local-dir:{name}", pretrained=True).eval()\n'
        "features = model(images)                  # [B, D], pooled\n"
        "tokens = model.forward_features(images)   # [B, 1 + N, D], the class token first\n```\n\n"
        "or, without config.json:\n\n"
        "```python\nmodel = timm.create_model(\n"
        f'    "{description["architecture"]}", num_classes=0, checkpoint_path="{name}/model.safetensors",\n'
        f"    {arguments},\n).eval()\n```"
    )


def _evaluation(backbone: Backbone) -> str:
    results = read_results(backbone.run_dir, backbone.label) if backbone.run_dir is not None else []
    rows = [
        f"| {result['task']} | `{result['protocol']}` | {result['metrics']['top1']:.2f} | {result['num_test']:,} |"
        for result in results
        if "top1" in result.get("metrics", {}) and result.get("model_digest") == backbone.digest
    ]
    if not rows:
        return "No results of these weights were recorded when they were exported."
    return "\n".join(
        [
            "Frozen features; top-1 in percent.",
            "",
            "| task | protocol | top-1 | test images |",
            "|---|---|---|---|",
            *rows,
        ]
    )


def _revision(run: Mapping[str, Any]) -> str:
    git = (run.get("environment") or {}).get("git") or {}
    return f"{git['revision']}{' (with local changes)' if git.get('dirty') else ''}" if "revision" in git else UNKNOWN


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {label} | {text} |" for label, text in rows.items())])


def _numbers(values: Iterable[float]) -> str:
    return "[" + ", ".join(f"{value:g}" for value in values) + "]"


def _read_json(folder: Folder, name: str) -> dict[str, Any]:
    """The object in a JSON file; empty when the file is missing or unreadable: a card is written without it."""
    try:
        loaded = json.loads(folder.read(name))
    except (OSError, json.JSONDecodeError):
        return {}
    return loaded if isinstance(loaded, dict) else {}
