"""Dealing the rows of a column to sources in given shares: exactly, in integers, and computable at any row.

Enters: integer weights, a number of columns, a seed. Leaves: the source of row n of a column and how many earlier rows
of the column it had, and from a source and such a number the row. Why it exists: a mixture's order must be a pure
function of the position, as the order of one source is, and the same on every machine.

A binary tree has the sources at its leaves. Of the first n rows that come to a node of weight t in column c,
floor((a * n + phase) / t) go to its left child, of weight a; the others to the right one. So every row has one source;
before any row, a source had its share of the rows to within less than the tree's depth; and both directions cost
O(depth) per row: no slot is drawn, none is counted, and a weight may be as small as 2**-30.

The phases (one per column and level) are fractions of an additive sequence, c * sqrt(prime): neighbouring columns are
never in step, and any run of columns (a batch, or the slice of one rank) holds nearly the wanted share of each source,
where phases drawn at random would leave it to chance. Richtmyer, "The evaluation of definite integrals", 1951.

Legend: Q columns, D sources, B rows asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from data_pipes.order.hashing import Int64s, Uint64s, hash_words

TOTAL = 1 << 30
"""What the integer weights add up to: products of two of them stay within 64 bits."""
_PHASE = 5
"""Hashed with the seed, so that the phases have nothing to do with other uses of it."""
_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53)
"""The phases of level n of the tree advance by the square root of the n-th prime."""


def integer_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """The weights as integers that add up to TOTAL, by largest remainders; equal on every machine.

    Raises:
        ValueError: a weight is negative or not finite, too small to be dealt, or none is above 0.
    """
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise ValueError(f"the weights are {list(weights)}; expected numbers of 0 or more")
    whole = sum((Fraction(weight) for weight in weights), Fraction(0))
    if whole == 0:
        raise ValueError(f"the weights are {list(weights)}; at least one must be above 0")
    exact = [Fraction(weight) * TOTAL / whole for weight in weights]
    floors = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda source: (floors[source] - exact[source], source))
    for source in by_remainder[: TOTAL - sum(floors)]:
        floors[source] += 1
    lost = [weight for weight, share in zip(weights, floors, strict=True) if weight > 0 and share == 0]
    if lost:
        raise ValueError(
            f"the weight {lost[0]} is less than a billionth of the sum {float(whole)}; give a larger one, or 0"
        )
    return tuple(floors)


@dataclass(frozen=True)
class _Node:
    """A node of the tree, with what divides the rows that come to it between its two children."""

    left: _Node | int
    """A node, or the number of a source."""
    right: _Node | int
    """A node, or the number of a source."""
    left_weight: int
    """The left child's part of `weight`."""
    weight: int
    """Sum of the weights of all sources below the node."""
    phase: Int64s
    """The phase of each column, [Q], 0 <= phase < weight."""

    def to_left(self, rows: Int64s, columns: Int64s) -> Int64s:
        """How many of the first `rows` rows of these columns go to the left; computed so that no product overflows."""
        whole, part = rows // self.weight, rows % self.weight
        return self.left_weight * whole + (self.left_weight * part + self.phase[columns]) // self.weight

    def row_of_left(self, number: Int64s, columns: Int64s) -> Int64s:
        """The row that is the left child's row `number`: the first n + 1 with to_left(n + 1) = number + 1."""
        return _first_reaching(number + 1, self.left_weight, self.weight, self.phase[columns]) - 1

    def row_of_right(self, number: Int64s, columns: Int64s) -> Int64s:
        """The row that is the right child's row `number`: n - floor((a n + phase) / t) = floor(((t - a) n + t - 1 -
        phase) / t).
        """
        mirrored = self.weight - 1 - self.phase[columns]
        return _first_reaching(number + 1, self.weight - self.left_weight, self.weight, mirrored) - 1


class WeightedInterleave:
    """The sources of the rows of Q columns, under one set of weights."""

    def __init__(self, weights: Sequence[int], seed: int, num_columns: int) -> None:
        """Builds the tree.

        Args:
            weights: [D], from `integer_weights`. Sources of weight 0 get no row and do not change the others' rows.
            seed: the run's.
            num_columns: Q.
        """
        self._num_sources = len(weights)
        self._fractions: list[Uint64s] = []
        self._seed, self._num_columns = seed, num_columns
        self._root = self._node([source for source, weight in enumerate(weights) if weight], weights, level=0)
        self._paths = dict(_paths(self._root, ()))

    @property
    def depth(self) -> int:
        """Levels of the tree: a source has fewer than so many rows more or less than its share (none where it is 0)."""
        return max(len(path) for path in self._paths.values())

    def counts(self, rows: Int64s, columns: Int64s) -> Int64s:
        """How many of the first `rows` [B] rows of `columns` [B] each source has: [D, B]."""
        found = np.zeros((self._num_sources, len(rows)), np.int64)

        def share(node: _Node | int, rows: Int64s) -> None:
            if isinstance(node, int):
                found[node] = rows
            else:
                left = node.to_left(rows, columns)
                share(node.left, left)
                share(node.right, rows - left)

        share(self._root, rows)
        return found

    def locate(self, rows: Int64s, columns: Int64s) -> tuple[Int64s, Int64s]:
        """Finds the sources of rows [B] of columns [B].

        Returns:
            The source of each row, [B], and how many earlier rows of its column that source has, [B].
        """
        source, before = np.empty_like(rows), np.empty_like(rows)

        def descend(node: _Node | int, chosen: NDArray[np.intp], rows: Int64s, columns: Int64s) -> None:
            if isinstance(node, int):
                source[chosen], before[chosen] = node, rows
                return
            left = node.to_left(rows, columns)
            goes_left = node.to_left(rows + 1, columns) > left
            for child, there, rows_there in ((node.left, goes_left, left), (node.right, ~goes_left, rows - left)):
                descend(child, chosen[there], rows_there[there], columns[there])

        descend(self._root, np.arange(len(rows)), rows, columns)
        return source, before

    def rows_of(self, source: int, numbers: Int64s, columns: Int64s) -> Int64s:
        """The inverse of `locate` for one source.

        Args:
            source: its number.
            numbers: [B], how many earlier rows of its column the source has.
            columns: [B].

        Returns:
            The rows, [B].

        Raises:
            KeyError: the source has weight 0.
        """
        rows = numbers
        for node, is_left in self._paths[source]:
            rows = node.row_of_left(rows, columns) if is_left else node.row_of_right(rows, columns)
        return rows

    def _node(self, sources: Sequence[int], weights: Sequence[int], level: int) -> _Node | int:
        if len(sources) == 1:
            return sources[0]
        left, right = sources[: len(sources) // 2], sources[len(sources) // 2 :]
        left_weight = sum(weights[source] for source in left)
        weight = left_weight + sum(weights[source] for source in right)
        phase = ((self._fraction(level) * np.uint64(weight)) >> np.uint64(30)).astype(np.int64)
        left_node, right_node = self._node(left, weights, level + 1), self._node(right, weights, level + 1)
        return _Node(left_node, right_node, left_weight, weight, phase)

    def _fraction(self, level: int) -> Uint64s:
        """The phases of a level as fractions, [Q], in units of 2**-30: c * sqrt(prime) modulo 1, from a start that the
        seed gives.
        """
        if level == len(self._fractions):
            step = np.uint64(math.isqrt(_PRIMES[level % len(_PRIMES)] << 128) & 0xFFFFFFFFFFFFFFFF)
            words = hash_words(self._seed, _PHASE, level) + np.arange(self._num_columns, dtype=np.uint64) * step
            self._fractions.append(words >> np.uint64(34))
        return self._fractions[level]


def _first_reaching(count: Int64s, weight: int, total: int, phase: Int64s) -> Int64s:
    """The least n with floor((weight * n + phase) / total) >= count."""
    whole, part = count // weight, count % weight
    return total * whole - (phase - part * total) // weight


def _paths(
    node: _Node | int, above: tuple[tuple[_Node, bool], ...]
) -> Iterator[tuple[int, tuple[tuple[_Node, bool], ...]]]:
    """Each source with its path: the nodes above its leaf from the leaf upwards, and whether the leaf is to their left.

    Args:
        node: where the paths start.
        above: the path of `node` itself.
    """
    if isinstance(node, int):
        yield node, above
    else:
        yield from _paths(node.left, ((node, True), *above))
        yield from _paths(node.right, ((node, False), *above))
