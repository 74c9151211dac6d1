"""The line that a person watches: step, loss, samples/s, data wait, MFU and time left, on standard error.

On a terminal it is one live rich progress bar; elsewhere (a log file, torchrun's output) one plain line per log point.
"""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


class ProgressLine:
    """A context manager; only the main rank shows anything."""

    def __init__(self, name: str, *, enabled: bool) -> None:
        self.name = name
        self.total_steps: int | None = None
        """Optimizer steps of the whole run."""
        self.enabled = enabled
        self.console = Console(stderr=True)
        self._live: Progress | None = None
        if enabled and self.console.is_terminal:
            self._live = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.completed}/{task.total}  {task.fields[text]}"),
                console=self.console,
            )
            self._task = self._live.add_task(name, total=None, text="")

    def __enter__(self) -> ProgressLine:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, step: int, metrics: dict[str, float], seconds_left: float) -> None:
        """Shows the metrics of a log point."""
        if not self.enabled:
            return
        text = (
            f"loss {metrics['train/loss']:.5f}  {metrics['throughput/samples_per_s']:,.0f} samples/s  "
            f"data wait {100 * metrics['data/wait_fraction']:.1f}%  {_store(metrics)}"
            f"MFU {100 * metrics['throughput/mfu']:.1f}%  {_duration(seconds_left)} left"
        )
        if self._live is not None:
            self._live.update(self._task, total=self.total_steps, completed=step, text=text)
        else:
            print(f"{self.name}  {step}/{self.total_steps}  {text}", file=sys.stderr, flush=True)

    def say(self, message: str) -> None:
        """A line of its own, above the bar."""
        if self.enabled:
            self.console.print(message, highlight=False, markup=False, soft_wrap=True)


def _store(metrics: dict[str, float]) -> str:
    """What came from an object store, and how much of it out of the cache."""
    if "data/fetched_bytes_per_s" not in metrics:
        return ""
    cache = metrics.get("data/cache_hit_fraction")
    hits = "" if cache is None else f", cache {100 * cache:.0f}%"
    return f"fetched {metrics['data/fetched_bytes_per_s'] / 1e6:,.1f} MB/s{hits}  "


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
