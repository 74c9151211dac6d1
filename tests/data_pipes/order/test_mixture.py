"""Mixtures against a walk over every row in fractions, and their promises as properties."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Sequence
from decimal import Context
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from data_pipes.batch import BatchPlan
from data_pipes.order.hashing import hash_words
from data_pipes.order.mixture import MixtureOrder, SourceCounts
from data_pipes.order.mixture_config import MixtureConfig, SourceConfig, WeightChange
from data_pipes.order.order import NEVER, Order, OrderConfig
from data_pipes.order.weighted_interleave import TOTAL, WeightedInterleave, integer_weights

PRIMES = (2, 3, 5, 7)
SIZES = ([40, 0, 33], [120, 1, 1, 90], [5])
"""Samples per shard of three sources; the last is smaller than a window."""


def counts_of(sizes: Sequence[Sequence[int]]) -> list[SourceCounts]:
    return [SourceCounts(s, [1000 * count for count in s], f"print{number}") for number, s in enumerate(sizes)]


def mixture_of(weights: Sequence[float], *changes: tuple[int, Sequence[float]]) -> MixtureConfig:
    sources = [SourceConfig(f"/data/{chr(97 + number)}", weight) for number, weight in enumerate(weights)]
    return MixtureConfig(sources, [WeightChange(at, list(new)) for at, new in changes])


def make(
    mixture: MixtureConfig, config: OrderConfig, sizes: Sequence[Sequence[int]] = SIZES, global_batch: int = 24
) -> MixtureOrder:
    return MixtureOrder.create(mixture, counts_of(sizes), config, global_batch)


CONFIG = OrderConfig(seed=5, run=4, window=16, chunk_bytes=7000)


class SlowTree:
    """The tree of shares as a walk from row to row: each node keeps its count and passes a row on to the left when
    floor((a n + phase) / t) grows. In fractions and Python integers, without a formula for the n-th row.
    """

    def __init__(self, sources: list[int], weights: Sequence[int], seed: int, column: int, level: int = 0) -> None:
        self.sources, self.rows = sources, 0
        if len(sources) > 1:
            half = len(sources) // 2
            self.total = sum(weights[source] for source in sources)
            self.share = Fraction(sum(weights[source] for source in sources[:half]), self.total)
            step = int(Context(prec=60).sqrt(PRIMES[level]) * 2**64)
            word = (int(hash_words(seed, 5, level)[0]) + column * step) % (1 << 64)
            self.phase = Fraction((word >> 34) * self.total >> 30, self.total)
            self.children = [
                SlowTree(part, weights, seed, column, level + 1) for part in (sources[:half], sources[half:])
            ]

    def deal(self) -> int:
        if len(self.sources) == 1:
            return self.sources[0]
        before = self.share * self.rows + self.phase
        self.rows += 1
        goes_left = (before + self.share) // 1 > before // 1
        return self.children[0 if goes_left else 1].deal()


def slow_places(order: MixtureOrder, mixture: MixtureConfig, num_positions: int) -> list[tuple[int, int]]:
    """(source, position of the source's own order) of each position, by dealing every row in turn."""
    run, columns = order.config.run, order.columns
    changes = [(0, [source.weight for source in mixture.sources])]
    changes += [(change.at_sample, change.weights) for change in mixture.schedule]
    trees: list[SlowTree] = []
    used = [[0] * columns for _ in mixture.sources]
    found = []
    for row in range(-(-num_positions // run)):
        if row % columns == 0 and changes and row * run >= changes[0][0]:
            weights = integer_weights(changes.pop(0)[1])
            active = [source for source, weight in enumerate(weights) if weight]
            trees = [SlowTree(active, weights, order.config.seed, column) for column in range(columns)]
        column = row % columns
        source = trees[column].deal()
        own_row = used[source][column] * columns + column
        used[source][column] += 1
        found += [(source, own_row * run + i) for i in range(run)]
    return found[:num_positions]


weight_lists = st.lists(st.sampled_from([0.0, 1e-3, 0.1, 1 / 3, 0.5, 1.0, 7.0]), min_size=3, max_size=3).filter(any)
mixtures = st.builds(
    lambda first, changes: mixture_of(first, *[(200 * (i + 1), new) for i, new in enumerate(changes)]),
    weight_lists,
    st.lists(weight_lists, max_size=3),
)
configs = st.builds(
    OrderConfig,
    seed=st.integers(-5, 5),
    run=st.integers(1, 6),
    window=st.integers(1, 40),
    chunk_bytes=st.integers(900, 20_000),
)


@settings(max_examples=25, deadline=None)
@given(mixture=mixtures, config=configs, global_batch=st.integers(1, 40))
def test_equals_a_walk_over_every_row(mixture: MixtureConfig, config: OrderConfig, global_batch: int) -> None:
    order = make(mixture, config, global_batch=global_batch)
    slow = slow_places(order, mixture, 1000)
    located = order.locate(np.arange(1000))
    assert located.source.tolist() == [source for source, _ in slow]
    shards, chunks = [0, 3, 7], np.cumsum([0, *(o.num_chunks for o in order.orders)])
    for position in range(0, 1000, 7):
        source, own_position = slow[position]
        own = order.orders[source].locate([own_position])
        found = [int(field[position]) for field in located]
        assert found == [own.shard[0] + shards[source], own.sample[0], own.chunk[0] + chunks[source], source]


@settings(max_examples=40, deadline=None)
@given(mixture=mixtures, config=configs, global_batch=st.integers(1, 40))
def test_no_sample_of_a_source_is_skipped_or_repeated(
    mixture: MixtureConfig, config: OrderConfig, global_batch: int
) -> None:
    """In each column, a source's own rows come once each and in turn; so every full pass has each sample once."""
    order = make(mixture, config, global_batch=global_batch)
    source, own = order._own_positions(np.arange(1000))
    columns = np.arange(1000) // config.run % order.columns
    for number in range(3):
        for column in range(order.columns):
            rows = own[(source == number) & (columns == column)] // config.run
            wanted = np.repeat(np.arange(column, len(rows) * order.columns + column, order.columns), config.run)
            assert np.array_equal(rows, wanted[: len(rows)])
        used = Counter(own[source == number].tolist())
        assert max(used.values(), default=1) == 1
        assert np.array_equal(order._global_positions(number, own[source == number]), np.nonzero(source == number)[0])


def test_every_pass_of_a_source_is_whole() -> None:
    order = make(mixture_of([0.5, 0.3, 0.2]), CONFIG)
    located = order.locate(np.arange(20_000))
    for number, size in enumerate((73, 212, 5)):
        here = located.source == number
        places = Counter(zip(located.shard[here].tolist(), located.sample[here].tolist(), strict=True))
        assert len(places) == size
        assert max(places.values()) - min(places.values()) <= -(-2 * order.columns * CONFIG.run // size) + 1
    assert located.source[located.shard >= 7].tolist() == [2] * int((located.shard >= 7).sum())
    assert order.source_of_shard.tolist() == [0, 0, 0, 1, 1, 1, 1, 2]
    assert np.array_equal(order.source_of_shard[located.shard], located.source)


@settings(max_examples=15, deadline=None)
@given(steps=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4)), min_size=1, max_size=10))
def test_any_division_gives_the_same_sequence(steps: list[tuple[int, int, int]]) -> None:
    """Ranks, micro-batches and their number change at every step: the places by position stay."""
    mixture = mixture_of([0.6, 0.3, 0.1], (150, [0.1, 0.1, 0.8]))
    expected = make(mixture, CONFIG).locate(np.arange(2000))
    position, seen = 0, []
    for world_size, micro_batch, accumulate in steps:
        global_batch = world_size * micro_batch * accumulate
        order = make(mixture, CONFIG)
        for rank in range(world_size):
            starts = BatchPlan(global_batch, micro_batch, rank, world_size).micro_batch_starts(position)
            for first in [next(starts) for _ in range(accumulate)]:
                located = order.locate(np.arange(first, first + micro_batch))
                seen += range(first, first + micro_batch)
                for found, field in zip(located, expected, strict=True):
                    assert np.array_equal(found, field[first : first + micro_batch])
        position += global_batch
    assert sorted(seen) == list(range(position))


def test_one_source_is_its_plain_order() -> None:
    order = make(mixture_of([3.0]), CONFIG, [[300, 200]])
    streams = CONFIG.with_streams(500, 24)
    plain = Order([300, 200], [300_000, 200_000], streams, "print0")
    for found, field in zip(order.locate(np.arange(1500)), plain.locate(np.arange(1500)), strict=True):
        assert np.array_equal(found, field)


def test_sources_of_equal_sizes_are_shuffled_differently() -> None:
    order = make(mixture_of([1, 1]), OrderConfig(seed=1, run=4, window=64, chunk_bytes=7000), [[200], [200]])
    one, other = (source.locate(np.arange(200)).sample for source in order.orders)
    assert (one == other).sum() < 10


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.floats(0, 100), min_size=1, max_size=9), seed=st.integers(0, 99), columns=st.integers(1, 9))
def test_weighted_interleaving_of_a_column(weights: list[float], seed: int, columns: int) -> None:
    """Within one row per level of the tree, at any row; and one row more is of one source."""
    try:
        integers = integer_weights(weights)
    except ValueError:
        assert max(weights) == 0 or min(w for w in weights if w) < 2e-9 * sum(weights)
        return
    interleave = WeightedInterleave(integers, seed, columns)
    rows = np.concatenate([np.arange(300), 10**9 * np.arange(20), [1 << 50]])
    for column in range(columns):
        here = np.full(len(rows), column)
        counts, after = interleave.counts(rows, here), interleave.counts(rows + 1, here)
        source, before = interleave.locate(rows, here)
        assert np.array_equal(counts.sum(0), rows)
        assert np.array_equal(np.argmax(after - counts, 0), source)
        assert np.array_equal(np.abs(after - counts).sum(0), np.ones(len(rows)))
        assert np.array_equal(counts[source, np.arange(len(rows))], before)
        for number, weight in enumerate(integers):
            for count, row in zip(counts[number].tolist(), rows.tolist(), strict=True):
                assert abs(count - Fraction(weight * row, TOTAL)) < max(interleave.depth, 1)
            mine = source == number
            if weight:
                assert np.array_equal(interleave.rows_of(number, before[mine], here[mine]), rows[mine])
    assert interleave.depth <= max(0, len(weights) - 1).bit_length()


@pytest.mark.parametrize("weights", [[1, 1], [1, 2, 3], [2, 0, 1, 4], [1] * 5, [3, 1, 1, 1, 1]])
def test_weighted_interleaving_of_small_weights(weights: list[int]) -> None:
    """With totals so small that every remainder occurs, also 0, where roundings differ."""
    interleave = WeightedInterleave(weights, 3, 12)
    for column in range(12):
        rows, here = np.arange(200), np.full(200, column)
        source, before = interleave.locate(rows, here)
        dealt = np.array([(source[:row] == source[row]).sum() for row in rows])
        assert np.array_equal(before, dealt)
        for number in set(source.tolist()):
            mine = source == number
            assert np.array_equal(interleave.rows_of(number, before[mine], here[mine]), rows[mine])


@pytest.mark.parametrize("weights", [[0.5, 0.3, 0.2], [1.0] * 5, [0.01, 0.6, 0.02, 0.3, 0.07]])
def test_batches_and_ranks_have_nearly_the_wanted_shares(weights: list[float]) -> None:
    """Drawn at random, a batch of 2,048 rows would be off by 23 rows in the mean, and a slice of 256 by 8."""
    interleave, every = WeightedInterleave(integer_weights(weights), 1, 2048), np.arange(2048)
    for row in range(12_345, 12_445):
        source, _ = interleave.locate(np.full(2048, row), every)
        for rows, limit in ((source, 15), (source[256:512], 9)):
            wanted = np.array(weights) / sum(weights) * len(rows)
            assert np.abs(np.bincount(rows, minlength=len(weights)) - wanted).max() < limit


def test_integer_weights() -> None:
    assert integer_weights([1, 1]) == (TOTAL // 2, TOTAL // 2)
    assert integer_weights([1, 1, 1]) == (357913942, 357913941, 357913941)
    assert integer_weights([0.1, 0.2]) == integer_weights([0.2, 0.4])
    assert integer_weights([0, 5]) == (0, TOTAL)
    assert sum(integer_weights([0.1] * 7 + [1e-6])) == TOTAL
    for weights in ([0.0, 0.0], [-1.0, 2.0], [float("nan")], [float("inf"), 1.0], [1.0, 1e-12]):
        with pytest.raises(ValueError, match="weight"):
            integer_weights(weights)


@settings(max_examples=30, deadline=None)
@given(mixture=mixtures, config=configs, data=st.data())
def test_counts_and_wanted_shares(mixture: MixtureConfig, config: OrderConfig, data: st.DataObject) -> None:
    order = make(mixture, config)
    source = order.locate(np.arange(1200)).source
    for position in data.draw(st.lists(st.integers(0, 1200), max_size=6)):
        assert order.counts(position).tolist() == np.bincount(source[:position], minlength=3).tolist()
        assert sum(order.wanted_shares(position)) == 1
    steps = [segment.from_sample for segment in order.segments]
    round_samples = order.columns * config.run
    assert all(step % round_samples == 0 for step in steps)
    for segment, (begin, end) in enumerate(zip(steps, [*steps[1:], steps[-1] + 6000], strict=True)):
        weights = order.segments[segment].weights
        assert order.wanted_shares(begin) == order.wanted_shares(end - 1) == [weight / TOTAL for weight in weights]
        gained = order.counts(end) - order.counts(begin)
        for got, weight in zip(gained.tolist(), weights, strict=True):
            assert abs(got - weight * (end - begin) / TOTAL) <= 2 * round_samples
            assert weight or not got


@settings(max_examples=12, deadline=None)
@given(mixture=mixtures, config=configs, data=st.data())
def test_uses_against_a_walk(mixture: MixtureConfig, config: OrderConfig, data: st.DataObject) -> None:
    """In the first 6,000 positions, over chunks of all sources; a pass is all uses in one epoch of the source."""
    order, end = make(mixture, config), 6000
    _, own = order._own_positions(np.arange(end))
    chunks = order.locate(np.arange(end)).chunk
    size = [order.chunk_samples(chunk)[2] for chunk in range(order.num_chunks)]
    for chunk in data.draw(st.lists(st.integers(0, order.num_chunks - 1), min_size=1, max_size=4)):
        number = order._source_of_chunk(chunk)[0]
        here = np.nonzero(chunks == chunk)[0]
        epochs = own[here] // order.orders[number].num_samples
        passes = [here[epochs == epoch] for epoch in np.unique(epochs)]
        position = data.draw(st.integers(0, 3000))
        use, ended = order.uses(chunk, position), not order.segments[-1].weights[number]
        earliest = next((found for found in passes if found[-1] >= position or found.size < size[chunk]), None)
        if earliest is None:
            assert use == (NEVER, NEVER) if ended else use.last >= end
        elif ended or earliest.size == size[chunk]:
            earliest = next((found for found in passes if found[-1] >= position), np.array([NEVER]))
            assert use == (earliest[0], earliest[-1])
        else:  # goes on behind the end of the walk
            assert use.last >= position


def test_chunk_samples_and_substitutes() -> None:
    order = make(mixture_of([0.5, 0.3, 0.2]), CONFIG)
    located = order.locate(np.arange(4000))
    for chunk in range(order.num_chunks):
        shard, first, size = order.chunk_samples(chunk)
        here = located.chunk == chunk
        assert set(located.shard[here].tolist()) == {shard}
        assert set(located.sample[here].tolist()) == set(range(first, first + size))
    for position in range(0, 300, 3):
        for attempt in (1, 2):
            shard, sample = order.substitute(position, attempt)
            assert order.source_of_shard[shard] == located.source[position]
            assert (shard, sample) != (located.shard[position], located.sample[position])
    assert order.num_samples == 73 + 212 + 5
    with pytest.raises(ValueError, match=f"chunk {order.num_chunks} of"):
        order.uses(order.num_chunks, 0)
    with pytest.raises(ValueError, match="0 or more, found -1"):
        order.locate([-1])


def test_state_round_trip_at_every_step() -> None:
    mixture = mixture_of([0.5, 0.3, 0.2], (300, [0.0, 1.0, 1.0]))
    order = make(mixture, CONFIG)
    expected = order.locate(np.arange(600))
    for position in range(0, 600, 24):
        state = json.loads(json.dumps(order.state(position)))
        again = MixtureOrder.from_state(state, mixture, counts_of(SIZES), CONFIG)
        assert again.state(position) == state
        for found, field in zip(again.locate(np.arange(position, 600)), expected, strict=True):
            assert np.array_equal(found, field[position:])
        order = copy.deepcopy(again)  # as pickling does


def resumed(position: int, mixture: MixtureConfig, sizes: Sequence[Sequence[int]] = SIZES) -> MixtureOrder:
    state = make(mixture_of([0.5, 0.3, 0.2], (240, [0.2, 0.3, 0.5])), CONFIG).state(position)
    return MixtureOrder.from_state(state, mixture, counts_of(sizes), CONFIG)


def test_later_weights_may_change() -> None:
    expected = make(mixture_of([0.5, 0.3, 0.2], (240, [0.2, 0.3, 0.5])), CONFIG).locate(np.arange(1000))
    for changed, same_until in (
        (mixture_of([0.5, 0.3, 0.2], (240, [0.2, 0.3, 0.5]), (480, [1, 0, 0])), 480),
        (mixture_of([50, 30, 20], (240, [2, 3, 5])), 1000),  # other numbers, same shares
        (mixture_of([0.5, 0.3, 0.2], (230, [0.2, 0.3, 0.5])), 1000),  # rounded up to 240
    ):
        found = resumed(400, changed).locate(np.arange(1000))
        assert np.array_equal(found.source[:same_until], expected.source[:same_until])
        assert np.array_equal(found.sample[:same_until], expected.sample[:same_until])
    resumed(240, mixture_of([0.5, 0.3, 0.2], (240, [1, 0, 0])))  # the old change had not begun
    resumed(100, mixture_of([0.5, 0.3, 0.2], (120, [0, 0, 1])))
    resumed(0, mixture_of([1, 0, 0]))


def test_a_source_is_added_in_a_resumed_run() -> None:
    grown = MixtureConfig(
        [*mixture_of([0.5, 0.3, 0.2]).sources, SourceConfig("/data/new", 0.0)],
        [WeightChange(240, [0.2, 0.3, 0.5, 0.0]), WeightChange(480, [0.25] * 4)],
    )
    expected = make(mixture_of([0.5, 0.3, 0.2], (240, [0.2, 0.3, 0.5])), CONFIG).locate(np.arange(480))
    order = resumed(456, grown, [*SIZES, [77]])
    found = order.locate(np.arange(480))
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one, other)
    assert 3 in order.locate(np.arange(480, 520)).source
    eager = MixtureConfig([*mixture_of([0.5, 0.3, 0.2]).sources, SourceConfig("/data/new", 0.1)], grown.schedule)
    with pytest.raises(ValueError, match="source new is new, but its weight before the checkpoint's position is not 0"):
        resumed(456, eager, [*SIZES, [77]])


@pytest.mark.parametrize(
    ("position", "mixture", "message"),
    [
        (400, mixture_of([0.5, 0.3, 0.2]), "weights from sample 240 are a 0.2, b 0.3, c 0.5 in the .* unchanged now"),
        (
            241,
            mixture_of([0.5, 0.3, 0.2], (240, [1, 0, 0])),
            "from sample 240 are a 0.2, b 0.3, c 0.5 in the checkpoint and a 1, b 0, c 0 now",
        ),
        (24, mixture_of([0.5, 0.2, 0.3], (240, [0.2, 0.3, 0.5])), "from sample 0 are a 0.5, b 0.3, c 0.2 in"),
        (
            400,
            mixture_of([0.5, 0.3, 0.2], (264, [0.2, 0.3, 0.5])),
            "from sample 240 are .*; the weights from sample 264",
        ),
    ],
)
def test_past_weights_may_not_change(position: int, mixture: MixtureConfig, message: str) -> None:
    with pytest.raises(ValueError, match=f"cannot continue from this checkpoint: .*{message}"):
        resumed(position, mixture)


def test_foreign_states_are_refused() -> None:
    mixture = mixture_of([0.5, 0.3, 0.2])
    order = make(mixture, CONFIG)
    state = order.state(48)
    for field, value in (("version", 9), ("seed", 1), ("run", 3), ("window", 17), ("chunk_bytes", 1), ("columns", 5)):
        with pytest.raises(ValueError, match=f"{field} is {value} in the checkpoint and .* now"):
            order.check_state({**state, field: value})
    for field, value in (("name", "z"), ("fingerprint", "0"), ("streams", 99)):
        sources = [dict(source) for source in state["sources"]]
        sources[1][field] = value
        with pytest.raises(ValueError, match=rf"{field} of source 1 \(.\) is '?{value}'? in the checkpoint and .* now"):
            order.check_state({**state, "sources": sources})
    with pytest.raises(ValueError, match=r"source 2 \(c\) is missing now: keep it, with weight 0"):
        MixtureOrder.from_state(state, mixture_of([0.5, 0.3]), counts_of(SIZES[:2]), CONFIG)
    with pytest.raises(ValueError, match=r"seed is 1 .*; window is 2 .*position is -4"):
        order.check_state({**state, "seed": 1, "window": 2, "position": -4})
    with pytest.raises(ValueError, match="malformed"):
        order.check_state({**state, "segments": [{}]})
    with pytest.raises(ValueError, match="no valid numbers of columns and streams"):
        MixtureOrder.from_state({**state, "columns": 0}, mixture, counts_of(SIZES), CONFIG)
    plain = Order([73], [73_000], OrderConfig(streams=2), "f")
    with pytest.raises(ValueError, match=r"it is of one data set \(data.train\)"):
        order.check_state(plain.state(48))
    with pytest.raises(ValueError, match=r"of a mixture of several sources, and data\.mixture names none now"):
        plain.check_state(state)


def test_configuration() -> None:
    given = OmegaConf.create({"sources": [{"path": "/x/a/"}, {"path": "s3://b/c", "weight": 2, "name": "web"}]})
    read = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(MixtureConfig), given))
    assert isinstance(read, MixtureConfig)
    assert read.names() == ["a", "web"]
    assert [source.weight for source in read.sources] == [1.0, 2.0]
    assert MixtureConfig().sources == []


@pytest.mark.parametrize(
    ("sources", "schedule", "message"),
    [
        ([], [WeightChange(5, [1.0])], "data.mixture.sources is empty"),
        ([SourceConfig()], [], r"sources\[0\].path is missing: name the folder"),
        ([SourceConfig("a/x"), SourceConfig("b/x")], [], r"sources\[0\] and \[1\] are both called 'x'; give one"),
        ([SourceConfig("a", -1.0)], [], r"sources \(their `weight`\): .*expected numbers of 0 or more"),
        ([SourceConfig("a", 0.0)], [], "at least one must be above 0"),
        ([SourceConfig("a")], [WeightChange(0, [1.0])], r"at_sample is 0; expected more than 0: .*own `weight`"),
        (
            [SourceConfig("a")],
            [WeightChange(9, [1.0]), WeightChange(9, [1.0])],
            r"\[1\].at_sample is 9; .* more than 9",
        ),
        ([SourceConfig("a")], [WeightChange(9, [1.0, 2.0])], r"schedule\[0\].weights has 2 weights for 1 sources"),
        ([SourceConfig("a")], [WeightChange(9, [0.0])], r"schedule\[0\].weights: .* above 0"),
    ],
)
def test_mistakes_in_the_configuration(sources: list[SourceConfig], schedule: list[WeightChange], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixtureConfig(sources, schedule)


def test_changes_within_one_round_are_refused() -> None:
    with pytest.raises(ValueError, match="change twice before sample 48: they can change every 24 samples"):
        make(mixture_of([1, 1, 1], (30, [1, 0, 0]), (40, [0, 1, 0])), CONFIG)
