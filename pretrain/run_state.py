"""Where a run stands: what the loop keeps between its steps and a checkpoint keeps of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SkippedSamples:
    """The positions that a run leaves out, as half-open ranges in the order of training."""

    ranges: tuple[tuple[int, int], ...] = ()

    def with_range(self, begin: int, end: int) -> SkippedSamples:
        """One more range; those that touch become one."""
        merged: list[tuple[int, int]] = []
        for low, high in sorted([*self.ranges, (begin, end)]):
            if merged and low <= merged[-1][1]:
                merged[-1] = merged[-1][0], max(high, merged[-1][1])
            else:
                merged.append((low, high))
        return SkippedSamples(tuple(merged))

    def next_position(self, position: int) -> int:
        """Where training goes on that has come to `position`."""
        for begin, end in self.ranges:
            if begin <= position < end:
                return end
        return position

    def count_from(self, position: int) -> int:
        """Samples at or after `position` that will be left out."""
        return sum(max(0, end - max(begin, position)) for begin, end in self.ranges)
