"""Training from Python: a run to its end, or to its next stop, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.config import RunConfig


@dataclass(frozen=True)
class TrainingResult:
    """What a run has come to."""

    run_dir: Path
    """Its folder, which `load_backbone`, `load_tokenizer`, `evaluate` and `export` take."""
    status: str
    """finished, or stopped: a signal (in a notebook: an interrupt) arrived, and the run can be continued."""
    step: int
    """Optimizer steps done, over all starts."""
    samples: int
    """Samples consumed, over all ranks and starts."""
    checkpoint: str
    """Folder or URL of the newest checkpoint."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The newest value of every metric in the journal, such as "train/loss" and "val/loss"."""
    summary: dict[str, Any] = field(default_factory=dict)
    """What the command line prints with --json."""


def train(config: RunConfig) -> TrainingResult:
    """Trains in this process, or as one rank of those that torchrun started.

    Continues from the run's newest complete checkpoint where there is one; the same call again goes on. An interrupt
    saves and returns with the status "stopped"; a second one raises KeyboardInterrupt. Signal handlers are as before
    when it returns. Where the process is alone, no watchdog ends it when a step hangs, whatever `watchdog` says.

    Args:
        config: of `load_config`.

    Raises:
        ValueError: a mistake in the configuration or the data.
        OSError: the run's folder cannot be written.
    """
    from pretrain.parallel.launch import Launch
    from pretrain.tracking.journal import read_metrics
    from pretrain.train import train as run

    alone = not Launch.from_environment().by_torchrun
    summary = run(config, config_path=config.run_dir / "config.yaml", may_exit=not alone)
    newest = {name: points[-1].value for name, points in read_metrics(config.run_dir).items() if points}
    return TrainingResult(
        run_dir=config.run_dir,
        status=summary["status"],
        step=summary["step"],
        samples=summary["samples"],
        checkpoint=str(summary["checkpoint"]),
        metrics=newest,
        summary=summary,
    )
