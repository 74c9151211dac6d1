"""The progress bars of the commands, on stderr and only on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class RateColumn(ProgressColumn):
    """Completed units per second."""

    def __init__(self, unit: str) -> None:
        """The unit is a plural, such as "pictures"."""
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        """What stands in the column."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} {self._unit}/s")


def progress_bar(console: Console, unit: str) -> Progress:
    """A bar with count, rate and time left; silent where stderr is no terminal.

    Args:
        console: on stderr.
        unit: what is counted, a plural such as "pictures".
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        RateColumn(unit),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)


@contextmanager
def progress_line(console: Console, *, visible: bool) -> Iterator[Callable[[str, int, int], None]]:
    """One bar for work of several parts; it goes when the work is done.

    Args:
        console: on stderr.
        visible: False shows nothing, as for processes other than the main one.

    Yields:
        What is called with (what is being done, how much of it is done, how much there is in all).
    """
    with Progress(console=console, disable=not visible, transient=True) as bar:
        line = bar.add_task("loading", total=None)
        yield lambda what, done, total: bar.update(line, description=what, completed=done, total=total)


def print_files(console: Console, files: list[Path]) -> None:
    """Says where the results are."""
    for path in files:
        console.print(f"wrote {path}", highlight=False)
