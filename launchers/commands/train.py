"""`tessera train`: a run in this process, or one rank of it under torchrun."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console

from pretrain.__main__ import add_arguments as add_run_arguments
from pretrain.__main__ import run as run_training

HELP = "train a configuration, continuing from its newest checkpoint"
EXAMPLES = """\
  tessera train configs/demo/digits.yaml
  tessera train configs/mae/cifar10_tiny.yaml data.train=data/cifar10/train data.val=data/cifar10/val
  tessera train configs/mae/vit_large.yaml data.train=/shards/imagenet/train --dry-run --processes 8
  tessera train configs/dcae/f32c32/pipeline.yaml data.train=/shards/train phase1.train.epochs=20
  torchrun --nproc-per-node 8 -m pretrain configs/mae/vit_base.yaml data.train=/shards/imagenet/train
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `python -m pretrain`."""
    add_run_arguments(parser)


def run(arguments: argparse.Namespace) -> dict[str, object]:
    """Trains, or with --dry-run says what training would need."""
    summary = run_training(arguments)
    if arguments.json:
        return dict(summary)
    if arguments.dry_run:
        from pretrain.memory.dry_run import table

        for phase in summary.get("phases", [summary]):
            Console().print(table(phase))
    else:
        console = Console(file=sys.stderr)
        console.print(f"[bold]{summary['status']}[/] at step {summary['step']}, {summary['samples']:,} samples")
        console.print(f"checkpoint {summary['checkpoint']}", highlight=False)
        console.print(f"report     tessera report {summary['run']}", highlight=False)
    return dict(summary)
