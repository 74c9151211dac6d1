"""The watchdog's configuration: the phases of a run, and how long each may take."""

from __future__ import annotations

from dataclasses import dataclass

from data_pipes.bounds import bounded

LIMIT_OF = {
    "start": "start_timeout_s",
    "first_step": "first_step_timeout_s",
    "data": "step_timeout_s",
    "forward": "step_timeout_s",
    "step": "step_timeout_s",
    "save": "save_timeout_s",
    "validate": "validate_timeout_s",
    "close": "close_timeout_s",
}
"""By phase, the field below; `first_step` stands for the three after it until the first step is done."""


@dataclass(frozen=True)
class WatchdogConfig:
    """How long a rank may be without progress in each phase before the run is ended, in seconds."""

    enabled: bool = True
    """Watch at all."""
    start_timeout_s: float = bounded(1800.0, above=0)
    """Model, resume and data, until the first step begins."""
    first_step_timeout_s: float = bounded(1800.0, above=0)
    """The first step of a start, compilation included."""
    step_timeout_s: float = bounded(600.0, above=0)
    """Each of waiting for data, a forward pass, and the rest of a micro-batch or step."""
    save_timeout_s: float = bounded(1800.0, above=0)
    """A save that blocks the loop: copying, and waiting for the save before it."""
    validate_timeout_s: float = bounded(1800.0, above=0)
    """Validation batches and pictures: the time between two beats, so of one batch where the loop beats in each."""
    close_timeout_s: float = bounded(1800.0, above=0)
    """The last save, and sending what MLflow lacks."""
    stop_timeout_s: float = bounded(600.0, above=0)
    """From a stop signal until the process has left. Whoever sends the signal may be less patient."""
    interval_s: float = bounded(5.0, above=0)
    """Between two looks, each of which writes a small file per rank to the run's folder."""
    slow_factor: float = bounded(2.0, above=1)
    """A rank whose own work per step takes this many times the others' median is warned about."""

    def __post_init__(self) -> None:
        for name in (*sorted(set(LIMIT_OF.values())), "stop_timeout_s", "interval_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"watchdog.{name} is {getattr(self, name)}; it must be above 0 seconds")
        if self.slow_factor <= 1:
            raise ValueError(f"watchdog.slow_factor is {self.slow_factor}; it must be above 1")

    def limit_s(self, phase: str) -> float:
        """Seconds that `phase` may take."""
        return float(getattr(self, LIMIT_OF[phase]))

    @property
    def longest_later_s(self) -> float:
        """The longest limit after the first step; process groups should time out later than this."""
        return max(self.limit_s(phase) for phase in ("step", "save", "validate", "close"))
