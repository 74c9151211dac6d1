"""Run by torchrun in the tests: as several_runs.py, with samples whose loss is not a number.

usage: torchrun ... spoiled_runs.py CONFIG OVERRIDES.json BEGIN END      (global sample positions)
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import replace

from data_pipes.batch import Batch
from pretrain.objectives.base import Turn
from pretrain.objectives.image_mae import ImageMAEObjective
from tests.pretrain.several_runs import main


def spoil(begin: int, end: int) -> None:
    """Makes the loss of every batch that holds one of the positions [begin, end) not a number, in this process."""
    honest = ImageMAEObjective.turns

    def turns(self: ImageMAEObjective, batch: Batch, step: int) -> Iterator[Turn]:
        spoiled = bool(((batch.positions >= begin) & (batch.positions < end)).any())
        for turn in honest(self, batch, step):
            yield replace(turn, loss=turn.loss * math.nan) if spoiled else turn

    ImageMAEObjective.turns = turns  # type: ignore[method-assign]


if __name__ == "__main__":
    spoil(int(sys.argv[3]), int(sys.argv[4]))
    main()
