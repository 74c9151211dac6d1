"""The order against a literal reference, written from the definition in pure Python, and its promises as properties."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipes.order.hashing import feistel, hash64, hash_uniform, hash_words
from data_pipes.order.order import STATE_VERSION, Order, OrderConfig

WORD = (1 << 64) - 1


def slow_mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & WORD
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
    return x ^ (x >> 31)


def slow_hash(*parts: int) -> int:
    state = 0
    for part in parts:
        state = slow_mix(state ^ (part & WORD))
    return state


def slow_permuted(index: int, size: int, key: int) -> int:
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    while True:
        left, right = index >> half, index & ((1 << half) - 1)
        for number in (1, 2, 3, 4):
            left, right = right, left ^ (slow_mix(right ^ slow_mix(key ^ number)) & ((1 << half) - 1))
        index = (left << half) | right
        if index < size:
            return index


def slow_epoch(samples: list[int], sizes: list[int], config: OrderConfig, epoch: int) -> Iterator[tuple[int, int]]:
    """(shard, sample) of every position of an epoch, by building the whole line and dealing it out."""
    assert config.streams is not None
    chunks: list[list[tuple[int, int]]] = []
    for shard, (count, size) in enumerate(zip(samples, sizes, strict=True)):
        number = min(count, max(1, -(-size // config.chunk_bytes)))
        bounds = [count * c // number for c in range(number + 1)] if number else []
        chunks += [[(shard, i) for i in range(low, high)] for low, high in pairwise(bounds)]
    key = slow_hash(config.seed, epoch, 1)
    line = [place for rank in range(len(chunks)) for place in chunks[slow_permuted(rank, len(chunks), key)]]
    length, longer = divmod(len(line), config.streams)
    streams: list[list[tuple[int, int]]] = []
    for number in range(config.streams):
        part, line = line[: length + (number < longer)], line[length + (number < longer) :]
        shuffled = []
        for window, begin in enumerate(range(0, len(part), config.window)):
            slots = part[begin : begin + config.window]
            window_key = slow_hash(config.seed, epoch, 2, number, window)
            shuffled += [slots[slow_permuted(i, len(slots), window_key)] for i in range(len(slots))]
        streams.append(shuffled)
    taken = 0
    while taken < length:
        step = min(config.run, length - taken)
        for stream in streams:
            yield from stream[taken : taken + step]
        taken += step
    for stream in streams[:longer]:
        yield stream[length]


def make_order(samples: list[int], config: OrderConfig, bytes_per_sample: int = 1000) -> Order:
    return Order(samples, [count * bytes_per_sample for count in samples], config, "f" * 64)


datasets = st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(lambda counts: sum(counts) > 0)
configs = st.builds(
    OrderConfig,
    seed=st.integers(-5, 5),
    streams=st.integers(1, 12),
    run=st.integers(1, 9),
    window=st.integers(1, 30),
    chunk_bytes=st.integers(500, 20_000),
)


@settings(max_examples=60, deadline=None)
@given(samples=datasets, config=configs, epoch=st.integers(0, 3))
def test_equals_the_literal_reference(samples: list[int], config: OrderConfig, epoch: int) -> None:
    order = make_order(samples, config)
    count = sum(samples)
    located = order.locate(np.arange(epoch * count, (epoch + 1) * count))
    found = list(zip(located.shard.tolist(), located.sample.tolist(), strict=True))
    assert found == list(slow_epoch(samples, [1000 * count for count in samples], config, epoch))
    assert len(set(found)) == count  # an exact permutation


@settings(max_examples=40, deadline=None)
@given(samples=datasets, config=configs, data=st.data())
def test_a_position_alone_decides(samples: list[int], config: OrderConfig, data: st.DataObject) -> None:
    order, count = make_order(samples, config), sum(samples)
    positions = data.draw(st.lists(st.integers(0, 5 * count), min_size=1, max_size=30))
    together = order.locate(positions)
    alone = [make_order(samples, config).locate([position]) for position in positions]
    for field in range(4):
        assert together[field].tolist() == [int(one[field][0]) for one in alone]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 50, 1000])
def test_exact_for_data_smaller_than_streams_and_runs(count: int) -> None:
    order = make_order([count], OrderConfig(streams=24, run=8, window=16, chunk_bytes=3000))
    for epoch in (0, 1, 10**6):
        located = order.locate(np.arange(epoch * count, (epoch + 1) * count))
        assert sorted(located.sample.tolist()) == list(range(count))


def test_epochs_and_seeds_differ() -> None:
    def first_epoch(seed: int, epoch: int) -> list[int]:
        order = make_order([500, 500], OrderConfig(seed=seed, streams=4, window=100, chunk_bytes=20_000))
        located = order.locate(np.arange(epoch * 1000, epoch * 1000 + 1000))
        return (located.shard * 500 + located.sample).tolist()

    orders = [first_epoch(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert sum(a == b for a, b in zip(one, other, strict=True)) < 30  # 1 is expected of 1,000


def test_never_changes() -> None:
    """Checkpoints of older versions depend on these numbers: a change of them needs a new STATE_VERSION."""
    assert hash64() == 0
    assert hash64(1, 2, 3) == slow_hash(1, 2, 3) == 0xD0734750FDE362B3
    order = make_order([30, 20], OrderConfig(seed=7, streams=3, run=4, window=8, chunk_bytes=5000))
    assert order.locate(np.arange(10)).sample.tolist() == [5, 21, 22, 23, 25, 28, 13, 12, 4, 2]
    assert hash_uniform(1, [5], 0, 2)[0].tolist() == [0.060424497624440354, 0.1333922398568681]


@pytest.mark.parametrize(
    ("samples", "bytes_per_sample", "config", "digest"),
    [
        (
            [7, 0, 1, 40, 13, 1, 1, 0, 300, 25],
            1000,
            OrderConfig(seed=3, streams=5, run=3, window=17, chunk_bytes=9000),
            "1b0bfd6fc3cd063c2d31b17c7e55e064328a600ce984be993fe0c174ab827aa6",
        ),
        (  # more streams than samples
            [5, 1, 4],
            1000,
            OrderConfig(seed=-2, streams=24, run=8, window=16, chunk_bytes=2000),
            "f5cc97c02179345d4a62f1e776f3721a302c9aa06a79d7935ebf6ed645982bb3",
        ),
        (
            [11_111] * 90 + [3, 1],
            100_000,
            OrderConfig(seed=2**40, streams=24, run=8, window=512, chunk_bytes=8 << 20),
            "9f8c776c8457b35a9d9d076ff27ecf65a47aa078e9bfafd37b9e23777c424179",
        ),
        (  # fewer chunks than streams
            [200_000, 70_000],
            100,
            OrderConfig(seed=1, streams=3, run=4, window=4096, chunk_bytes=8 << 20),
            "0a0be6fe1603c223beae2a5f454645ec23f8eec30d89f2bc736eb01336a25255",
        ),
    ],
)
def test_the_first_release_order_is_kept(
    samples: list[int], bytes_per_sample: int, config: OrderConfig, digest: str
) -> None:
    """Digests of places and substitutes, made with the first release: running trainings go on with this order."""
    order, count = make_order(samples, config, bytes_per_sample), sum(samples)
    found = hashlib.sha256()
    for epoch in (0, 1, 10**6):
        begin, end = np.arange(min(count, 3000)), np.arange(max(0, count - 3000), count)
        positions = np.unique(np.concatenate([begin, end, np.arange(0, count, max(1, count // 5000))])) + epoch * count
        located = order.locate(positions)
        for places in (located.shard, located.sample, located.chunk):
            found.update(places.astype("<i8").tobytes())
        for position in positions[:: max(1, len(positions) // 20)].tolist():
            found.update(repr([order.substitute(position, attempt) for attempt in (1, 2, 3)]).encode())
    assert found.hexdigest() == digest
    assert STATE_VERSION == 1


def test_large_data_needs_no_memory_per_sample() -> None:
    order = Order([10**9] * 4, [10**12] * 4, OrderConfig(streams=4096, chunk_bytes=1 << 30), "f")
    located = order.locate([0, 4 * 10**9 - 1, 10**17])
    assert order.num_chunks == 4 * 932
    assert (located.sample < 10**9).all()
    assert order._plan(0).size_bytes < 5 * order.num_chunks + 1000


def test_a_plan_takes_two_bytes_per_chunk() -> None:
    order = Order([10_000] * 50, [10**9] * 50, OrderConfig(streams=24), "f")
    assert order.num_chunks == 50 * 120
    assert order._plan(0).size_bytes < 2.2 * order.num_chunks + 1000


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 3000), key=st.integers(0, WORD))
def test_feistel_permutes(size: int, key: int) -> None:
    image = feistel(np.arange(size), size, hash_words(key))
    assert np.array_equal(np.sort(image), np.arange(size))
    assert image[0] == slow_permuted(0, size, slow_hash(key))


def test_uniform_numbers() -> None:
    numbers = hash_uniform(3, np.arange(4000), 0, 5)
    assert numbers.shape == (4000, 5)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert np.allclose(numbers.mean(0), 0.5, atol=0.02)
    assert np.allclose(numbers.var(0), 1 / 12, atol=0.005)
    assert np.abs(np.corrcoef(numbers.T) - np.eye(5)).max() < 0.06
    assert np.array_equal(numbers[17], hash_uniform(3, [17], 0, 5)[0])
    assert not np.array_equal(numbers[17], hash_uniform(3, [17], 1, 5)[0])
    assert not np.array_equal(numbers[17], hash_uniform(4, [17], 0, 5)[0])


def test_substitutes_come_from_the_same_window() -> None:
    config = OrderConfig(streams=2, run=4, window=10, chunk_bytes=7000)
    order = make_order([40, 25], config)
    epoch = list(slow_epoch([40, 25], [40_000, 25_000], config, 0))
    lines = [[epoch[p] for p in range(65) if order._stream_offsets(np.array([p]))[0][0] == s] for s in (0, 1)]
    for position in range(65):
        stream, offset = (int(value[0]) for value in order._stream_offsets(np.array([position])))
        window = lines[stream][offset // 10 * 10 : offset // 10 * 10 + 10]
        found = [order.substitute(position, attempt) for attempt in range(1, 7)]
        assert set(found) <= set(window) - {epoch[position]}
        assert len(set(found)) > (1 if len(window) > 2 else 0)
        assert found == [make_order([40, 25], config).substitute(position, attempt) for attempt in range(1, 7)]


def test_substitute_of_a_lonely_sample() -> None:
    order = make_order([9], OrderConfig(streams=9, run=1, window=1))
    own = int(order.locate([4]).sample[0])
    assert own not in {order.substitute(4, attempt)[1] for attempt in range(1, 30)}
    assert make_order([1], OrderConfig(streams=1)).substitute(5, 1) == (0, 0)


def test_state_round_trip() -> None:
    config = OrderConfig(seed=1)
    order = make_order([300, 200], config.with_streams(500, 16))
    state = json.loads(json.dumps(order.state(12345)))
    again = Order.from_state(state, [300, 200], [300_000, 200_000], config, "f" * 64)
    assert again.config == order.config
    assert again.locate([12345]) == order.locate([12345])
    assert copy.deepcopy(order).locate([77]) == order.locate([77])  # as pickling does, without plans and locks


@pytest.mark.parametrize(
    ("field", "value"),
    [("fingerprint", "0" * 64), ("seed", 5), ("run", 3), ("window", 17), ("chunk_bytes", 1), ("version", 9)],
)
def test_a_foreign_state_is_refused(field: str, value: object) -> None:
    order = make_order([300], OrderConfig(streams=2))
    with pytest.raises(ValueError, match=f"cannot continue.*{field} is {value!r} in the checkpoint and .* now"):
        order.check_state({**order.state(0), field: value})


def test_invalid_states_and_parameters() -> None:
    order = make_order([300], OrderConfig(streams=2))
    with pytest.raises(ValueError, match="position is -1"):
        order.check_state({**order.state(0), "position": -1})
    with pytest.raises(ValueError, match="streams is 2 in the checkpoint and 3 now"):
        Order.from_state(order.state(0), [300], [300_000], OrderConfig(streams=3), "f" * 64)
    with pytest.raises(ValueError, match="no valid number of streams"):
        Order.from_state({}, [300], [300_000], OrderConfig(), "f" * 64)
    with pytest.raises(ValueError, match=r"data\.order\.run is 0"):
        OrderConfig(run=0)
    with pytest.raises(ValueError, match="positions are 0 or more, found -3"):
        order.locate([4, -3])
    with pytest.raises(ValueError, match="no sample"):
        make_order([0], OrderConfig(streams=1))
    with pytest.raises(ValueError, match="with_streams"):
        make_order([5], OrderConfig())


@pytest.mark.parametrize(
    ("num_samples", "global_batch", "streams"),
    [(2_000_000_000, 4096, 2048), (50_000, 256, 12), (1_281_167, 256, 128), (100, 4096, 1), (10**9, 1, 4)],
)
def test_number_of_streams(num_samples: int, global_batch: int, streams: int) -> None:
    assert OrderConfig().with_streams(num_samples, global_batch).streams == streams
