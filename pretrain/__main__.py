"""`torchrun --nproc-per-node N -m pretrain CONFIG [key=value ...]`: one rank of a run; `tessera train` does the same.

Exit codes: 0 finished, or stopped on a signal after saving; 1 failed; 2 a mistake in the input.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="the run's YAML file, for example configs/demo/digits.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. train.steps=100 optim.clip_norm=1.0")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains; returns the run's summary. Raises ValueError for the user's mistakes."""
    from pretrain.config import load_config
    from pretrain.train import train

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    config = load_config(arguments.config, arguments.overrides)
    return train(config, config_path=arguments.config, overrides=arguments.overrides)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pretrain", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")
    arguments = parser.parse_args(argv)
    rank = int(os.environ.get("RANK", "0"))
    try:
        summary = run(arguments)
    except ValueError as error:
        print(f"error (rank {rank}): {error}", file=sys.stderr, flush=True)
        return 2
    if rank == 0:
        sentence = f"{summary['status']}: {summary['run']} at step {summary['step']}"
        print(json.dumps(summary) if arguments.json else sentence, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
