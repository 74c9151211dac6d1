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

from data_pipes.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `tessera train` and `python -m pretrain` take."""
    parser.add_argument("config", type=Path, help="a run's or pipeline's YAML file, e.g. configs/demo/digits.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. train.steps=100 optim.clip_norm=1.0")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print memory per rank, start nothing")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="of the run that --dry-run plans")
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS
    )  # DeepSpeed's launcher gives it
    parser.add_argument("--processes-per-node", type=int, metavar="N", help="with --dry-run; default: all of them")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains, or plans with --dry-run; returns the summary.

    Raises:
        ValueError: a mistake of the user's.
    """
    from pretrain.config import load_config
    from pretrain.parallel.launch import Launch
    from pretrain.phases import is_pipeline, load_pipeline

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if not arguments.dry_run and (arguments.processes != 1 or arguments.processes_per_node is not None):
        raise ValueError("--processes belongs to --dry-run; processes are started by torchrun --nproc-per-node N")
    if not arguments.dry_run:
        Launch.from_environment()
    # All of the configuration is read, and its mistakes are found, before torch is imported.
    if is_pipeline(arguments.config):
        phases = load_pipeline(arguments.config, arguments.overrides)

        from pretrain.pipeline import dry_run_pipeline, run_pipeline

        if arguments.dry_run:
            return {"phases": dry_run_pipeline(phases, arguments.processes, arguments.processes_per_node)}
        return run_pipeline(phases)
    config = load_config(arguments.config, arguments.overrides)
    if arguments.dry_run:
        from pretrain.memory.dry_run import dry_run

        return dry_run(config, arguments.processes, arguments.processes_per_node)
    from pretrain.train import train

    return train(config, config_path=arguments.config, overrides=arguments.overrides)


def main(argv: Sequence[str] | None = None) -> int:
    """One rank of a run; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pretrain", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")
    arguments = parser.parse_args(argv)
    rank = os.environ.get("RANK", "0")
    try:
        summary = run(arguments)
    except (ValueError, OSError, ImportError, UserError) as error:
        print(f"error (rank {rank}): {error}", file=sys.stderr, flush=True)
        return 2
    if rank != "0":
        return 0
    if arguments.json:
        print(json.dumps(summary), flush=True)
    elif arguments.dry_run:
        from rich.console import Console

        from pretrain.memory.dry_run import table

        for phase in summary.get("phases", [summary]):
            Console().print(table(phase))
    else:
        print(f"{summary['status']}: {summary['run']} at step {summary['step']}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
