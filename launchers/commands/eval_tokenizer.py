"""`tessera eval` where the model is a tokenizer: its suite, a table of figures, result files and journal points."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def evaluate_tokenizer_command(arguments: argparse.Namespace) -> dict[str, object]:
    """Evaluates a tokenizer, with the arguments of `launchers/commands/eval.py`.

    Raises:
        ValueError: options that tokenizers do not have, or a mistake in the suite, the model or its data.
    """
    from rich.console import Console

    from launchers.progress import print_files, progress_line
    from pretrain.config import load_typed
    from pretrain.evaluation.encoder.features import make_accelerator
    from pretrain.evaluation.results import save_results
    from pretrain.evaluation.tokenizer.suite import TokenizerSuiteConfig, evaluate_tokenizer
    from pretrain.weights.tokenizer import load_tokenizer

    if arguments.untrained or arguments.arch is not None:
        raise ValueError(f"{arguments.model} is a tokenizer: leave out --untrained and --arch")
    suite = load_typed(TokenizerSuiteConfig, arguments.suite, arguments.overrides)
    tokenizer = load_tokenizer(arguments.model, ema=arguments.ema)
    accelerator = make_accelerator(cpu=arguments.device == "cpu", precision=suite.precision)
    console = Console(stderr=True)
    with progress_line(console, visible=accelerator.is_main_process) as report:
        records = evaluate_tokenizer(tokenizer, suite, accelerator, report=report)
    files = save_results(tokenizer, records, arguments.output)
    accelerator.end_training()
    if not accelerator.is_main_process:
        return {}
    _print_table(console, records)
    print_files(console, files)
    trained = {f"{record['task']}_{name}": value for record in records for name, value in record["metrics"].items()}
    return {
        "model": str(arguments.model),
        "label": tokenizer.label,
        "trained": trained,
        "files": [str(path) for path in files],
        "results": records,
    }


def _print_table(console: Console, records: list[dict[str, Any]]) -> None:
    """The figures, for people."""
    from rich.table import Table

    table = Table("model", "task", "protocol", "figures", "pictures")
    for record in records:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in record["metrics"].items())
        table.add_row(record["model"], record["task"], record["protocol"], figures, f"{record['num_test']:,}")
    console.print(table)
