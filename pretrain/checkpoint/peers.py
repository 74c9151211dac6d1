"""The ranks that save together: what fails on one of them fails on all, and nobody waits for a rank that gave up.

Enters: a piece of work that every rank does. Leaves: its results on rank 0, or the same error on every rank. Why it
exists: a checkpoint is complete on all ranks or on none, and their disks fail one by one.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from pretrain.checkpoint.errors import CheckpointError

_FAILURES_SHOWN = 3
"""Ranks whose failures an error message quotes; it counts the others."""

logger = logging.getLogger(__name__)


class PeersLostError(CheckpointError):
    """The ranks could not reach each other: their process group cannot be used again."""


@dataclass(frozen=True)
class Peers:
    """The ranks that save together, on their checkpoint threads."""

    rank: int
    """This rank, counted over all nodes."""
    size: int
    """Number of ranks over all nodes."""
    group: dist.ProcessGroup | None
    """gloo group of the checkpoint threads; None: there is one rank."""

    def run(self, what: str, work: Callable[[], Any]) -> list[Any]:
        """Does `work` on every rank. A collective.

        Args:
            what: names the work in error messages, for example "writing step-00001200".
            work: what this rank does.
        Returns:
            On rank 0 what `work` returned on each rank, in their order; on the others nothing that can be used.
        Raises:
            CheckpointError: it raised on one rank or more; the message says what went wrong where.
            PeersLostError: the ranks did not hear of each other in time.
        """
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
            logger.debug("%s failed", what, exc_info=True)
        if self.group is None:
            results, verdict = [result], failure
        else:
            results, verdict = self._exchange(result, failure)
        if verdict is not None:
            raise CheckpointError(f"{what} failed: {verdict}")
        return results

    def _exchange(self, result: Any, failure: str | None) -> tuple[list[Any], str | None]:
        """Every rank's result, on rank 0, and what failed anywhere, on every rank."""
        everyone: list[Any] = [None] * self.size
        if failure is not None:
            failure = f"rank {self.rank} on {socket.gethostname()}: {failure}"
        try:
            dist.gather_object((result, failure), everyone if self.rank == 0 else None, dst=0, group=self.group)
            box: list[str | None] = [None]
            if self.rank == 0:
                failures = [problem for _, problem in everyone if problem is not None]
                num_more = len(failures) - _FAILURES_SHOWN
                more = f" (and {num_more} more ranks)" if num_more > 0 else ""
                box = ["; ".join(failures[:_FAILURES_SHOWN]) + more if failures else None]
            dist.broadcast_object_list(box, src=0, group=self.group)
        except RuntimeError as error:
            raise PeersLostError(f"{failure or 'the ranks lost each other while saving'}: {error}") from error
        return ([value for value, _ in everyone] if self.rank == 0 else []), box[0]
