"""`tessera export`: a model for another library, compared with ours before it is published."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "export a model to another library, after reloading it there and comparing the results"
EXAMPLES = """\
  tessera export runs/cifar10_tiny exports/cifar10_tiny --to timm
  tessera export runs/vit_base/checkpoints/step-00100000 exports/vit_base_ema --to timm --ema --pool avg
  tessera export runs/videomae_base exports/videomae_base --to transformers --pretraining
  tessera export runs/dcae_f32c32-phase3 exports/dcae --to diffusers --ema --scaling-factor 0.41
  tessera export runs/dcae_f32c32-phase3 exports/dcae_onnx --to onnx --ema
  tessera export runs/mae_vit_base exports/mae_original --to original --ema
  tessera export runs/mine exports/mine --to my_package.my_module:export half=true

timm: backbones of images. transformers: ViTModel or VideoMAEModel, with --pretraining the decoder too. diffusers: DC-AE
as AutoencoderDC. onnx: backbones, and tokenizers as encoder.onnx and decoder.onnx. original: model.pth in the layout of
the authors of MAE, VideoMAE, MAE-ST or DC-AE, decoder included, for their own scripts. A target of
your own is a function (model, folder, **options), named by its import path or as an entry point of the group
tessera.exporters. What cannot be expressed is refused.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CHECKPOINT, OUT, the target, and its options."""
    parser.add_argument("model", metavar="CHECKPOINT", help="checkpoint folder, run, or a weights file")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make; it must not exist")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options of a target of your own")
    parser.add_argument(
        "--to",
        required=True,
        metavar="TARGET",
        help="who will load it: timm, transformers, diffusers, onnx, original, or an import path",
    )
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

    from pretrain.export.targets import OPTIONS, TARGETS, export_model

    options = {name: value for name in OPTIONS if (value := getattr(arguments, name))}
    if arguments.overrides:
        if arguments.to in TARGETS:
            raise ValueError(f"{arguments.overrides[0]!r} goes with a target of your own; found --to {arguments.to}")
        options |= _own_options(arguments.overrides)
    exported = export_model(
        arguments.model, arguments.out, arguments.to, ema=arguments.ema, architecture=arguments.arch, **options
    )
    model, console = exported.model, Console(stderr=True)
    differences = ", ".join(filter(None, (_errors(exported.summary), _pictures(exported.summary))))
    differences = differences or "not compared by this target"
    console.print(f"[bold]exported[/] {model.label} to {arguments.out}; differences from ours: {differences}")
    console.print(f"load it: {exported.hint}", highlight=False)
    return {
        "out": str(arguments.out),
        "to": arguments.to,
        "weights": model.weights,
        "step": model.step,
        "model_digest": model.digest,
        **exported.summary,
    }


def _own_options(overrides: list[str]) -> dict[str, object]:
    """The `key=value` arguments of a target of one's own, with values as YAML has them."""
    from pretrain.yaml_values import parse_override, plain_values, set_value

    options: dict[str, object] = {}
    for override in overrides:
        key, _, text = override.partition("=")
        set_value(options, key, plain_values(parse_override(text), lossless=False))
    return options


def _pictures(summary: dict[str, object]) -> str:
    """The largest difference of the pixels of pictures that were compared from the file on, as text, or nothing."""
    found = summary.get("pictures")
    levels = [errors["pixels"] for errors in found.values() if "pixels" in errors] if isinstance(found, dict) else []
    return f"pictures from the file on {max(levels):.2g} of 255 levels" if levels else ""


def _errors(summary: dict[str, object]) -> str:
    """The figures of a summary that are errors, as text; empty where there are none."""
    found = summary.get("errors") or {name: value for name, value in summary.items() if isinstance(value, float)}
    figures = found if isinstance(found, dict) else {}
    return ", ".join(f"{name} {value:.2g}" for name, value in figures.items() if name != "scaling_factor")
