"""`tessera eval` where the model is a tokenizer: its suite, a table of figures, result files and journal points."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, cast


def evaluate_tokenizer_command(arguments: argparse.Namespace) -> dict[str, object]:
    """What `launchers/commands/eval.py` does for backbones, with the same arguments. Raises ValueError for options that
    tokenizers do not have.
    """
    from rich.console import Console
    from rich.progress import Progress

    from pretrain.evaluation.encoder.features import make_accelerator
    from pretrain.evaluation.results import journal_results, write_results
    from pretrain.evaluation.tokenizer.suite import evaluate_tokenizer, load_tokenizer_suite
    from pretrain.weights.backbone import Backbone
    from pretrain.weights.tokenizer import load_tokenizer

    if arguments.untrained or arguments.arch is not None:
        raise ValueError(f"{arguments.model} is a tokenizer: leave out --untrained and --arch")
    suite = load_tokenizer_suite(arguments.suite, arguments.overrides)
    tokenizer = load_tokenizer(arguments.model, ema=arguments.ema)
    accelerator = make_accelerator(cpu=arguments.device == "cpu", precision=suite.precision)
    console = Console(stderr=True)
    with Progress(console=console, disable=not accelerator.is_main_process, transient=True) as bar:
        line = bar.add_task("loading", total=None)
        records = evaluate_tokenizer(
            tokenizer,
            suite,
            accelerator,
            report=lambda what, done, total: bar.update(line, description=what, completed=done, total=total),
        )
    folder = arguments.output or (tokenizer.run_dir / "eval" if tokenizer.run_dir is not None else None)
    files = [] if folder is None else write_results(records, folder)
    journal_results(cast(Backbone, tokenizer), records)  # which has what is asked of a backbone there
    accelerator.end_training()
    if not accelerator.is_main_process:
        return {}
    _print_table(console, records, files)
    trained = {f"{record['task']}_{name}": value for record in records for name, value in record["metrics"].items()}
    return {
        "model": str(arguments.model),
        "label": tokenizer.label,
        "trained": trained,
        "files": [str(path) for path in files],
        "results": records,
    }


def _print_table(console: Any, records: list[dict[str, Any]], files: list[Path]) -> None:
    from rich.table import Table

    table = Table("model", "task", "protocol", "figures", "pictures")
    for record in records:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in record["metrics"].items())
        table.add_row(record["model"], record["task"], record["protocol"], figures, f"{record['num_test']:,}")
    console.print(table)
    for path in files:
        console.print(f"wrote {path}", highlight=False)
