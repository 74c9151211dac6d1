"""`tessera report`: a run's folder -> one self-contained HTML page."""

import argparse
from pathlib import Path

HELP = "Write one self-contained page about a run: curves, reconstructions, evaluations, throughput, config, commands."
EXAMPLES = """\
tessera report runs/digits                     writes runs/digits/report.html; also for a running or crashed run
tessera report runs/digits --out digits.html   writes it elsewhere, for example to send it to somebody
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN and --out."""
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of the run, <output_dir>/<name>")
    parser.add_argument("--out", metavar="FILE", type=Path, help="where the page goes (default: RUN/report.html)")


def run(arguments: argparse.Namespace) -> dict[str, object]:
    """Writes the page of a run.

    Raises:
        FileNotFoundError: there is no folder RUN.
        ValueError: RUN is no run.
    """
    from rich.console import Console

    from pretrain.report.report import build_report

    page = build_report(arguments.run, arguments.out)
    size_bytes = page.stat().st_size
    Console(stderr=True).print(f"{page} ({size_bytes / 1e6:.2f} MB)", highlight=False, markup=False, soft_wrap=True)
    return {"report": str(page), "size_bytes": size_bytes}
