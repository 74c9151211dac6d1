"""`tessera export`: a backbone for another library, compared with ours before it is published."""

from __future__ import annotations

import argparse
from pathlib import Path

from pretrain.checkpoint_store import place_of

HELP = "export a backbone to another library, after reloading it there and comparing the features"
EXAMPLES = """\
  tessera export runs/cifar10_tiny exports/cifar10_tiny --to timm
  tessera export runs/vit_base/checkpoints/step-00100000 exports/vit_base_ema --to timm --ema --pool avg
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=place_of, metavar="CHECKPOINT", help="checkpoint folder, run, or a weights file")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make; it must not exist")
    parser.add_argument("--to", choices=("timm",), required=True, help="the library that will load it")
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights")
    parser.add_argument(
        "--pool", choices=("token", "avg"), default="token", help="what the pooled feature is (default: class token)"
    )
    parser.add_argument("--arch", metavar="NAME", help="architecture of a weights file, e.g. vit_base_patch16_224")


def run(arguments: argparse.Namespace) -> dict[str, object]:
    from rich.console import Console

    from pretrain.evaluation.backbone import load_backbone
    from pretrain.export.timm import export_timm

    backbone = load_backbone(arguments.model, ema=arguments.ema, architecture=arguments.arch, verify=True)
    exported = export_timm(backbone, arguments.out, pool=arguments.pool)
    console = Console(stderr=True)
    console.print(f"[bold]exported[/] {backbone.label} to {exported.folder} as timm's {exported.architecture}")
    console.print(f"largest difference of any feature from ours: {exported.difference.absolute:.3g}", highlight=False)
    console.print(f'load it: timm.create_model("local-dir:{exported.folder}", pretrained=True)', highlight=False)
    return {
        "out": str(exported.folder),
        "to": arguments.to,
        "architecture": exported.architecture,
        "pool": arguments.pool,
        "weights": backbone.weights,
        "step": backbone.step,
        "max_difference": exported.difference.absolute,
        "model_digest": exported.digest,
    }
