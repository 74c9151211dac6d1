"""Training data from several sources in chosen shares, which may change at given samples of the run.

Enters: the sources' counts, their weights over the run, the order's parameters. Leaves: for any positions, the places
of their samples, as `Order` gives them for one source. Why it exists: so that a mixture resumes, scales and repeats as
one source does: its state is one integer too, and each source is read in its own order without a gap or a repetition.

Legend: P global position; g run; Q columns; D sources. In a segment of the run, the weights are constant.

1. Rows of g neighbouring positions: row = P // g, column c = row mod Q, round i = row // Q. Q is the number of rows of
   a batch at the run's start, so that a rank reads the same columns in every step; it is kept in the state.
2. In each column the rounds are dealt to the sources by weighted interleaving in integers
   (data_pipes.order.weighted_interleave). Each segment goes on counting where the earlier ones ended.
3. The o-th row of a source in column c is row o * Q + c of the source's own order: its position = row * g + P mod g. As
   a source's streams are a multiple of Q (where it is large enough), each of them belongs to one column.

A source repeats when its samples are used up. The sources' seeds differ, or data sets of equal sizes would be shuffled
alike; the first has the run's own, so that a mixture of one source is that source's plain order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from data_pipes.order.hashing import Int64s, hash64
from data_pipes.order.mixture_config import MixtureConfig, SourceConfig, WeightChange
from data_pipes.order.mixture_state import describe_mixture, differences, plan_segments
from data_pipes.order.order import NEVER, ChunkUse, Located, Order, OrderConfig
from data_pipes.order.weighted_interleave import TOTAL, WeightedInterleave

__all__ = ["MixtureConfig", "MixtureOrder", "SourceConfig", "SourceCounts", "WeightChange"]

_SOURCE_SEED = 6
"""Hashed with the run's seed and the number of a source into that source's own seed."""


class SourceCounts(NamedTuple):
    """What the order needs to know of one source."""

    samples_per_shard: ArrayLike
    """Integers, [shards]."""
    bytes_per_shard: ArrayLike
    """Integers, [shards]."""
    fingerprint: str
    """The fingerprint of its manifest."""


class MixtureOrder:
    """The order over several sources; shards and chunks are numbered over all of them in turn. Like `Order`, it is
    cheap to pickle and safe for threads.
    """

    def __init__(self, mixture: MixtureConfig, orders: Sequence[Order], config: OrderConfig, columns: int) -> None:
        """Builds the mixture from the orders of its sources; see `create` and `from_state`.

        Args:
            mixture: the sources and their weights over the run.
            orders: the order of each source, with the seeds and streams that `create` gives them.
            config: the parameters of the run's order.
            columns: Q.

        Raises:
            ValueError: a change of weights is nearer to the one before than a round of Q * g samples.
        """
        self.config, self.columns, self.orders = config, columns, tuple(orders)
        self.names = tuple(mixture.names())
        self.num_samples = sum(order.num_samples for order in orders)
        self.num_chunks = sum(order.num_chunks for order in orders)
        self._first_shard = _starts([order.num_shards for order in orders])
        self._first_chunk = _starts([order.num_chunks for order in orders])
        self.source_of_shard: Int64s = np.repeat(np.arange(len(orders)), [order.num_shards for order in orders])
        self.segments = plan_segments(mixture, columns * config.run)
        self._interleaves = [WeightedInterleave(segment.weights, config.seed, columns) for segment in self.segments]
        self._first_round = np.array([segment.from_sample // (columns * config.run) for segment in self.segments])
        every = np.arange(columns)
        # of each segment: how many rows of each column every source had before it, [D, Q]
        self._rows_at_start = [np.zeros((len(orders), columns), np.int64)]
        for interleave, rounds in zip(self._interleaves, np.diff(self._first_round), strict=False):
            self._rows_at_start.append(self._rows_at_start[-1] + interleave.counts(np.full(columns, rounds), every))

    @classmethod
    def create(
        cls, mixture: MixtureConfig, sources: Sequence[SourceCounts], config: OrderConfig, global_batch: int
    ) -> MixtureOrder:
        """The order of a new run.

        Args:
            mixture: the sources and their weights over the run.
            sources: the counts of `mixture.sources`.
            config: the parameters of the run's order; an undecided number of streams is chosen for each source.
            global_batch: samples per optimizer step over all ranks.

        Raises:
            ValueError: two changes of the weights are too near to each other, or a source has no sample.
        """
        columns = max(1, global_batch // config.run)
        return cls(mixture, _orders(sources, config, columns, [config.streams] * len(sources)), config, columns)

    @classmethod
    def from_state(
        cls, state: Mapping[str, Any], mixture: MixtureConfig, sources: Sequence[SourceCounts], config: OrderConfig
    ) -> MixtureOrder:
        """The order that wrote `state`, perhaps with other weights from its position on.

        Args:
            state: what `state` gave, from a checkpoint.
            mixture: the sources and their weights over the run, as they are configured now.
            sources: the counts of `mixture.sources`.
            config: the parameters of the run's order; an undecided number of streams is taken from `state`.

        Raises:
            ValueError: see `check_state`.
        """
        columns, written = state.get("columns"), state.get("sources")
        known = [source.get("streams") for source in written] if isinstance(written, list) else []
        if type(columns) is not int or not all(type(count) is int and count > 0 for count in [columns, *known]):
            raise ValueError(
                f"the data state has no valid numbers of columns and streams (found {columns!r} and {known}): it is "
                "damaged, or not of a mixture; start a new run from the checkpoint's weights"
            )
        streams = [config.streams or count for count in known]
        streams += [config.streams] * (len(sources) - len(streams))
        order = cls(mixture, _orders(sources, config, columns, streams[: len(sources)]), config, columns)
        order.check_state(state)
        return order

    def locate(self, positions: ArrayLike) -> Located:
        """The places of positions [B] (int64, >= 0, in any order).

        Raises:
            ValueError: a position is negative.
        """
        wanted = np.atleast_1d(np.asarray(positions, np.int64))
        if wanted.size and wanted.min() < 0:
            raise ValueError(f"data positions are 0 or more, found {int(wanted.min())}")
        source, own_positions = self._own_positions(wanted)
        found = Located(*(np.empty(len(wanted), np.int64) for _ in Located._fields))
        for number in np.unique(source).tolist():
            here = source == number
            own = self.orders[number].locate(own_positions[here])
            found.shard[here] = own.shard + self._first_shard[number]
            found.sample[here] = own.sample
            found.chunk[here] = own.chunk + self._first_chunk[number]
            found.source[here] = number
        return found

    def substitute(self, position: int, attempt: int) -> tuple[int, int]:
        """The shard and the sample in it that replace a bad sample, of the same source; see `Order.substitute`."""
        source, own_position = self._own_positions(np.array([position], np.int64))
        number = int(source[0])
        shard, sample = self.orders[number].substitute(int(own_position[0]), attempt)
        return shard + int(self._first_shard[number]), sample

    def chunk_samples(self, chunk: int) -> tuple[int, int, int]:
        """The samples of a chunk.

        Returns:
            The shard, the first sample in it and the number of samples.

        Raises:
            ValueError: there is no such chunk.
        """
        source, own_chunk = self._source_of_chunk(chunk)
        shard, first, size = self.orders[source].chunk_samples(own_chunk)
        return shard + int(self._first_shard[source]), first, size

    def pass_of(self, chunk: int, position: int) -> Int64s:
        """When a chunk is used: one pass of its source over it, the earliest that is not over at `position`.

        Returns:
            The sorted global positions of the chunk's samples in that pass, without those that the weights leave unused
            for ever; empty when none is used any more.
        """
        source, own_chunk = self._source_of_chunk(chunk)
        order = self.orders[source]
        epoch = self._next_own_position(source, position) // order.num_samples
        while epoch * order.num_samples < self._end_of_source(source):
            found = self._global_positions(source, order.positions_of(own_chunk, epoch))
            found = found[found != NEVER]
            if found.size and found.max() >= position:
                return np.sort(found)
            epoch += 1
        return np.empty(0, np.int64)

    def uses(self, chunk: int, position: int) -> ChunkUse:
        """The first and the last position of `pass_of`; both are NEVER when no sample of the chunk is used any more."""
        found = self.pass_of(chunk, position)
        return ChunkUse(int(found[0]), int(found[-1])) if found.size else ChunkUse(NEVER, NEVER)

    def counts(self, position: int) -> Int64s:
        """How many samples of each source there are in [0, position), exactly: [D]."""
        run = self.config.run
        found = run * self._rows_before(position).sum(1)
        if position % run:
            source, _ = self._own_positions(np.array([position], np.int64))
            found[source] += position % run
        return np.asarray(found, np.int64)

    def wanted_shares(self, position: int) -> list[float]:
        """The share of each source in the samples, as the weights at `position` want it: [D], adding up to 1."""
        segment = int(self._segment_of(np.array([position // (self.columns * self.config.run)]))[0])
        return [weight / TOTAL for weight in self.segments[segment].weights]

    def state(self, position: int) -> dict[str, Any]:
        """All that is needed to go on from `position` (samples consumed by the trainer), as JSON."""
        return describe_mixture(
            self.config, self.columns, list(zip(self.names, self.orders, strict=True)), self.segments, position
        )

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuses a state that another order or other sources wrote.

        Weights may differ from the state's position on; sources may be added behind the others, if they have weight 0
        before that position.

        Raises:
            ValueError: something else differs; every field that does is named.
        """
        wrong = differences(state, self.state(0))
        if wrong:
            raise ValueError(
                f"the data order cannot continue from this checkpoint: {'; '.join(wrong)}. Restore the sources, the "
                "weights up to its position and data.order as they were (later weights may change), or start a new run "
                "from the checkpoint's weights"
            )

    def _segment_of(self, rounds: Int64s) -> Int64s:
        return np.searchsorted(self._first_round, rounds, side="right") - 1

    def _own_positions(self, positions: Int64s) -> tuple[Int64s, Int64s]:
        """Steps 1 to 3: from global positions [B] to their sources and to positions in the sources' own orders."""
        rows = positions // self.config.run
        rounds, column = rows // self.columns, rows % self.columns
        segment = self._segment_of(rounds)
        source, number = np.empty_like(rows), np.empty_like(rows)
        for part in np.unique(segment).tolist():
            here = segment == part
            dealt, before = self._interleaves[part].locate(rounds[here] - self._first_round[part], column[here])
            source[here], number[here] = dealt, before + self._rows_at_start[part][dealt, column[here]]
        return source, (number * self.columns + column) * self.config.run + positions % self.config.run

    def _global_positions(self, source: int, own_positions: Int64s) -> Int64s:
        """The inverse of `_own_positions` for one source; NEVER where its weight becomes 0 before, and stays so."""
        rows = own_positions // self.config.run
        number, column = rows // self.columns, rows % self.columns
        rounds, is_used = np.zeros_like(rows), np.zeros(len(rows), np.bool_)
        for part, interleave in enumerate(self._interleaves):
            here = number >= self._rows_at_start[part][source, column]
            if part + 1 < len(self._interleaves):
                here &= number < self._rows_at_start[part + 1][source, column]
            if here.any() and self.segments[part].weights[source]:
                within = number[here] - self._rows_at_start[part][source, column[here]]
                rounds[here] = self._first_round[part] + interleave.rows_of(source, within, column[here])
                is_used |= here
        found = (rounds * self.columns + column) * self.config.run + own_positions % self.config.run
        return np.where(is_used, found, NEVER)

    def _rows_before(self, position: int) -> Int64s:
        """How many whole rows of each source there are in each column in [0, position): [D, Q]."""
        rounds, column = divmod(position // self.config.run, self.columns)
        part = int(self._segment_of(np.array([rounds]))[0])
        every = np.arange(self.columns)
        rows = rounds - int(self._first_round[part]) + (every < column)
        return self._rows_at_start[part] + self._interleaves[part].counts(rows, every)

    def _next_own_position(self, source: int, position: int) -> int:
        """A position in the source's own order; every sample before it is used before the global `position`."""
        first_rows = self._rows_before(max(0, position))[source] * self.columns + np.arange(self.columns)
        return int(first_rows.min()) * self.config.run

    def _end_of_source(self, source: int) -> int:
        """A position in the source's own order; no sample at or behind it is ever used."""
        if self.segments[-1].weights[source]:
            return NEVER
        rows = self._rows_at_start[-1][source]
        return int(((rows - 1) * self.columns + np.arange(1, self.columns + 1)).max()) * self.config.run

    def _source_of_chunk(self, chunk: int) -> tuple[int, int]:
        """The source of a chunk, and the number of the chunk in that source."""
        if not 0 <= chunk < self.num_chunks:
            raise ValueError(f"chunk {chunk} of {self.num_chunks}; expected 0 to {self.num_chunks - 1}")
        source = int(np.searchsorted(self._first_chunk, chunk, side="right")) - 1
        return source, chunk - int(self._first_chunk[source])


def _orders(
    sources: Sequence[SourceCounts], config: OrderConfig, columns: int, streams: Sequence[int | None]
) -> list[Order]:
    """The order of each source: with a seed of its own, and streams that suit the columns of the mixture."""
    orders = []
    for number, (source, count) in enumerate(zip(sources, streams, strict=True)):
        samples = np.asarray(source.samples_per_shard, np.int64)
        seed = hash64(config.seed, _SOURCE_SEED, number) >> 1 if number else config.seed
        own = replace(config, seed=seed, streams=count).with_streams(int(samples.sum()), columns * config.run)
        orders.append(Order(samples, source.bytes_per_shard, own, source.fingerprint))
    return orders


def _starts(counts: Sequence[int]) -> Int64s:
    """Where each part begins when parts of these sizes are numbered in turn."""
    return np.asarray(np.cumsum(counts) - np.asarray(counts), np.int64)
