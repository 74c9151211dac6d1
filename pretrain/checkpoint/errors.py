"""What can be wrong with checkpoints, as an exception."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that cannot be used or saved; the message names it, what was found and what to do."""
