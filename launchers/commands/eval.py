"""`tessera eval`: a suite of evaluations of a model, optionally beside those of the same model untrained."""

from __future__ import annotations

import argparse
import os
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
    from rich.console import Console

    from launchers.progress import print_files, progress_line
    from pretrain.evaluate import evaluate

    console = Console(stderr=True)
    with progress_line(console, visible=int(os.environ.get("RANK", "0")) == 0) as report:
        found = evaluate(
            arguments.model,
            arguments.suite,
            arguments.overrides,
            ema=arguments.ema,
            untrained=arguments.untrained,
            architecture=arguments.arch,
            output=arguments.output,
            cpu=arguments.device == "cpu",
            report=report,
        )
    if not found.is_main:
        return {}
    (_print_measures if found.of_tokenizer else _print_table)(console, found.records)
    print_files(console, found.files)
    summary: dict[str, object] = {"model": str(arguments.model), "label": found.labels[0]}
    for label, name in zip(found.labels, ("trained", "untrained"), strict=False):
        own = [record for record in found.records if record["model"] == label]
        summary[name] = {key: value for record in own for key, value in _figures(record, found.of_tokenizer).items()}
    return summary | {"files": [str(path) for path in found.files], "results": found.records}


def _figures(record: dict[str, Any], everything: bool) -> dict[str, float]:
    """The figures of a record that the summary quotes: `top1` where there is one, else all; or everything."""
    metrics: dict[str, float] = record["metrics"]
    quoted = metrics if everything or "top1" not in metrics else {"top1": metrics["top1"]}
    return {f"{record['task']}_{name}": value for name, value in quoted.items()}


def _print_measures(console: Console, records: list[dict[str, Any]]) -> None:
    """The figures of a tokenizer, for people."""
    from rich.table import Table

    table = Table("model", "task", "protocol", "figures", "pictures")
    for record in records:
        table.add_row(
            record["model"], record["task"], record["protocol"], _shown(record["metrics"]), f"{record['num_test']:,}"
        )
    console.print(table)


def _shown(metrics: dict[str, float]) -> str:
    """Figures with their names, short enough for a table."""
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def _print_table(console: Console, records: list[dict[str, Any]]) -> None:
    """The figures, for people."""
    from rich.table import Table

    table = Table("model", "task", "top-1 %", "chosen", "train / test samples", "seconds")
    for record in records:
        metrics = record["metrics"]
        table.add_row(
            record["model"],
            record["task"],
            f"{metrics['top1']:.2f}" if "top1" in metrics else _shown(metrics),
            _chosen(record["selection"]),
            f"{record['num_train']:,} / {record['num_test']:,}",
            f"{record['seconds']['features']:.0f} + {record['seconds']['protocol']:.0f}",
        )
    console.print(table)


def _chosen(selection: dict[str, Any]) -> str:
    """The k, the head or the rule behind a figure, short enough for a table."""
    if "k" in selection:
        return f"k={selection['k']}"
    if not isinstance(selection.get("head"), dict):
        return str(selection.get("by", ""))
    shown = {True: "yes", False: "no"}
    return " ".join(
        f"{name}={shown[value] if isinstance(value, bool) else format(value, 'g')}"
        for name, value in selection["head"].items()
    )
