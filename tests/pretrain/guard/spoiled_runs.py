"""What a rank does in the tests of the guard: as several_runs.py, with samples whose loss is not a number."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from data_pipes.batch import Batch
from pretrain.objectives.base import Turn
from pretrain.objectives.image_mae import ImageMAEObjective
from tests.pretrain import several_runs


def spoil(begin: int, end: int) -> None:
    """Makes the loss of every batch that holds one of the positions [begin, end) not a number, in this process."""
    honest = ImageMAEObjective.turns

    def turns(self: ImageMAEObjective, batch: Batch, step: int) -> Iterator[Turn]:
        spoiled = bool(((batch.positions >= begin) & (batch.positions < end)).any())
        for turn in honest(self, batch, step):
            yield replace(turn, loss=turn.loss * math.nan) if spoiled else turn

    ImageMAEObjective.turns = turns  # type: ignore[method-assign]


def main(config: str, runs: Sequence[Sequence[str]], begin: int, end: int) -> None:
    """begin, end: of the global sample positions that are spoiled."""
    spoil(begin, end)
    several_runs.main(config, runs)
