"""`tessera eval`: a suite of evaluations of a model, optionally beside those of the same model untrained."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

HELP = "evaluate a run, checkpoint, export folder or weights file: k-NN, probes, fine-tuning"
EXAMPLES = """\
  tessera eval runs/cifar10_tiny --suite configs/eval/quick.yaml --untrained
  tessera eval runs/vit_base/checkpoints/step-00100000 --suite configs/eval/imagenet.yaml --ema
  tessera eval mae_pretrain_vit_base.pth --arch vit_base_patch16_224 --suite configs/eval/imagenet.yaml \\
      train=/shards/imagenet/train test=/shards/imagenet/val
  tessera eval runs/digits --suite configs/eval/quick.yaml tasks.linear.settings.iterations=500
  tessera eval runs/motion_tiny --suite configs/eval/motion.yaml --untrained
  torchrun --nproc-per-node 8 --no-python tessera eval runs/vit_base --suite configs/eval/imagenet.yaml
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, the suite with its overrides, and which weights."""
    parser.add_argument("model", metavar="MODEL", help="run, checkpoint or export folder, or a weights file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the suite, e.g. test=FOLDER")
    parser.add_argument("--suite", type=Path, required=True, metavar="YAML", help="what to evaluate on which images")
    parser.add_argument("--untrained", action="store_true", help="evaluate the freshly initialised backbone as well")
    parser.add_argument("--ema", action="store_true", help="evaluate the moving average of the weights")
    parser.add_argument("--arch", metavar="NAME", help="architecture of a weights file, e.g. vit_base_patch16_224")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of the results (default: RUN/eval)")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="auto = the GPU where there is one")


def run(arguments: argparse.Namespace) -> dict[str, object]:
    """Evaluates the model with the suite of its kind.

    Raises:
        ValueError: a mistake in the arguments, the suite, the model or its data.
    """
    from launchers.commands.eval_tokenizer import evaluate_tokenizer_command
    from pretrain.weights.tokenizer import is_tokenizer

    evaluate = evaluate_tokenizer_command if is_tokenizer(arguments.model) else _evaluate_encoder
    return evaluate(arguments)


def _evaluate_encoder(arguments: argparse.Namespace) -> dict[str, object]:
    """Evaluates an encoder of images or clips."""
    from rich.console import Console

    from launchers.progress import print_files, progress_line
    from pretrain.config import load_typed
    from pretrain.evaluation.encoder.features import make_accelerator
    from pretrain.evaluation.encoder.suite import SuiteConfig, evaluate_backbone
    from pretrain.evaluation.results import save_results
    from pretrain.weights.backbone import load_backbone

    suite = load_typed(SuiteConfig, arguments.suite, arguments.overrides)
    backbones = [load_backbone(arguments.model, ema=arguments.ema, architecture=arguments.arch)]
    if arguments.untrained:
        backbones.append(load_backbone(arguments.model, untrained=True, architecture=arguments.arch))
    accelerator = make_accelerator(cpu=arguments.device == "cpu", precision=suite.precision)
    console = Console(stderr=True)
    records: list[dict[str, Any]] = []
    files: list[Path] = []
    with progress_line(console, visible=accelerator.is_main_process) as report:
        for backbone in backbones:
            results = evaluate_backbone(backbone, suite, accelerator, report=report)
            files += save_results(backbone, results, arguments.output)
            records += results
    accelerator.end_training()
    if not accelerator.is_main_process:
        return {}
    _print_table(console, records)
    print_files(console, files)
    summary: dict[str, object] = {"model": str(arguments.model), "label": backbones[0].label}
    for backbone, name in zip(backbones, ("trained", "untrained"), strict=False):
        own = [record for record in records if record["model"] == backbone.label]
        summary[name] = {f"{record['task']}_top1": record["metrics"]["top1"] for record in own}
    return summary | {"files": [str(path) for path in files], "results": records}


def _print_table(console: Console, records: list[dict[str, Any]]) -> None:
    """The figures, for people."""
    from rich.table import Table

    table = Table("model", "task", "top-1 %", "chosen", "train / test samples", "seconds")
    for record in records:
        table.add_row(
            record["model"],
            record["task"],
            f"{record['metrics']['top1']:.2f}",
            _chosen(record["selection"]),
            f"{record['num_train']:,} / {record['num_test']:,}",
            f"{record['seconds']['features']:.0f} + {record['seconds']['protocol']:.0f}",
        )
    console.print(table)


def _chosen(selection: dict[str, Any]) -> str:
    """The k, the head or the rule behind a figure, short enough for a table."""
    if "k" in selection:
        return f"k={selection['k']}"
    if "head" not in selection:
        return str(selection["by"])
    shown = {True: "yes", False: "no"}
    return " ".join(
        f"{name}={shown[value] if isinstance(value, bool) else format(value, 'g')}"
        for name, value in selection["head"].items()
    )
