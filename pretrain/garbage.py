"""Garbage collection at chosen steps instead of at chance ones.

Enters: steps. Leaves: collections. Python collects after so many allocations, at another moment on each rank; in a step
with collectives all ranks then wait for the one that collects. Here all collect after the same steps, and what is alive
after the first step (the model, compiled code) is never looked at again.
"""

from __future__ import annotations

import gc
from types import TracebackType


class ScheduledGC:
    """A context manager: inside, the automatic collection is off, and `after_step` collects.

    A loop that makes no reference cycles frees its tensors by reference counts; the collections are for those that do.
    """

    def __init__(self, every_steps: int) -> None:
        """Collects nothing yet.

        Args:
            every_steps: optimizer steps between collections, the same on all ranks; 0 leaves Python's automatic
                collection on.

        Raises:
            ValueError: `every_steps` is negative.
        """
        if every_steps < 0:
            raise ValueError(f"the steps between garbage collections are {every_steps}; expected 0 (automatic) or more")
        self.every_steps = every_steps
        self._was_enabled = False
        self._num_steps = 0

    def __enter__(self) -> ScheduledGC:
        self._was_enabled, self._num_steps = gc.isenabled(), 0
        if self.every_steps:
            gc.disable()
        return self

    def after_step(self, step: int) -> None:
        """Collects where it is due; called once after each optimizer step.

        Args:
            step: optimizer steps since the run's start, so that ranks agree.
        """
        if not self.every_steps:
            return
        self._num_steps += 1
        if self._num_steps == 1:
            gc.collect()
            gc.freeze()
        elif step % self.every_steps == 0:
            gc.collect()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.every_steps:
            return
        gc.unfreeze()
        if self._was_enabled:
            gc.enable()
