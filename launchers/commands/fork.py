"""`tessera fork`: a run of its own that begins at a checkpoint of another one."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "Make a run of its own from a checkpoint of another one, to continue it with other settings."
EXAMPLES = """\
tessera fork runs/digits runs/digits-long              from the newest checkpoint
tessera fork runs/digits runs/digits-hot --at 2000     from the checkpoint of step 2,000
tessera train runs/digits-hot/config.yaml optim.lr=1e-3
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN, NEW and --at."""
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of the run, <output_dir>/<name>")
    parser.add_argument("new", metavar="NEW", type=Path, help="folder of the new run; it must not exist")
    parser.add_argument("--at", type=int, metavar="STEP", help="of the checkpoint; default: the newest complete one")


def run(arguments: argparse.Namespace) -> dict[str, object]:
    """Makes the new run's folder.

    Raises:
        ValueError: RUN is no run or has no such checkpoint, or NEW exists.
    """
    from rich.console import Console

    from pretrain.fork import fork_run

    result = fork_run(arguments.run, arguments.new, at=arguments.at)
    console = Console(stderr=True)
    line = f"{result['run']} begins at step {result['step']} of {arguments.run}; tessera train {result['config']}"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    return result
