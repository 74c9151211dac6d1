"""The chunk cache: what is in it is right, its cap is hard, and no kill leaves anything behind."""

from __future__ import annotations

import logging
import math
import os
import pickle
import resource
import signal
import sqlite3
import subprocess
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipes.cache import chunk_file
from data_pipes.cache.cache import PINNED, ChunkCache, chunk_key, open_cache
from data_pipes.cache.chunk_file import BLOCK_BYTES, file_bytes
from data_pipes.cache.folder import CacheConfig
from tests.process_server import Forked, ProcessServer

MIB = 1 << 20
MakeCache = Callable[..., ChunkCache]
StartChild = Callable[..., Forked]


def key_of(number: int) -> str:
    return chunk_key("s3://bucket/0.tar", "etag", 1 << 40, number, 1)


def data_of(number: int, size: int = MIB) -> bytes:
    return (number.to_bytes(4, "little") * (size // 4 + 1))[:size]


def disk_bytes(folder: Path) -> int:
    """As `du` counts: blocks of everything in the folder, the folder itself included."""
    total = folder.stat().st_blocks
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_blocks
        except FileNotFoundError:
            continue
    return total * 512


@pytest.fixture
def make_cache(tmp_path: Path) -> MakeCache:
    return lambda max_bytes=64 * MIB: ChunkCache(CacheConfig(str(tmp_path / "cache"), max_bytes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def room_for(num_chunks: int, size: int = MIB) -> int:
    """A cap that so many chunks fit in, and no more: behind the index, each in whole blocks and one more."""
    return MIB + (64 << 10) + 8192 + num_chunks * (-(-file_bytes(size) // 4096) + 1) * 4096


def test_parts_of_what_was_put(make_cache: MakeCache) -> None:
    cache = make_cache()
    data = os.urandom(3 * BLOCK_BYTES + 1234)
    assert cache.read(key_of(0), 0, 10) is None
    assert not cache.contains(key_of(0))
    assert cache.put(key_of(0), data, PINNED)
    assert cache.contains(key_of(0))
    for offset, length in (
        (0, len(data)),
        (0, 1),
        (BLOCK_BYTES - 1, 2),
        (BLOCK_BYTES, BLOCK_BYTES),
        (5, 0),
        (len(data) - 1, 1),
        (len(data), 0),
        (2 * BLOCK_BYTES + 7, BLOCK_BYTES + 1227),
    ):
        for other in (cache, make_cache()):  # the second has checked nothing yet
            assert other.read(key_of(0), offset, length) == data[offset : offset + length]
    assert cache.counters.peek()["cache_hits"] == 8
    assert cache.counters.peek()["cache_hit_bytes"] == sum(map(len, (data, b".", b"..", b"." * BLOCK_BYTES))) + 1 + (
        BLOCK_BYTES + 1227
    )
    for offset, length in ((0, len(data) + 1), (len(data), 1), (-1, 1)):
        with pytest.raises(ValueError, match=r"of a chunk of 99,538 bytes"):
            cache.read(key_of(0), offset, length)


def test_keys_tell_objects_versions_and_ranges_apart() -> None:
    places = [("u", None, 9, 0, 1), ("v", None, 9, 0, 1), ("u", "e", 9, 0, 1), ("u", "None", 9, 0, 1)]
    places += [("u", None, 8, 0, 1), ("u", None, 9, 1, 1), ("u", None, 9, 0, 2)]
    assert len({chunk_key(*place) for place in places}) == len(places)
    assert chunk_key(*places[0]) == chunk_key(*places[0])


def test_it_survives_pickling_and_a_new_process_finds_the_chunks(make_cache: MakeCache, folder: Path) -> None:
    cache = make_cache()
    assert cache.put(key_of(1), data_of(1), 5.0)
    again = pickle.loads(pickle.dumps(cache))
    assert again.read(key_of(1), 0, MIB) == data_of(1)
    cache.close()
    again.close()
    assert again.read(key_of(1), 0, MIB) == data_of(1), "a closed cache opens again"
    assert os.listdir(folder / "owners") == []


# ---------------------------------------------------------------------------------------------- eviction


class Model:
    """The cache as a slow list."""

    def __init__(self, num_slots: int, num_owners: int) -> None:
        self.num_slots, self.present = num_slots, list[int]()  # in the order of being put
        self.claims: list[dict[int, float]] = [{} for _ in range(num_owners)]

    def next_use(self, chunk: int) -> float:
        return min((claims.get(chunk, math.inf) for claims in self.claims), default=math.inf)

    def put(self, owner: int, chunk: int, next_use_s: float) -> bool:
        if chunk not in self.present:
            if len(self.present) == self.num_slots:
                candidates = [c for c in self.present if self.next_use(c) not in (PINNED,)]
                candidates = [c for c in candidates if self.next_use(c) >= next_use_s]
                if not candidates:
                    return False
                victim = max(candidates, key=lambda c: (self.next_use(c), -self.present.index(c)))
                self.present.remove(victim)
                for claims in self.claims:
                    claims.pop(victim, None)
            self.present.append(chunk)
        self.claim(owner, chunk, next_use_s)
        return True

    def claim(self, owner: int, chunk: int, next_use_s: float) -> None:
        if chunk in self.present:
            self.claims[owner][chunk] = next_use_s


TIMES = st.sampled_from([PINNED, 1.0, 2.0, 3.0, 4.0, math.inf])
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 1), st.integers(0, 9), TIMES),
        st.tuples(st.just("claim"), st.integers(0, 1), st.integers(0, 9), TIMES),
        st.tuples(st.just("die"), st.integers(0, 1), st.just(0), st.just(0.0)),
    ),
    max_size=40,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(actions=ACTIONS)
def test_eviction_agrees_with_a_slow_model(
    tmp_path_factory: pytest.TempPathFactory, actions: list[tuple[str, int, int, float]]
) -> None:
    folder, size = tmp_path_factory.mktemp("model") / "cache", 800_000
    config = CacheConfig(str(folder), room_for(4, size))
    caches, model = [ChunkCache(config), ChunkCache(config)], Model(4, 2)
    for kind, owner, chunk, next_use_s in actions:
        if kind == "put":
            assert caches[owner].put(key_of(chunk), data_of(chunk, size), next_use_s) == model.put(
                owner, chunk, next_use_s
            )
        elif kind == "claim":
            caches[owner].set_next_use({key_of(chunk): next_use_s})
            model.claim(owner, chunk, next_use_s)
        else:  # what the kernel does when a process ends: its descriptors are closed
            caches[owner] = ChunkCache(config)
            model.claims[owner] = {}
        assert [chunk for chunk in range(10) if caches[0].contains(key_of(chunk))] == sorted(model.present)
        assert disk_bytes(folder) <= config.max_bytes
    for chunk in model.present:
        assert caches[1].read(key_of(chunk), 0, size) == data_of(chunk, size)


def test_nothing_is_evicted_for_what_cannot_fit(make_cache: MakeCache, folder: Path) -> None:
    cache = make_cache(room_for(4))
    for number, next_use_s in enumerate((PINNED, 5.0, 6.0, 7.0)):
        assert cache.put(key_of(number), data_of(number), next_use_s)
    assert not cache.put(key_of(4), data_of(4, 3 * MIB), 5.5), "only two chunks are needed later"
    assert not cache.put(key_of(4), data_of(4, 9 * MIB), PINNED), "larger than the cache"
    assert [cache.contains(key_of(number)) for number in range(5)] == [True] * 4 + [False]
    assert cache.counters.take() == {"cache_refused": 2}
    assert [cache.has_room(size, 5.5) for size in (2 * MIB, 3 * MIB)] == [True, False]
    assert cache.put(key_of(4), data_of(4, 2 * MIB), 5.5)
    assert [cache.contains(key_of(number)) for number in range(5)] == [True, True, False, False, True]
    assert cache.counters.take() == {"cache_evictions": 2}


def test_the_smaller_cap_holds_for_its_own_puts(make_cache: MakeCache, folder: Path) -> None:
    large, small = make_cache(64 * MIB), make_cache(room_for(4))
    for number in range(10):
        assert large.put(key_of(number), data_of(number), math.inf)
    assert disk_bytes(folder) > small.config.max_bytes
    assert small.put(key_of(10), data_of(10), 1.0)
    assert disk_bytes(folder) <= small.config.max_bytes
    assert [number for number in range(11) if large.contains(key_of(number))] == [7, 8, 9, 10]


def test_an_evicted_chunk_frees_its_space_though_a_reader_has_it_open(make_cache: MakeCache, folder: Path) -> None:
    reader, writer = make_cache(), make_cache(room_for(2, 2 * MIB))
    assert writer.put(key_of(0), data_of(0, 2 * MIB), 9.0)
    assert reader.read(key_of(0), 100, 1000) == data_of(0, 2 * MIB)[100:1100]
    (handle,) = (chunk._handle for chunk in reader._open.values())
    for number in (1, 2):
        assert writer.put(key_of(number), data_of(number, 2 * MIB), 5.0)
    assert os.fstat(handle).st_blocks == 0
    assert reader.read(key_of(0), 100, 1000) is None
    assert "cache_corrupt" not in reader.counters.peek()
    assert writer.put(key_of(0), data_of(7, 2 * MIB), PINNED)  # back again: another file
    assert reader.read(key_of(0), 100, 1000) == data_of(7, 2 * MIB)[100:1100]


# ---------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("damage", ["flip", "cut", "cut in the head", "grown", "other", "head"])
def test_damage_on_the_disk_is_found_and_removed(
    make_cache: MakeCache, folder: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    data = os.urandom(5 * BLOCK_BYTES)
    make_cache().put(key_of(0), data, 1.0)
    make_cache().put(key_of(1), data, 1.0)
    path = folder / f"{key_of(0)}.chunk"
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-2 * BLOCK_BYTES] ^= 16
    elif damage == "head":
        content[50] ^= 1
    elif damage == "other":
        content = bytearray((folder / f"{key_of(1)}.chunk").read_bytes())
    path.write_bytes(
        {"cut": content[:-1], "cut in the head": content[:30], "grown": content + b"x"}.get(damage, content)
    )
    cache = make_cache()
    if damage == "flip":
        assert cache.read(key_of(0), 0, 3 * BLOCK_BYTES) == data[: 3 * BLOCK_BYTES], "other blocks can be used"
    before = cache.status().used_bytes
    assert cache.read(key_of(0), BLOCK_BYTES, 3 * BLOCK_BYTES) is None
    assert cache.counters.peek()["cache_corrupt"] == 1
    assert "damaged" in caplog.text
    assert not cache.contains(key_of(0))
    assert cache.status().used_bytes <= before - len(data)
    assert cache.read(key_of(1), 0, len(data)) == data
    assert cache.put(key_of(0), data, 1.0)
    assert make_cache().read(key_of(0), 0, len(data)) == data


def test_a_chunk_cut_while_it_is_open(make_cache: MakeCache, folder: Path) -> None:
    cache = make_cache()
    cache.put(key_of(0), data_of(0), 1.0)
    assert cache.read(key_of(0), 0, MIB) == data_of(0)
    os.truncate(folder / f"{key_of(0)}.chunk", MIB // 2)
    assert cache.read(key_of(0), 0, 1000) == data_of(0, 1000)
    assert cache.read(key_of(0), MIB - 1000, 1000) is None
    assert cache.counters.peek()["cache_corrupt"] == 1


@pytest.mark.parametrize("damage", [b"not a database" * 1000, b""])
def test_a_damaged_index_costs_the_chunks_and_nothing_else(make_cache: MakeCache, folder: Path, damage: bytes) -> None:
    cache = make_cache()
    assert cache.put(key_of(0), data_of(0), 1.0)
    (folder / "index.sqlite").write_bytes(damage)
    if damage:
        assert not cache.put(key_of(1), data_of(1), 1.0)
    else:
        cache = make_cache()  # an empty database is a new one; what it does not know is swept
    assert cache.put(key_of(1), data_of(1), 1.0)
    assert make_cache().read(key_of(1), 0, MIB) == data_of(1)
    assert make_cache().read(key_of(0), 0, MIB) is None
    assert cache.status().num_chunks == 1


def test_files_and_rows_without_their_other_half_go(make_cache: MakeCache, folder: Path) -> None:
    cache = make_cache()
    for number in range(3):
        assert cache.put(key_of(number), data_of(number), 1.0)
    cache.close()
    (folder / f"{key_of(0)}.chunk").unlink()
    (folder / f"{key_of(8)}.chunk").write_bytes(bytes(MIB))
    (folder / f"{key_of(9)}.7.part").write_bytes(bytes(MIB))
    cache = make_cache()
    cache.set_next_use({key_of(1): 3.0})
    assert sorted(path.suffix for path in folder.iterdir() if len(path.name) > 60) == [".chunk", ".chunk"]
    assert cache.status().num_chunks == 2


# ---------------------------------------------------------------------------------------------- disks that fail


def test_a_full_disk_never_stops_the_run(
    make_cache: MakeCache, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache, real_write = make_cache(), os.write
    space = [MIB // 2]

    def write(handle: int, data: memoryview) -> int:
        if space[0] <= 0:
            raise OSError(28, "No space left on device")
        count = real_write(handle, data[: space[0]])
        space[0] -= count
        return count

    monkeypatch.setattr(chunk_file.os, "write", write)
    caplog.set_level(logging.WARNING)
    before = cache.status().used_bytes
    for number in range(3):
        assert not cache.put(key_of(number), data_of(number), PINNED)
        assert cache.read(key_of(number), 0, 10) is None
    assert cache.counters.peek() == {"cache_refused": 3}
    assert len([record for record in caplog.records if "No space left" in record.getMessage()]) == 1
    assert list(folder.glob("*.part")) == []
    assert cache.status().used_bytes == before
    monkeypatch.undo()
    assert cache.put(key_of(0), data_of(0), PINNED)


def test_a_folder_that_goes_away_never_stops_the_run(make_cache: MakeCache, folder: Path) -> None:
    cache = make_cache()
    assert cache.put(key_of(0), data_of(0), PINNED)
    subprocess.run(["rm", "-r", folder], check=True)
    assert not cache.put(key_of(1), data_of(1), PINNED)
    cache.set_next_use({key_of(0): 4.0})
    assert not cache.contains(key_of(0))
    assert cache.read(key_of(1), 0, 1) is None
    cache.close()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (CacheConfig(None), "expected a folder on a local disk"),
        (CacheConfig("s3://bucket/cache"), "expected a folder on a local disk"),
        (CacheConfig("cache", 0), r"max_bytes is 0; expected at least 2,097,152"),
        (CacheConfig("cache", -5), "expected at least"),
        (CacheConfig("file/cache"), "cannot be used .* name one on a local disk"),
        (CacheConfig("full"), r"it holds other things, e.g. 'thesis.tex'"),
    ],
)
def test_what_no_cache_can_be_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: CacheConfig, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(ValueError, match=words):
        ChunkCache(config)
    assert os.listdir(tmp_path / "full") == ["thesis.tex"]


def test_a_cache_of_another_version_is_refused(make_cache: MakeCache, folder: Path) -> None:
    make_cache()
    database = sqlite3.connect(folder / "index.sqlite")
    database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(ValueError, match="a cache of version 99, this program has version 1; name another folder"):
        make_cache()


def test_mistakes_in_calls(make_cache: MakeCache) -> None:
    cache = make_cache()
    with pytest.raises(ValueError, match="is no key of a chunk"):
        cache.put("../../etc", b"x", 1.0)
    with pytest.raises(ValueError, match="is no key of a chunk"):
        cache.read("x" * 64, 0, 1)
    for time_s in (-1.0, math.nan):
        with pytest.raises(ValueError, match=r"expected seconds of time.time\(\)"):
            cache.put(key_of(0), b"x", time_s)
        with pytest.raises(ValueError, match=r"expected seconds of time.time\(\)"):
            cache.set_next_use({key_of(0): time_s})


# ---------------------------------------------------------------------------------------------- several processes

_CHILD = """
import os, signal, sys, time
from data_pipes.cache import chunk_file
from data_pipes.cache.cache import PINNED, CacheConfig, ChunkCache
from tests.data_pipes.cache.test_cache import MIB, data_of, key_of
cache = ChunkCache(CacheConfig({folder!r}, {max_bytes}))
"""


@pytest.fixture
def start(process_server: ProcessServer, folder: Path) -> Iterator[StartChild]:
    children = []

    def start(max_bytes: int, *parts: str) -> Forked:
        script = _CHILD.format(folder=str(folder), max_bytes=max_bytes)
        script += "\n".join(map(textwrap.dedent, parts))
        children.append(process_server.open("tests.data_pipes.cache.test_cache:run_script", script))
        return children[-1]

    yield start
    for child in children:
        child.kill()


def run_script(script: str) -> None:
    """In a process of its own."""
    exec(script, {})


def wait_for_line(process: Forked) -> str:
    line = process.stdout.readline().strip()
    assert line, "the child ended early"
    return line


PLACES = {
    "in the middle of the bytes": """
        real = os.write
        def write(handle, data):
            if space[0] <= 0:
                print("now", flush=True); time.sleep(10_000)
            space[0] -= (count := real(handle, data[:100_000]))
            return count
        space = [300_000]
        chunk_file.os.write = write
        """,
    "before the rename": """
        def replace(*paths):
            print("now", flush=True); time.sleep(10_000)
        os.replace = replace
        """,
    "behind the rename": """
        real = os.replace
        def replace(*paths):
            real(*paths)
            print("now", flush=True); time.sleep(10_000)
        os.replace = replace
        """,
    "in the middle of an eviction": """
        def unlink(path, **_):
            print("now", flush=True); time.sleep(10_000)
        os.unlink = unlink
        """,
}


@pytest.mark.parametrize("place", PLACES)
def test_a_killed_writer_leaves_nothing(make_cache: MakeCache, folder: Path, start: StartChild, place: str) -> None:
    cap = room_for(4)
    cache = make_cache(cap)
    for number in range(4):
        assert cache.put(key_of(number), data_of(number), 10.0 + number)
    empty_place = cache.status().used_bytes - cache.status().chunk_bytes
    child = start(cap, PLACES[place], "cache.put(key_of(9), data_of(9), PINNED)\n")
    wait_for_line(child)
    assert disk_bytes(folder) <= cap
    child.kill()
    assert disk_bytes(folder) <= cap
    for number in (5, 6, 7, 9):  # among them the chunk that the dead one was writing
        assert cache.put(key_of(number), data_of(number), 5.0)
        assert disk_bytes(folder) <= cap
    reader = make_cache(cap)
    for number in (5, 6, 7, 9):
        assert reader.read(key_of(number), 0, MIB) == data_of(number)
    status = reader.status()
    assert (status.num_chunks, status.num_writing, len(status.users)) == (4, 0, 1)
    assert status.used_bytes - status.chunk_bytes == empty_place
    assert sorted(path.suffix for path in folder.iterdir() if len(path.name) > 60) == [".chunk"] * 4
    assert len(os.listdir(folder / "owners")) == 1


def test_a_dead_process_pins_nothing_and_a_living_one_does(
    make_cache: MakeCache, folder: Path, start: StartChild
) -> None:
    cap = room_for(4)
    child = start(
        cap,
        "for n in range(4): cache.put(key_of(n), data_of(n), PINNED)\nprint('now', flush=True)\ntime.sleep(10_000)",
    )
    wait_for_line(child)
    cache = make_cache(cap)
    assert cache.status().num_pinned == 4
    assert not cache.put(key_of(5), data_of(5), PINNED)
    child.kill()
    assert cache.status().num_pinned == 0
    assert cache.put(key_of(5), data_of(5), 1e12)


def test_a_forked_child_has_a_name_of_its_own(make_cache: MakeCache, folder: Path, start: StartChild) -> None:
    cap = room_for(2)
    body = """
        cache.put(key_of(0), data_of(0), PINNED)
        child = os.fork()
        if child == 0:
            cache.put(key_of(1), data_of(1), PINNED)
            assert cache.read(key_of(0), 0, MIB) == data_of(0)
        print(os.getpid(), flush=True)
        time.sleep(10_000)
        """
    parent = start(cap, body)
    process_ids = {int(wait_for_line(parent)), int(wait_for_line(parent))}
    (child,) = process_ids - {parent.pid}
    try:
        cache = make_cache(cap)
        assert {user.process_id for user in cache.status().users} == process_ids
        parent.kill()  # the child holds copies of the parent's descriptors, had it not closed them
        assert {user.process_id for user in cache.status().users} == {child}
        assert cache.put(key_of(2), data_of(2), 5.0)
        assert not cache.put(key_of(3), data_of(3), 4.0 if cache.contains(key_of(0)) else 6.0)
        assert cache.contains(key_of(1))
    finally:
        os.kill(child, signal.SIGKILL)


def test_two_processes_put_one_chunk_and_both_claims_count(
    make_cache: MakeCache, folder: Path, start: StartChild
) -> None:
    cap = room_for(2)
    child = start(cap, PLACES["in the middle of the bytes"], "cache.put(key_of(0), data_of(0), 5.0)")
    wait_for_line(child)
    first, second = make_cache(cap), make_cache(cap)
    assert first.put(key_of(0), data_of(0), 50.0), "another one is writing it"
    assert not first.contains(key_of(0))
    child.kill()
    assert first.put(key_of(0), data_of(0), 50.0)
    assert first.contains(key_of(0))
    inode = (folder / f"{key_of(0)}.chunk").stat().st_ino
    assert second.put(key_of(0), data_of(0), 5.0)
    assert (folder / f"{key_of(0)}.chunk").stat().st_ino == inode
    assert first.put(key_of(1), data_of(1), 20.0)
    assert first.put(key_of(2), data_of(2), 10.0), "20 goes, since 5 counts and not 50"
    assert [first.contains(key_of(number)) for number in range(3)] == [True, False, True]
    second.close()
    assert first.put(key_of(1), data_of(1), 20.0)
    assert [first.contains(key_of(number)) for number in range(3)] == [False, True, True]


def test_processes_with_too_small_a_cap_stay_within_it_and_read_what_was_put(
    make_cache: MakeCache, folder: Path, start: StartChild
) -> None:
    cap = 24 * MIB
    body = """
        import random, threading
        random.seed(SEED)
        hits = [0]
        def hammer():
            for step in range(60):
                number = random.randrange(40)
                size = MIB // 2 + number * 20_000
                expected = data_of(number, size)
                begin = random.randrange(size)
                found = cache.read(key_of(number), begin, size - begin)
                assert found is None or found == expected[begin:], number
                hits[0] += found is not None
                if found is None:
                    cache.put(key_of(number), expected, random.choice([PINNED, time.time() + random.random()]))
                cache.set_next_use({key_of(random.randrange(40)): random.choice([5.0, 1e12, float("inf")])})
                if step % 20 == 10:
                    cache.close()
        threads = [threading.Thread(target=hammer) for _ in range(2)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        print(hits[0], cache.counters.peek().get("cache_corrupt", 0), flush=True)
        """
    children = [start(cap, f"SEED = {seed}", body) for seed in (1, 2)]
    samples = []
    while any(child.poll() is None for child in children):
        samples.append(disk_bytes(folder) if folder.is_dir() else 0)
        time.sleep(0.005)
    samples.append(disk_bytes(folder))
    assert max(samples) <= cap
    assert max(samples) > cap // 2, "the cap was never near"
    for child in children:
        hits, corrupt = map(int, child.stdout.read().split())
        assert child.wait() == 0
        assert hits > 0
        assert corrupt == 0
    cache = make_cache(cap)
    status = cache.status()
    assert status.users == ()
    files = list(folder.glob("*.chunk"))
    assert status.num_chunks == len(files)
    assert status.chunk_bytes >= sum(path.stat().st_blocks * 512 for path in files)
    assert list(folder.glob("*.part")) == []


@pytest.mark.slow
def test_kills_at_random_moments(make_cache: MakeCache, folder: Path, start: StartChild) -> None:
    cap = room_for(5)
    body = """
        import random
        print("now", flush=True)
        while True:
            number = random.randrange(20)
            if cache.read(key_of(number), 0, MIB) is None:
                cache.put(key_of(number), data_of(number), random.random() * 100)
            cache.set_next_use({key_of(random.randrange(20)): PINNED for _ in range(2)})
            cache.set_next_use({key_of(number): float("inf") for number in range(20)})
        """
    bystander = start(cap, body)
    wait_for_line(bystander)
    for attempt in range(30):
        child = start(cap, body)
        wait_for_line(child)
        time.sleep(0.05 + attempt * 0.00137)
        child.kill()
        assert disk_bytes(folder) <= cap
        cache = make_cache(cap)
        assert cache.status().num_writing <= 1
        assert len(cache.status().users) <= 1
        cache.set_next_use({key_of(number): math.inf for number in range(20)})
        for number in range(20):
            assert cache.read(key_of(number), 0, MIB) in (None, data_of(number))
        assert "cache_corrupt" not in cache.counters.peek()
        cache.close()
    bystander.kill()
    status = make_cache(cap).status()
    assert status.num_chunks == len(list(folder.glob("*.chunk"))) >= 4
    assert list(folder.glob("*.part")) == []


def test_threads_share_one_cache(make_cache: MakeCache, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipes.cache.cache._MAX_OPEN_CHUNKS", 2)  # handles come and go all the time
    cache = make_cache(room_for(6, 600_000))

    def work(seed: int) -> int:
        hits = 0
        for step in range(150):
            number = (seed * 7 + step * 3) % 9
            found = cache.read(key_of(number), 10, 500_000)
            assert found in (None, data_of(number, 600_000)[10:500_010])
            hits += found is not None
            if found is None:
                cache.put(key_of(number), data_of(number, 600_000), time.time() + number)
        return hits

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(work, range(4))) > 100
    assert len(cache._open) <= 2
    assert cache.counters.peek().get("cache_corrupt", 0) == 0


def test_a_stopped_process_delays_and_does_not_block(
    make_cache: MakeCache, folder: Path, start: StartChild, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipes.cache.owners._LOCK_TIMEOUT_S", 0.2)
    cache = make_cache()
    assert cache.put(key_of(0), data_of(0), 1.0)
    child = start(64 * MIB, PLACES["before the rename"], "cache.put(key_of(9), data_of(9), PINNED)\n")
    wait_for_line(child)
    try:
        assert not cache.put(key_of(1), data_of(1), 1.0)
        cache.set_next_use({key_of(0): PINNED})
        assert cache.read(key_of(0), 0, MIB) == data_of(0)
        with pytest.raises(TimeoutError, match="another process has held this lock"):
            cache.status()
    finally:
        child.kill()
    assert cache.put(key_of(1), data_of(1), 1.0)


@pytest.mark.parametrize("event", ["close", "index lost"])
def test_what_happens_while_a_chunk_is_written(
    make_cache: MakeCache, folder: Path, monkeypatch: pytest.MonkeyPatch, event: str
) -> None:
    cache, other, real_write = make_cache(), make_cache(), os.write

    def write(handle: int, data: memoryview) -> int:
        if len(data) > MIB // 2:  # the first of the two writes of the chunk, in the place of another thread
            if event == "close":
                cache.close()
                other.status()  # sweeps what looks dead
            else:
                (folder / "index.sqlite").write_bytes(b"?" * 9000)
        return real_write(handle, data[: MIB // 2])

    monkeypatch.setattr(chunk_file.os, "write", write)
    assert cache.put(key_of(0), data_of(0), PINNED) == (event == "close")
    monkeypatch.undo()
    assert list(folder.glob("*.part")) == []
    cache.close()
    assert os.listdir(folder / "owners") == []
    assert cache.read(key_of(0), 0, MIB) == (data_of(0) if event == "close" else None)


def test_clear_frees_all_but_what_is_being_written(make_cache: MakeCache, folder: Path, start: StartChild) -> None:
    cache = make_cache()
    for number in range(3):
        assert cache.put(key_of(number), data_of(number), PINNED)
    assert cache.read(key_of(0), 0, 1) is not None
    child = start(64 * MIB, PLACES["in the middle of the bytes"], "cache.put(key_of(9), data_of(9), PINNED)\n")
    wait_for_line(child)
    assert 3 * MIB <= open_cache(str(folder)).clear() < 4 * MIB
    assert cache.read(key_of(0), 0, 1) is None
    assert cache.status().num_writing == 1
    child.kill()
    assert cache.clear() > MIB
    assert disk_bytes(folder) < MIB


def test_many_open_handles_are_bounded(make_cache: MakeCache) -> None:
    cache = make_cache()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    for number in range(300):
        assert cache.put(key_of(number), data_of(number, 1000), 1.0)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for number in range(300):
        assert cache.read(key_of(number), 0, 1000) == data_of(number, 1000)
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 256
    assert limit == resource.getrlimit(resource.RLIMIT_NOFILE)
    assert threading.active_count() >= 1
