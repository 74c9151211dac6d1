"""Exports what a user names to what a user names: a library of this package's list, or somebody's own target.

In: a run, checkpoint or weights file, and a target. Out: a new folder, and what the target says of it. It exists so
that the command line and the Python interface do the same, and that a target of others is a function and nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.config import nearest
from pretrain.export.card import compose_card, provenance, table
from pretrain.export.publish import publish
from pretrain.extensions import EXPORTERS_GROUP, extension_names, find_extension
from pretrain.weights.backbone import Backbone, load_backbone
from pretrain.weights.tokenizer import LoadedTokenizer, is_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from pretrain.export.onnx import OnnxExport
    from pretrain.export.original import OriginalExport

Exporter = Callable[..., Mapping[str, object] | None]
"""A target of others, called as `export(model, folder, **options)`: it writes the `Backbone` or `LoadedTokenizer` into
the empty folder, and returns what is to be said of it, such as {"errors": {"features": 1e-7}}; None: nothing. A
ValueError says why the target cannot express this model. The folder appears under its name when it returns; without a
README.md of its own it gets one with the weights' provenance."""
TARGETS = ("timm", "transformers", "diffusers", "onnx", "original")
"""The targets of this package."""
OPTIONS = {"pool": "timm", "pretraining": "transformers", "scaling_factor": "diffusers", "size": "onnx"}
"""Option -> the target that has it."""


@dataclass(frozen=True)
class Exported:
    """What was published."""

    folder: Path
    """where it is"""
    model: Backbone | LoadedTokenizer
    """what was exported"""
    summary: dict[str, object]
    """what the target says of it, e.g. "errors" """
    hint: str
    """the line that loads it"""


def export_model(
    where: str | Path, out: Path, to: str, *, ema: bool = False, architecture: str | None = None, **options: Any
) -> Exported:
    """Exports a model into the new folder `out`.

    Args:
        where: run, checkpoint, or a weights file.
        out: must not exist; it appears whole or not at all.
        to: one of TARGETS, an entry point of `tessera.exporters`, or an import path.
        ema: the moving average of the weights.
        architecture: of a weights file.
        options: the target's own, see OPTIONS; those of a target of others go to its function.

    Raises:
        FileNotFoundError: nothing at `where`.
        FileExistsError: something is at `out`.
        ValueError: there is no such target, it cannot express the model, or options do not fit it.
    """
    own = None if to in TARGETS else _find_exporter(to)
    if own is None:
        _check_options(to, options)
    tokenizer = is_tokenizer(where)
    if own is None and tokenizer != (to == "diffusers") and to not in ("onnx", "original"):
        kind, targets = (
            ("a tokenizer", "diffusers, onnx or original")
            if tokenizer
            else ("no tokenizer", "timm, transformers, onnx or original")
        )
        raise ValueError(f"{where} is {kind}: export it --to {targets}")
    if tokenizer:
        if architecture is not None:
            raise ValueError(f"{where} is a tokenizer, which knows its architecture: leave --arch out")
        autoencoder = load_tokenizer(where, ema=ema, verify=True)
        summary, hint = (
            _export_own(own, autoencoder, out, options) if own else _export_tokenizer(autoencoder, out, to, options)
        )
        return Exported(out, autoencoder, summary, hint)
    backbone = load_backbone(where, ema=ema, architecture=architecture, verify=True)
    summary, hint = _export_own(own, backbone, out, options) if own else _export_backbone(backbone, out, to, options)
    return Exported(out, backbone, summary, hint)


def _find_exporter(to: str) -> Exporter:
    """The function that an import path or an entry point names.

    Raises:
        ValueError: there is none.
    """
    found = find_extension(to, EXPORTERS_GROUP, "the export's target")
    if found is None:
        known = [*TARGETS, *extension_names(EXPORTERS_GROUP)]
        raise ValueError(
            f"the export's target is {to!r}; known targets: {', '.join(known)}{nearest(to, known)}, or an import path "
            "such as my_package.my_module:export"
        )
    if not callable(found):
        raise ValueError(
            f"the export's target is {to!r}, which is a {type(found).__name__}; expected a function (model, folder)"
        )
    exporter: Exporter = found
    return exporter


def _check_options(to: str, options: Mapping[str, Any]) -> None:
    """Refuses options of another target.

    Raises:
        ValueError: there is one.
    """
    for name, value in options.items():
        if name not in OPTIONS:
            raise ValueError(f"there is no option {name!r} of --to {to}{nearest(name, list(OPTIONS))}")
        if value and to != OPTIONS[name]:
            raise ValueError(f"--{name.replace('_', '-')} goes with --to {OPTIONS[name]}; found --to {to}")


def _export_own(
    export: Exporter, model: Backbone | LoadedTokenizer, out: Path, options: Mapping[str, Any]
) -> tuple[dict[str, object], str]:
    """Publishes what a function of others writes."""
    with publish(out) as partial:
        said = export(model, partial, **options)
        if said is not None and not isinstance(said, Mapping):
            raise ValueError(
                f"the export's target gave a {type(said).__name__}; expected a mapping of figures, or None"
            )
        files = sorted(path.relative_to(partial).as_posix() for path in partial.rglob("*") if path.is_file())
        if not files:
            raise ValueError("the export's target wrote no file")
        if "README.md" not in files:
            summary = f"Weights of a {type(model.model).__name__}, in files of a layout of its own: {', '.join(files)}."
            sections = {"Provenance": table(provenance(model))}
            (partial / "README.md").write_text(compose_card(out.name, ("vision",), summary, sections))
    return {"files": files, **(said or {})}, ", ".join(str(out / name) for name in files)


def _export_tokenizer(
    tokenizer: LoadedTokenizer, out: Path, to: str, options: Mapping[str, Any]
) -> tuple[dict[str, object], str]:
    """Exports a tokenizer; gives what is said of it, and the line that loads it."""
    from pretrain.export.diffusers import export_diffusers
    from pretrain.export.onnx_models import export_tokenizer_onnx
    from pretrain.export.original import export_original

    if to == "diffusers":
        exported = export_diffusers(tokenizer, out, scaling_factor=options.get("scaling_factor"))
        return {
            "scaling_factor": exported.scaling_factor,
            "latent_error": exported.latent_error,
            "reconstruction_error": exported.reconstruction_error,
            "pictures": dict(exported.pictures),
        }, f'diffusers.AutoencoderDC.from_pretrained("{out}")'
    if to == "original":
        return _about_original(export_original(tokenizer, out))
    size = options.get("size")
    graphs = export_tokenizer_onnx(tokenizer, out, size=tuple(size) if size else None)
    return _about_graphs(graphs), f'onnxruntime.InferenceSession("{out}/encoder.onnx")'


def _export_backbone(
    backbone: Backbone, out: Path, to: str, options: Mapping[str, Any]
) -> tuple[dict[str, object], str]:
    """Exports an encoder of images or clips; gives what is said of it, and the line that loads it."""
    from pretrain.export.onnx_models import export_backbone_onnx
    from pretrain.export.original import export_original
    from pretrain.export.timm import Pool, export_timm
    from pretrain.export.transformers_image import export_vit
    from pretrain.export.transformers_video import export_videomae
    from pretrain.models.video_vit import VideoViT

    if to == "timm":
        pool: Pool = options.get("pool") or "token"
        ours = export_timm(backbone, out, pool=pool)
        return {
            "architecture": ours.architecture,
            "pool": pool,
            "max_difference": ours.difference.absolute,
            "pictures": dict(ours.pictures),
            "one_pixel_beside": ours.shifted,
        }, f'timm.create_model("local-dir:{ours.folder}", pretrained=True)'
    if to == "transformers":
        export = export_videomae if isinstance(backbone.model, VideoViT) else export_vit
        theirs = export(backbone, out, pretraining=bool(options.get("pretraining")))
        hint = f'transformers.{theirs.architecture}.from_pretrained("{theirs.folder}")'
        compared = dict(theirs.pictures) or "not compared: the library's processor takes 1 or 3 channels"
        return {"architecture": theirs.architecture, "errors": theirs.errors, "pictures": compared}, hint
    if to == "original":
        return _about_original(export_original(backbone, out))
    graphs = export_backbone_onnx(backbone, out)
    return _about_graphs(graphs), f'onnxruntime.InferenceSession("{out}/{graphs.files[0]}")'


def _about_graphs(graphs: OnnxExport) -> dict[str, object]:
    """What the summary says of ONNX graphs."""
    return {"errors": dict(graphs.errors), "pictures": dict(graphs.pictures), "files": list(graphs.files)}


def _about_original(exported: OriginalExport) -> tuple[dict[str, object], str]:
    """What the summary says, and how to load it."""
    from pretrain.export.original import ENTRIES, ORIGINAL_WEIGHTS

    path, entry = exported.folder / ORIGINAL_WEIGHTS, ENTRIES[exported.layout]
    hint = f'torch.load("{path}", weights_only=True)["{entry}"]; README.md has the model\'s arguments'
    return {"layout": exported.layout, "errors": exported.errors}, hint
