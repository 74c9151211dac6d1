"""The chunks of a data set, and where each begins in an epoch: a table that costs two bytes per chunk.

Enters: the number of samples and chunks of each shard; the key of an epoch. Leaves: the chunk and the sample at any
slot of the epoch's line, and the slots of any chunk. Why it exists: this is the one part of the order that needs memory
(12 million chunks for 1e9 samples of 100 KB, in each of a node's processes), and the one that takes time at the start.

A slot is a place in the line of the epoch's chunks; a rank is the number of a chunk in that line.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipes.order.hashing import Int64s, Uint64s, feistel, feistel_inverse

Counts = NDArray[Any]
"""Counts, of whatever integer type is large enough."""
_GROUP = 64
"""Ranks that share one int64 start; their own starts are small offsets from it."""
_AT_ONCE = 1 << 17
"""Chunks handled at a time while the tables are made: keeps the temporary arrays below 10 MB."""
_STEPS = tuple(_GROUP >> halvings for halvings in range(1, _GROUP.bit_length()))
"""The steps of a bisection within a group: 32, 16, ..., 1."""


class ChunkTable:
    """Which samples belong to which chunk.

    Chunk c of the k chunks of a shard of n samples begins at sample n * c // k; chunks are numbered over all shards in
    turn.
    """

    def __init__(self, samples_per_shard: Int64s, chunks_per_shard: Int64s) -> None:
        self._samples, self._chunks = samples_per_shard, chunks_per_shard
        self._first = np.cumsum(chunks_per_shard) - chunks_per_shard
        self.num_chunks = int(chunks_per_shard.sum())
        self._largest = int((-(-samples_per_shard // np.maximum(chunks_per_shard, 1))).max())

    def first_samples(self, chunks: Int64s) -> tuple[Int64s, Int64s]:
        """The shard of each of the chunks [B], and the number of the chunk's first sample in it: two [B]."""
        shard = np.searchsorted(self._first, chunks, side="right") - 1
        return shard, self._samples[shard] * (chunks - self._first[shard]) // self._chunks[shard]

    def bounds(self, chunk: int) -> tuple[int, int, int]:
        """The samples of one chunk.

        Returns:
            The shard, the first sample in it and the number of samples.

        Raises:
            ValueError: there is no such chunk.
        """
        if not 0 <= chunk < self.num_chunks:
            raise ValueError(f"chunk {chunk} of {self.num_chunks}; expected 0 to {self.num_chunks - 1}")
        shard = int(np.searchsorted(self._first, chunk, side="right")) - 1
        samples, chunks, within = int(self._samples[shard]), int(self._chunks[shard]), chunk - int(self._first[shard])
        first = samples * within // chunks
        return shard, first, samples * (within + 1) // chunks - first

    def sizes(self) -> Counts:
        """The number of samples of each of the M chunks: [M], in the smallest type that holds them."""
        found = np.empty(self.num_chunks, _smallest_type(self._largest))
        for begin, end in _spans(self.num_chunks):
            chunks = np.arange(begin, end)
            shard = np.searchsorted(self._first, chunks, side="right") - 1
            samples, of_shard, within = self._samples[shard], self._chunks[shard], chunks - self._first[shard]
            found[begin:end] = samples * (within + 1) // of_shard - samples * within // of_shard
        return found


class EpochPlan:
    """The first slot of each chunk in one epoch."""

    def __init__(self, sizes: Counts, key: Uint64s) -> None:
        """Lays the chunks of an epoch end to end.

        Args:
            sizes: [M], the number of samples of each chunk, 1 or more.
            key: of the permutation of the chunks.
        """
        self._num_chunks, self._key = len(sizes), key
        groups = -(-len(sizes) // _GROUP)
        self._starts = np.empty(groups, np.int64)
        self._offsets = np.empty(groups * _GROUP, _smallest_type(_GROUP * int(sizes.max())))
        taken = 0
        for begin, end in _spans(len(sizes)):
            ends = taken + np.cumsum(sizes[feistel(np.arange(begin, end), len(sizes), key)], dtype=np.int64)
            padded = np.full(-(-(end - begin) // _GROUP) * _GROUP, ends[-1])  # behind the last chunk: its end
            padded[0], padded[1 : end - begin] = taken, ends[:-1]
            of_group = padded.reshape(-1, _GROUP)
            self._starts[begin // _GROUP : -(-end // _GROUP)] = of_group[:, 0]
            self._offsets[begin : begin + len(padded)] = (of_group - of_group[:, :1]).ravel()
            taken = int(ends[-1])

    @property
    def size_bytes(self) -> int:
        """Memory that the plan holds."""
        return self._starts.nbytes + self._offsets.nbytes

    def find(self, slots: Int64s) -> tuple[Int64s, Int64s]:
        """The chunk at each of the slots [B], and the number of the sample in that chunk: two [B]."""
        group = np.searchsorted(self._starts, slots, side="right") - 1
        within, rank = slots - self._starts[group], group * _GROUP
        for step in _STEPS:  # bisection: the last rank of the group that begins at or before the slot
            rank += step * (self._offsets[rank + step] <= within)
        return feistel(rank, self._num_chunks, self._key), within - self._offsets[rank]

    def first_slot(self, chunk: int) -> int:
        """The slot of a chunk's first sample."""
        rank = int(feistel_inverse(chunk, self._num_chunks, self._key)[0])
        return int(self._starts[rank // _GROUP]) + int(self._offsets[rank])


def _spans(length: int) -> Iterator[tuple[int, int]]:
    """[0, length) in parts of `_AT_ONCE`, each as (begin, end)."""
    for begin in range(0, length, _AT_ONCE):
        yield begin, min(begin + _AT_ONCE, length)


def _smallest_type(largest: int) -> np.dtype[Any]:
    return np.dtype(np.uint16 if largest < 1 << 16 else np.uint32 if largest < 1 << 32 else np.int64)
