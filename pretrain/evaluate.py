"""Evaluates what a user names with a suite: the model's kind decides which suite that is.

In: a run, checkpoint, exported folder or weights file, and a suite's YAML. Out: records, written to files and into the
run's journal. It exists so that the command line and the Python interface do the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.config import load_typed
from pretrain.evaluation.encoder.features import Precision, make_accelerator
from pretrain.evaluation.encoder.subject import Report
from pretrain.evaluation.encoder.suite import SuiteConfig, evaluate_backbone
from pretrain.evaluation.results import save_results
from pretrain.evaluation.tokenizer.suite import TokenizerSuiteConfig, evaluate_tokenizer
from pretrain.weights.backbone import load_backbone
from pretrain.weights.tokenizer import is_tokenizer, load_tokenizer


@dataclass(frozen=True)
class Evaluation:
    """What was found."""

    labels: tuple[str, ...]
    """of the models: the one that was named, and then its untrained counterpart where that was asked for"""
    records: list[dict[str, Any]]
    """of `results.make_record`; empty off the main process"""
    files: list[Path]
    """that hold the records"""
    of_tokenizer: bool
    """whether the model is a tokenizer"""
    is_main: bool
    """whether this is the main process, which alone has results"""


def evaluate(
    where: str | Path,
    suite: Path | str | Mapping[str, Any],
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    ema: bool = False,
    untrained: bool = False,
    architecture: str | None = None,
    output: Path | None = None,
    cpu: bool = False,
    report: Report | None = None,
) -> Evaluation:
    """Evaluates a model on every task of a suite. Under torchrun all processes call this.

    Args:
        where: run, checkpoint, exported folder, or a weights file.
        suite: YAML file, or its content.
        overrides: changes to the suite, see `load_typed`.
        ema: the moving average of the weights.
        untrained: the freshly initialised backbone as well; not for tokenizers.
        architecture: of a weights file.
        output: folder of the results; None: `eval` in the run's folder.
        cpu: use no GPU.
        report: called now and then, see `Report`.

    Raises:
        FileNotFoundError: nothing at `where`.
        ValueError: a mistake in the arguments, the suite, the model or its data.
    """
    if is_tokenizer(where):
        if untrained or architecture is not None:
            raise ValueError(f"{where} is a tokenizer: leave out --untrained and --arch")
        measures = load_typed(TokenizerSuiteConfig, suite, overrides)
        tokenizer = load_tokenizer(where, ema=ema)
        with _accelerator(cpu, measures.precision) as accelerator:
            records = evaluate_tokenizer(tokenizer, measures, accelerator, report=report)
            files = save_results(tokenizer, records, output)
            return Evaluation((tokenizer.label,), records, files, True, bool(accelerator.is_main_process))
    probes = load_typed(SuiteConfig, suite, overrides)
    backbones = [load_backbone(where, ema=ema, architecture=architecture)]
    if untrained:
        backbones.append(load_backbone(where, untrained=True, architecture=architecture))
    records, files = [], []
    with _accelerator(cpu, probes.precision) as accelerator:
        for backbone in backbones:
            results = evaluate_backbone(backbone, probes, accelerator, report=report)
            files += save_results(backbone, results, output)
            records += results
        labels = tuple(backbone.label for backbone in backbones)
        return Evaluation(labels, records, files, False, bool(accelerator.is_main_process))


@contextmanager
def _accelerator(cpu: bool, precision: Precision) -> Iterator[Any]:
    """An accelerator; afterwards a process alone forgets it, so that the next one may have another precision or device.

    Processes that belong together stay together.
    """
    from accelerate.state import AcceleratorState, PartialState

    alone = not PartialState._shared_state and int(os.environ.get("WORLD_SIZE", "1")) == 1
    accelerator = make_accelerator(cpu=cpu, precision=precision)
    try:
        yield accelerator
        accelerator.end_training()
    finally:
        if alone:
            AcceleratorState._reset_state(reset_partial_state=True)
