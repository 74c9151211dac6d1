"""Which checkpoints stay, and what becomes of a folder that is in the way.

Enters: the folder that holds a run's checkpoints. Leaves: the same folder with fewer of them, or with one renamed.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from pretrain.checkpoint.folder import Folder
from pretrain.checkpoint.read import find_damage, list_folder, step_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retention:
    """Which complete checkpoints stay; the fields are those of `CheckpointConfig`."""

    keep_last: int
    """Newest complete checkpoints that are kept."""
    keep_every: int | None
    """Checkpoints whose step is a multiple of this are kept as well; None: no others."""
    free_before: bool
    """Whether the oldest one goes before a save and not after it, as long as two are left."""

    def delete_old(self, folder: Folder, damaged: set[str], *, before_a_save: bool = False) -> None:
        """Deletes the good checkpoints that need not stay. Never raises: what cannot be deleted stays.

        Args:
            folder: where the checkpoints lie.
            damaged: names of checkpoints that count as neither good nor old.
            before_a_save: to make room for the next one; does nothing unless `free_before` is set.
        """
        if before_a_save and not self.free_before:
            return
        num_kept = max(2, self.keep_last - 1) if before_a_save else self.keep_last
        try:
            listed = [checkpoint for checkpoint in list_folder(folder) if checkpoint.name not in damaged]
            good = [checkpoint for checkpoint in listed if find_damage(checkpoint, hashes=False) is None]
            for checkpoint in good[:-num_kept]:
                if self.keep_every is None or step_of(checkpoint) % self.keep_every:
                    checkpoint.remove()
        except OSError as error:
            logger.warning("Old checkpoints in %s were not deleted: %s", folder, error)


def set_aside(checkpoint: Folder, prefix: str) -> None:
    """Gives a checkpoint that is in the way a name that says what it is; does nothing where there is none.

    Args:
        checkpoint: its folder.
        prefix: "torn" or "dropped"; the new name is this, the old name and the time in ns.
    Raises:
        OSError: it cannot be renamed.
    """
    if checkpoint.exists():
        name = f"{prefix}-{checkpoint.name}-{time.time_ns()}"
        logger.warning("%s is %s; it is kept as %s", checkpoint, prefix, name)
        checkpoint.rename(name)
