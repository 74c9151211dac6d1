"""One rank's share of each optimizer step, and what a batch holds.

Enters: the global batch, the ranks, the samples of a micro-batch. Leaves: `BatchPlan` (which positions a rank's
micro-batches cover) and `Batch` (tensors and keys). Both loaders and the trainer speak of these.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipes.order.hashing import Int64s


@dataclass(frozen=True)
class BatchPlan:
    """How the samples of an optimizer step are divided."""

    global_batch: int
    """Samples per optimizer step, over all ranks and micro-batches."""
    micro_batch: int
    """Samples per rank and forward pass."""
    rank: int = 0
    world_size: int = 1
    """Number of ranks."""
    ranks_per_node: int = 1
    """Ranks that share a cache."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} of {self.world_size} ranks; expected 0 <= rank < world size")
        if self.global_batch < 1 or self.micro_batch < 1:
            raise ValueError(
                f"global_batch is {self.global_batch} and micro_batch {self.micro_batch}; expected 1 or more of each"
            )
        per_pass = self.world_size * self.micro_batch
        if self.global_batch % per_pass:
            below = self.global_batch // per_pass * per_pass
            raise ValueError(
                f"global_batch {self.global_batch} is not a multiple of ranks x micro_batch = {self.world_size} x "
                f"{self.micro_batch} = {per_pass}; the nearest that are: {f'{below} and ' if below else ''}"
                f"{below + per_pass}"
            )

    @property
    def accumulate(self) -> int:
        """Micro-batches per rank and optimizer step."""
        return self.global_batch // (self.world_size * self.micro_batch)

    def micro_batch_starts(self, position: int) -> Iterator[int]:
        """First position of each micro-batch of this rank, endless, from the step that begins at `position`."""
        while True:
            first = position + self.rank * (self.global_batch // self.world_size)
            for number in range(self.accumulate):
                yield first + number * self.micro_batch
            position += self.global_batch

    def micro_batches(self, position: int) -> Iterator[Int64s]:
        """The positions of each micro-batch of this rank, as `micro_batch_starts`."""
        for first in self.micro_batch_starts(position):
            yield np.arange(first, first + self.micro_batch, dtype=np.int64)

    def on_this_node(self, positions: Int64s, start: int) -> NDArray[np.bool_]:
        """Which positions this rank's node will consume.

        Args:
            positions: [N], global sample positions.
            start: the position at which the run goes on.
        Returns:
            [N] bool.
        """
        rank = (positions - start) % self.global_batch // (self.global_batch // self.world_size)
        ours: NDArray[np.bool_] = rank // self.ranks_per_node == self.rank // self.ranks_per_node
        return ours & (positions >= start)


@dataclass(frozen=True)
class Batch:
    """A micro-batch."""

    images: Tensor
    """[B, C, H, W] uint8 or uint16; of videos [B, R, C, T, H, W]. From the loader: channels last in memory."""
    labels: Tensor
    """[B] int64, -1 where there is none."""
    positions: Tensor
    """[B] int64, global sample positions."""
    keys: list[str]
    """[B]; the key of the substitute where a sample was bad."""
    sources: Tensor | None = None
    """[B] int64, number of the data set in a mixture; None: there is only one."""
    captions: list[str | None] | None = None
    """[B]; None: data.captions does not ask for them."""
    metadata: list[dict[str, Any] | None] | None = None
    """[B]; None: data.metadata does not ask for it."""

    def to(self, device: torch.device) -> Batch:
        """The same on a device, contiguous; from page-locked memory without waiting for the copy."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True).contiguous())

    def pin_memory(self) -> Batch:
        """The same in page-locked memory, from which copies to a CUDA device overlap with work."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, move: Any) -> Batch:
        sources = None if self.sources is None else move(self.sources)
        return replace(
            self, images=move(self.images), labels=move(self.labels), positions=move(self.positions), sources=sources
        )
