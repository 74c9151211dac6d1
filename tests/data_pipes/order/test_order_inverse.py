"""The way back, from a chunk to its positions, against a walk over every position."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipes.order.epoch_plan import ChunkTable, EpochPlan
from data_pipes.order.hashing import feistel, feistel_inverse, hash_words
from data_pipes.order.order import Order, OrderConfig
from tools.bench_scale import Setup, node_positions, read_of_node

shard_sizes = st.lists(st.one_of(st.sampled_from([0, 1, 1, 2]), st.integers(0, 60)), min_size=1, max_size=7)
datasets = shard_sizes.filter(lambda counts: sum(counts) > 0)
configs = st.builds(
    OrderConfig,
    seed=st.integers(-5, 5),
    streams=st.integers(1, 80),
    run=st.integers(1, 9),
    window=st.integers(1, 30),
    chunk_bytes=st.integers(500, 20_000),
)


def make_order(samples: list[int], config: OrderConfig) -> Order:
    return Order(samples, [1000 * count for count in samples], config, "f")


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 5000), key=st.integers(0, 2**64 - 1))
def test_feistel_inverse(size: int, key: int) -> None:
    numbers, words = np.arange(size), hash_words(key)
    assert np.array_equal(feistel_inverse(feistel(numbers, size, words), size, words), numbers)
    assert np.array_equal(feistel(feistel_inverse(numbers, size, words), size, words), numbers)


def test_feistel_inverse_of_mixed_sizes_and_keys() -> None:
    sizes = np.array([1, 2, 3, 77, 4096, 4097, 2**40 + 1, 2**53])
    keys = hash_words(9, np.arange(8))
    index = sizes - 1
    assert np.array_equal(feistel_inverse(feistel(index, sizes, keys), sizes, keys), index)


@settings(max_examples=120, deadline=None)
@given(samples=datasets, config=configs, epoch=st.integers(0, 3))
def test_positions_of_every_chunk(samples: list[int], config: OrderConfig, epoch: int) -> None:
    order, count = make_order(samples, config), sum(samples)
    positions = np.arange(epoch * count, (epoch + 1) * count)
    located = order.locate(positions)
    assert sorted(zip(located.shard.tolist(), located.sample.tolist(), strict=True)) == [
        (shard, sample) for shard, size in enumerate(samples) for sample in range(size)
    ]
    assert not located.source.any()
    for chunk in range(order.num_chunks):
        here = located.chunk == chunk
        assert order.positions_of(chunk, epoch).tolist() == positions[here].tolist()
        shard, first, size = order.chunk_samples(chunk)
        assert set(located.shard[here].tolist()) == {shard}
        assert sorted(located.sample[here].tolist()) == list(range(first, first + size))


@settings(max_examples=60, deadline=None)
@given(samples=datasets, config=configs, data=st.data())
def test_uses_against_a_walk(samples: list[int], config: OrderConfig, data: st.DataObject) -> None:
    order, count = make_order(samples, config), sum(samples)
    chunk = data.draw(st.integers(0, order.num_chunks - 1))
    here = np.nonzero(order.locate(np.arange(4 * count)).chunk == chunk)[0]
    passes = [here[here // count == epoch] for epoch in range(4)]
    for position in data.draw(st.lists(st.integers(0, 3 * count), max_size=8)):
        expected = next(found for found in passes if found[-1] >= position)
        assert order.uses(chunk, position) == (expected[0], expected[-1])
        assert type(order.uses(chunk, position).first) is int


def test_uses_walks_over_the_passes() -> None:
    order = make_order([40, 25], OrderConfig(streams=2, run=4, window=10, chunk_bytes=7000))
    position, seen = 0, []
    for epoch in range(5):
        use = order.uses(3, position)
        assert use.first // 65 == use.last // 65 == epoch
        seen.append(use)
        assert order.uses(3, use.first) == order.uses(3, use.last) == use
        position = use.last + 1
    assert len(set(seen)) == 5


def test_chunk_numbers_are_checked() -> None:
    order = make_order([40], OrderConfig(streams=2, chunk_bytes=7000))
    for chunk in (-1, order.num_chunks):
        with pytest.raises(ValueError, match=f"chunk {chunk} of 6; expected 0 to 5"):
            order.chunk_samples(chunk)
        with pytest.raises(ValueError, match=f"chunk {chunk} of 6"):
            order.uses(chunk, 0)


@pytest.mark.parametrize("largest", [3, 5000, 2**40])
@pytest.mark.parametrize("num_chunks", [1, 63, 64, 65, 1000, (1 << 17) + 70])
def test_plan_against_a_whole_line(num_chunks: int, largest: int) -> None:
    """Over the bounds of groups and blocks, in each of the types that offsets have."""
    key = hash_words(num_chunks)
    sizes = 1 + feistel(np.arange(num_chunks), num_chunks, key) * 977 % largest
    table = ChunkTable(sizes, np.ones(num_chunks, np.int64))
    assert np.array_equal(table.sizes(), sizes)
    plan = EpochPlan(table.sizes(), key)
    line = feistel(np.arange(num_chunks), num_chunks, key)
    ends = np.cumsum(sizes[line])
    rank = np.linspace(0, num_chunks - 1, 300).astype(int)
    for slots, within in ((ends[rank] - 1, sizes[line[rank]] - 1), (ends[rank] - sizes[line[rank]], 0 * rank)):
        chunk, sample = plan.find(slots)
        assert np.array_equal(chunk, line[rank])
        assert np.array_equal(sample, within)
    assert [plan.first_slot(int(line[r])) for r in rank[::30]] == (ends - sizes[line])[rank[::30]].tolist()


def test_threads_share_the_plans() -> None:
    """Many threads over more epochs than plans are kept."""
    order = make_order([300, 200], OrderConfig(streams=3, run=2, window=50, chunk_bytes=5000))
    expected = make_order([300, 200], order.config).locate(np.arange(5000))
    wrong: list[int] = []

    def walk(start: int) -> None:
        positions = range(start, 5000, 97)
        wrong.extend(p for p in positions if order.locate([p]).sample[0] != expected.sample[p])

    threads = [threading.Thread(target=walk, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(order._plans) == 3


@pytest.mark.parametrize("ranks", [16, 32, 64])
@pytest.mark.parametrize("is_mixture", [False, True])
def test_a_node_reads_what_it_uses(ranks: int, is_mixture: bool) -> None:
    """One pass over the data, one stream per row of the batch: nodes share next to no chunk in a divisor topology."""
    setup = Setup(num_samples=400_000, num_shards=100, global_batch=512, ranks=ranks)
    config = OrderConfig(streams=64, window=512)
    order = setup.mixture(config) if is_mixture else setup.order(config)
    steps = order.num_samples // setup.global_batch
    # of each large source, its streams' windows and three more chunks (of 84 samples) of each; the small one whole
    room = 64 * 8 // ranks * (512 + 3 * 84) * (2 if is_mixture else 1) + (4000 if is_mixture else 0)
    for node in (0, ranks // 8 - 1):
        own = node_positions(0, steps, 512, ranks, node)
        reading = read_of_node(order, own, cache_bytes=room * 100_000)
        assert reading.samples == steps * 512 * 8 // ranks
        assert reading.amplification <= reading.all_whole < 1.1
        assert reading.read_singly < 0.03  # chunks at the bounds between nodes
        assert read_of_node(order, own, cache_bytes=0).read_singly == 1


def test_streams_that_do_not_fit_the_batch_cost_no_reading() -> None:
    """With 58 streams for 64 rows, each of the 4 nodes needs a part of every chunk: it reads its samples singly."""
    setup = Setup(num_samples=400_000, num_shards=100, global_batch=512, ranks=32)
    own = node_positions(0, 781, 512, 32, node=1)
    reading = read_of_node(setup.order(OrderConfig(streams=58)), own, cache_bytes=1 << 40)
    assert reading.all_whole > 3.5
    assert reading.amplification < 1.1
    assert reading.read_singly > 0.9
