"""When and where a run saves, what it keeps, and how much trouble with storage it bears.

Enters: the `checkpoint` section of a run's configuration. Leaves: the same, checked. Apart from
pretrain.checkpoint.checkpoints because pretrain/config.py reads it too, without the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from data_pipes.bounds import bounded
from pretrain.checkpoint.open_folder import check_writable


@dataclass(frozen=True)
class CheckpointConfig:
    """When and where to save, what to keep, and how much trouble to bear."""

    every_steps: int | None = bounded(None, least=1)
    """Optimizer steps between saves; null = only at the end and on a signal."""
    folder: str | None = None
    """null = <run>/checkpoints; else they lie in <folder>/<run's name>: a path, or a URL (s3://, gs://, az://, abfs://),
    for which nodes need no shared file system."""
    keep_last: int = bounded(2, least=2)
    """Newest complete checkpoints that are kept; at least 2, so that one bad disk block does not end a run."""
    keep_every: int | None = bounded(None, least=1)
    """Additionally keep each checkpoint whose step is a multiple of this; null = none."""
    free_before: bool = False
    """Delete the oldest one that `keep_last` would delete before a save instead of after it (never below 2 good ones):
    the disk then needs room for `keep_last` checkpoints, not for one more."""
    resume: Literal["auto", "never"] = "auto"
    """auto = continue from the newest complete, verified checkpoint of this run's folder."""
    restart: bool = False
    """true = a run whose checkpoints are all damaged or gone may begin again at step 0; they are set aside. It changes
    nothing for a run with a usable checkpoint, so that the same command continues after the next crash."""
    verify: bool = True
    """Check every file's sha256 before resuming; false = sizes only."""
    busy_wait_s: float = bounded(10.0, least=0)
    """Seconds that the run waits for a running save when the next one falls due; then the next one is skipped."""
    wait_after_s: float = bounded(600.0, least=0)
    """A running save older than this is waited for instead: a slow store then slows the run, not its protection."""
    hung_after_s: float = bounded(1800.0, least=0)
    """Seconds after which a save that has not ended counts as failed; keep it at or below parallel.timeout_s."""
    max_failures: int | None = bounded(None, least=1)
    """Failed saves in a row after which the run ends; null = it never ends for that before its last save."""
    last_attempts: int = bounded(3, least=1)
    """Attempts at the last save of a run (at its end or on a signal) before the run ends with an error."""

    def __post_init__(self) -> None:
        if self.keep_last < 2:
            raise ValueError(f"checkpoint.keep_last is {self.keep_last}; it must be at least 2")
        for name in ("every_steps", "keep_every", "max_failures"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"checkpoint.{name} is {value}; it must be at least 1, or null")
        if self.last_attempts < 1:
            raise ValueError(f"checkpoint.last_attempts is {self.last_attempts}; it must be at least 1")
        if not 0 <= self.busy_wait_s <= self.wait_after_s <= self.hung_after_s:
            raise ValueError(
                f"checkpoint.busy_wait_s={self.busy_wait_s}, wait_after_s={self.wait_after_s} and hung_after_s="
                f"{self.hung_after_s}: expected 0 <= busy_wait_s <= wait_after_s <= hung_after_s"
            )
        if self.folder is not None:
            check_writable(self.folder)
