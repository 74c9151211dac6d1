"""`tessera export`: a model for another library, compared with ours before it is published."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from pretrain.export.original import OriginalExport
    from pretrain.weights.backbone import Backbone
    from pretrain.weights.tokenizer import LoadedTokenizer

TARGETS = ("timm", "transformers", "diffusers", "onnx", "original")
"""What `--to` takes."""
HELP = "export a model to another library, after reloading it there and comparing the results"
EXAMPLES = """\
  tessera export runs/cifar10_tiny exports/cifar10_tiny --to timm
  tessera export runs/vit_base/checkpoints/step-00100000 exports/vit_base_ema --to timm --ema --pool avg
  tessera export runs/videomae_base exports/videomae_base --to transformers --pretraining
  tessera export runs/dcae_f32c32-phase3 exports/dcae --to diffusers --ema --scaling-factor 0.41
  tessera export runs/dcae_f32c32-phase3 exports/dcae_onnx --to onnx --ema
  tessera export runs/mae_vit_base exports/mae_original --to original --ema

timm: backbones of images. transformers: ViTModel or VideoMAEModel, with --pretraining the decoder too. diffusers: DC-AE
as AutoencoderDC. onnx: backbones, and tokenizers as encoder.onnx and decoder.onnx. original: model.pth in the layout of
the authors of MAE, VideoMAE, MAE-ST or DC-AE, decoder included, for their own scripts. What cannot be expressed is
refused.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CHECKPOINT, OUT, the target, and its options."""
    parser.add_argument("model", metavar="CHECKPOINT", help="checkpoint folder, run, or a weights file")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make; it must not exist")
    parser.add_argument("--to", choices=TARGETS, required=True, help="the library, or whose code, that will load it")
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights")
    parser.add_argument(
        "--pool", choices=("token", "avg"), help="timm: the pooled feature (default: token, the class's)"
    )
    parser.add_argument("--pretraining", action="store_true", help="transformers: with the decoder, of a checkpoint")
    parser.add_argument("--scaling-factor", type=float, metavar="F", help="diffusers: 1 / RMS of the latents")
    parser.add_argument(
        "--size", nargs=2, type=int, metavar=("H", "W"), help="onnx: the one size of a tokenizer that needs one"
    )
    parser.add_argument("--arch", metavar="NAME", help="architecture of a weights file, e.g. vit_base_patch16_224")


def run(arguments: argparse.Namespace) -> dict[str, object]:
    """Exports a model.

    Raises:
        ValueError: the target cannot express the model, or options do not fit it.
        OSError: something is at OUT, or nothing at CHECKPOINT.
    """
    from rich.console import Console

    from pretrain.weights.tokenizer import is_tokenizer

    _check_options(arguments)
    tokenizer = is_tokenizer(arguments.model)
    if tokenizer != (arguments.to == "diffusers") and arguments.to not in ("onnx", "original"):
        kind, targets = (
            ("a tokenizer", "diffusers, onnx or original")
            if tokenizer
            else ("no tokenizer", "timm, transformers, onnx or original")
        )
        raise ValueError(f"{arguments.model} is {kind}: export it --to {targets}")
    console = Console(stderr=True)
    return (_export_tokenizer if tokenizer else _export_backbone)(arguments, console)


def _check_options(arguments: argparse.Namespace) -> None:
    """Refuses options of another target.

    Raises:
        ValueError: there is one.
    """
    owners = {"pool": "timm", "pretraining": "transformers", "scaling_factor": "diffusers", "size": "onnx"}
    for name, target in owners.items():
        if getattr(arguments, name) and arguments.to != target:
            raise ValueError(f"--{name.replace('_', '-')} goes with --to {target}; found --to {arguments.to}")


def _export_tokenizer(arguments: argparse.Namespace, console: Console) -> dict[str, object]:
    """Exports a tokenizer, and gives what `run` does."""
    from pretrain.export.diffusers import export_diffusers
    from pretrain.export.onnx_models import export_tokenizer_onnx
    from pretrain.export.original import export_original
    from pretrain.weights.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(arguments.model, ema=arguments.ema, verify=True)
    summary: dict[str, object]
    if arguments.to == "diffusers":
        exported = export_diffusers(tokenizer, arguments.out, scaling_factor=arguments.scaling_factor)
        summary = {
            "scaling_factor": exported.scaling_factor,
            "latent_error": exported.latent_error,
            "reconstruction_error": exported.reconstruction_error,
        }
        hint = f'diffusers.AutoencoderDC.from_pretrained("{arguments.out}")'
    elif arguments.to == "original":
        summary, hint = _about_original(export_original(tokenizer, arguments.out))
    else:
        size = tuple(arguments.size) if arguments.size else None
        graphs = export_tokenizer_onnx(tokenizer, arguments.out, size=size)
        summary = {"errors": dict(graphs.errors), "files": list(graphs.files)}
        hint = f'onnxruntime.InferenceSession("{arguments.out}/encoder.onnx")'
    return _finish(tokenizer, summary, hint, arguments, console)


def _export_backbone(arguments: argparse.Namespace, console: Console) -> dict[str, object]:
    """Exports an encoder of images or clips, and gives what `run` does."""
    from pretrain.export.onnx_models import export_backbone_onnx
    from pretrain.export.original import export_original
    from pretrain.export.timm import Pool, export_timm
    from pretrain.export.transformers_image import export_vit
    from pretrain.export.transformers_video import export_videomae
    from pretrain.models.video_vit import VideoViT
    from pretrain.weights.backbone import load_backbone

    backbone = load_backbone(arguments.model, ema=arguments.ema, architecture=arguments.arch, verify=True)
    summary: dict[str, object]
    if arguments.to == "timm":
        pool: Pool = arguments.pool or "token"
        ours = export_timm(backbone, arguments.out, pool=pool)
        summary = {"architecture": ours.architecture, "pool": pool, "max_difference": ours.difference.absolute}
        hint = f'timm.create_model("local-dir:{ours.folder}", pretrained=True)'
    elif arguments.to == "transformers":
        export = export_videomae if isinstance(backbone.model, VideoViT) else export_vit
        theirs = export(backbone, arguments.out, pretraining=arguments.pretraining)
        summary = {"architecture": theirs.architecture, "errors": theirs.errors}
        hint = f'transformers.{theirs.architecture}.from_pretrained("{theirs.folder}")'
    elif arguments.to == "original":
        summary, hint = _about_original(export_original(backbone, arguments.out))
    else:
        graphs = export_backbone_onnx(backbone, arguments.out)
        summary = {"errors": dict(graphs.errors), "files": list(graphs.files)}
        hint = f'onnxruntime.InferenceSession("{arguments.out}/{graphs.files[0]}")'
    return _finish(backbone, summary, hint, arguments, console)


def _about_original(exported: OriginalExport) -> tuple[dict[str, object], str]:
    """What the summary says, and how to load it."""
    from pretrain.export.original import ENTRIES, ORIGINAL_WEIGHTS

    path, entry = exported.folder / ORIGINAL_WEIGHTS, ENTRIES[exported.layout]
    hint = f'torch.load("{path}", weights_only=True)["{entry}"]; README.md has the model\'s arguments'
    return {"layout": exported.layout, "errors": exported.errors}, hint


def _finish(
    model: Backbone | LoadedTokenizer,
    summary: dict[str, object],
    hint: str,
    arguments: argparse.Namespace,
    console: Console,
) -> dict[str, object]:
    """Says what was done, and how to load it.

    Args:
        model: what was exported.
        summary: what the target's exporter says of it.
        hint: the line that loads it.
        arguments: of the command.
        console: on stderr.

    Returns:
        The whole summary.
    """
    console.print(f"[bold]exported[/] {model.label} to {arguments.out}; differences from ours: {_errors(summary)}")
    console.print(f"load it: {hint}", highlight=False)
    return {
        "out": str(arguments.out),
        "to": arguments.to,
        "weights": model.weights,
        "step": model.step,
        "model_digest": model.digest,
        **summary,
    }


def _errors(summary: dict[str, object]) -> str:
    """The figures of a summary that are errors, as text."""
    found = summary.get("errors") or {name: value for name, value in summary.items() if isinstance(value, float)}
    assert isinstance(found, dict)
    return ", ".join(f"{name} {value:.2g}" for name, value in found.items() if name != "scaling_factor")
