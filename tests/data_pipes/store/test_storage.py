"""Reading from stores: exact bytes under every fault, limits that hold, and errors that name the object.

The faulty server speaks enough of S3 for reading (botocore sends signatures, nobody checks them), so that HTTP and S3
meet the same faults; tests/data_pipes/store/test_s3.py reads from a whole S3 server.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import multiprocessing
import os
import pickle
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from email.utils import formatdate
from pathlib import Path
from typing import Any

import aiohttp
import fsspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipes.errors import ShardError
from data_pipes.shards.tar import walk_tar
from data_pipes.store import fsspec_store
from data_pipes.store.counters import Counters
from data_pipes.store.errors import StorageError, _seconds
from data_pipes.store.http import HttpTransport
from data_pipes.store.storage import Storage
from data_pipes.store.transport import ByteRange, ObjectInfo, Piece, StorageConfig, Versions, normal_etag
from tests.data_pipes.store.faulty_server import FaultyServer
from tests.processes import PATIENCE_S

CONTENT = random.Random(0).randbytes(1_200_000)
QUICK = StorageConfig(requests=16, request_bytes=1 << 20, timeout_s=5.0, retries=3, backoff_s=0.002)
PASSING = ["500", "502", "503", "429", "reset", "drop", "short", "other_range", "unknown_total"]
"""Faults after which another attempt succeeds, without waiting for a time-out."""

Make = Callable[..., Storage]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FaultyServer]:
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "a.tar").write_bytes(CONTENT)
    with FaultyServer(tmp_path) as running:
        yield running


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes a Storage that is closed after the test; by default the quick one."""
    made: list[Storage] = []

    def make(**fields: Any) -> Storage:
        made.append(Storage(StorageConfig(**{**vars(QUICK), **fields})))
        return made[-1]

    yield make
    for storage in made:
        storage.close()


@pytest.fixture(params=["http", "s3"])
def url(request: pytest.FixtureRequest, server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of CONTENT on the faulty server, by both protocols."""
    if request.param == "http":
        return f"{server.url}/bucket/a.tar"
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return "s3://bucket/a.tar"


@pytest.fixture
def http_url(server: FaultyServer) -> str:
    """Of CONTENT by HTTP alone, for what does not depend on the protocol."""
    return f"{server.url}/bucket/a.tar"


def part(url: str, offset: int, length: int, etag: str | None = None) -> ByteRange:
    return ByteRange(url, offset, length, len(CONTENT), etag)


def test_whole_and_parts(url: str, make: Make) -> None:
    storage = make(request_bytes=100_000)
    info = storage.info(url)
    assert info.size_bytes == len(CONTENT)
    assert info.etag
    assert '"' not in info.etag
    assert storage.read_whole(url, len(CONTENT)) == CONTENT
    for offset, length in [(0, 1), (len(CONTENT) - 1, 1), (99_999, 200_002), (5, 0), (len(CONTENT), 0)]:
        assert storage.read_range(part(url, offset, length, info.etag)) == CONTENT[offset : offset + length]
    with pytest.raises(StorageError, match="expected at most 1,000"):
        storage.read_whole(url, 1000)
    with pytest.raises(ValueError, match="expected a range inside"):
        storage.submit(part(url, 10, len(CONTENT)))


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes(fault: str, url: str, server: FaultyServer, make: Make) -> None:
    server.plan.extend([fault, fault])
    storage = make()
    assert storage.read_range(part(url, 1000, 300_000)) == CONTENT[1000:301_000]
    assert len(server.plan) == (fault == "unknown_total")  # which is no failure
    counted = storage.counters.peek()
    retries = {"unknown_total": 0, "reset": counted.get("retries", 0)}.get(fault, 2)
    # aiohttp sends a request again by itself when a kept connection was closed
    assert counted.get("retries", 0) == counted.get("request_errors", 0) == retries
    assert counted["requests"] == retries + 1
    assert counted.get("throttled", 0) == (2 if fault in ("503", "429") else 0)
    assert counted["bytes_fetched"] == 300_000  # also after two halves: nothing is read twice
    assert counted["request_s"] > 0


def test_resumes_at_the_first_missing_byte(url: str, server: FaultyServer, make: Make) -> None:
    server.plan.append("drop")
    assert make().read_range(part(url, 1000, 300_000)) == CONTENT[1000:301_000]
    first, second = server.requests()
    assert (first.first, first.last) == (1000, 300_999)
    assert second.last == 300_999
    assert second.first == 151_000


def test_what_had_arrived_when_the_connection_broke_is_kept() -> None:
    async def receive() -> tuple[Piece, Counters]:
        loop, counters = asyncio.get_running_loop(), Counters()
        body = aiohttp.StreamReader(aiohttp.base_protocol.BaseProtocol(loop), 1 << 16, loop=loop)
        body.feed_data(b"skip" + b"x" * 50)
        body.set_exception(aiohttp.ClientPayloadError("broken"))
        piece = Piece("http://host/a", 4, 100, ObjectInfo(1000, None))
        with pytest.raises(aiohttp.ClientPayloadError):
            await HttpTransport(QUICK, counters, Versions(), loop).receive(body, piece, skip=4)
        return piece, counters

    piece, counters = asyncio.run(receive())
    assert b"".join(piece.parts) == b"x" * 50
    assert counters.peek() == {"bytes_fetched": 54}


def test_resumes_on_a_server_that_ignores_ranges(url: str, server: FaultyServer, make: Make) -> None:
    server.plan.extend(["drop", "ignore_range"])
    assert make().read_range(part(url, 1000, 300_000)) == CONTENT[1000:301_000]


def test_progress_is_not_failure(url: str, server: FaultyServer, make: Make) -> None:
    server.plan.extend(["drop"] * 4)  # leaves half, a quarter, ..., each time more than 64 KiB
    storage = make(retries=1, request_bytes=1 << 21)
    assert storage.read_range(part(url, 0, len(CONTENT))) == CONTENT
    assert storage.counters.peek()["retries"] == 4


@pytest.mark.parametrize("fault", ["hang", "stall"])
def test_timeouts_fire(fault: str, url: str, server: FaultyServer, make: Make) -> None:
    server.plan.append(fault)
    storage = make(timeout_s=0.2, retries=1000)
    start_s = time.monotonic()
    assert storage.read_range(part(url, 7, 100_000)) == CONTENT[7:100_007]
    assert time.monotonic() - start_s >= 0.2
    assert storage.counters.peek()["timeouts"] >= 1  # more where the server gets no time on a core


def test_a_trickle_is_cut(http_url: str, server: FaultyServer, make: Make) -> None:
    server.plan.append("trickle")
    storage = make(timeout_s=0.05, retries=1000)
    assert storage.read_range(part(http_url, 7, 100_000)) == CONTENT[7:100_007]
    assert storage.counters.peek()["timeouts"] >= 1


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("400", StorageError, "refuses the request"),
        ("403", PermissionError, "access denied"),
        ("404", FileNotFoundError, "not there"),
        ("other_etag", ShardError, "etag .*-other now, expected etag"),
        ("other_size", ShardError, "1,200,001 bytes now, expected 1,200,000 bytes"),
    ],
)
def test_some_faults_end_it_at_once(
    fault: str, error: type[Exception], message: str, url: str, server: FaultyServer, make: Make
) -> None:
    storage = make()
    etag = storage.info(url).etag
    server.plan.append(fault)
    with pytest.raises(error, match=message) as caught:
        storage.read_range(part(url, 0, 100, etag))
    assert url in str(caught.value)
    assert len(server.requests()) == 1
    assert "retries" not in storage.counters.peek()


def test_gives_up(url: str, server: FaultyServer, make: Make) -> None:
    server.chances = {"500": 1.0}
    storage = make(retries=2)
    with pytest.raises(StorageError, match=r"byte 100 .* after 3 attempts .*500") as caught:
        storage.read_range(part(url, 100, 10))
    assert url in str(caught.value)
    assert len(server.requests()) == 3
    assert storage.counters.peek()["request_errors"] == 3


@pytest.mark.parametrize("fault", ["hang", "drop", "503"])
def test_only_our_retries(fault: str, url: str, server: FaultyServer, make: Make) -> None:
    server.chances = {fault: 1.0}
    with pytest.raises(StorageError, match="after 1 attempts"):
        make(retries=0, timeout_s=1 if fault == "hang" else 60).read_range(part(url, 100, 1000))
    assert len(server.requests()) == 1  # botocore and s3fs would each make more


def test_nobody_listens(make: Make) -> None:
    with pytest.raises(StorageError, match="after 2 attempts"):
        make(retries=1).info("http://127.0.0.1:9/a.tar")


@pytest.mark.parametrize("status", ["429", "503"])
def test_retry_after_wins(status: str, url: str, server: FaultyServer, make: Make) -> None:
    server.retry_after = "0.3"
    server.plan.append(status)
    assert make().read_range(part(url, 0, 10)) == CONTENT[:10]
    first, second = server.requests()
    assert second.time_s - first.time_s >= 0.3


def test_retry_after_forms() -> None:
    assert _seconds("2.5") == 2.5
    assert 200 < (_seconds(formatdate(time.time() + 500, usegmt=True)) or 0) <= 500
    assert _seconds(formatdate(time.time() - 30, usegmt=True)) == _seconds("-1") == 0
    assert _seconds("86400") == 600
    assert _seconds("soon") is _seconds(None) is _seconds("") is None


def test_backoff_doubles(http_url: str, server: FaultyServer, make: Make) -> None:
    server.plan.extend(["500"] * 3)
    make(backoff_s=0.04).read_range(part(http_url, 0, 10))
    times = [request.time_s for request in server.requests()]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert all(gap >= floor for gap, floor in zip(gaps, (0.02, 0.04, 0.08), strict=True))


def test_ignored_ranges(url: str, server: FaultyServer, make: Make, caplog: pytest.LogCaptureFixture) -> None:
    large = server.folder / "bucket" / "a.tar"
    with open(large, "ab") as file:
        file.truncate(100_000_000)
    server.chances = {"ignore_range": 1.0}
    storage = make()
    with caplog.at_level(logging.WARNING):
        for offset in (0, 300_000, 700_000):
            wanted = ByteRange(url, offset, 1000, 100_000_000, None)
            assert storage.read_range(wanted) == CONTENT[offset : offset + 1000]
    assert storage.counters.peek()["range_ignored"] == 3
    assert storage.counters.peek()["bytes_fetched"] < 10_000_000  # it stops behind the wanted bytes
    assert len([record for record in caplog.records if "ignores Range" in record.getMessage()]) == 1


def test_a_replaced_object_without_known_etag(url: str, server: FaultyServer, make: Make) -> None:
    storage = make()
    assert storage.read_range(part(url, 0, 10)) == CONTENT[:10]
    place = server.folder / "bucket" / "a.tar"
    place.write_bytes(CONTENT[::-1])
    os.utime(place, ns=(1, 1))
    with pytest.raises(ShardError, match="when this process first read it"):
        storage.read_range(part(url, 20, 10))


def test_a_shortened_object(url: str, server: FaultyServer, make: Make) -> None:
    (server.folder / "bucket" / "a.tar").write_bytes(CONTENT[:1000])
    for offset in (0, 5000):  # 206 with another total, 416
        with pytest.raises(ShardError, match="1,000 bytes now") as caught:
            make().read_range(part(url, offset, 100))
        assert url in str(caught.value)


@pytest.mark.parametrize("etags", ["strong", "weak", "none"])
def test_etags_of_all_kinds(etags: str, server: FaultyServer, make: Make) -> None:
    server.etags = etags
    url, storage = f"{server.url}/bucket/a.tar", make()
    etag = storage.info(url).etag
    assert etag
    server.plan.extend(["ok"] * 3 + ["other_etag"])
    for form in (etag, f'"{etag}"', f'W/"{etag}"'):
        assert storage.read_range(part(url, 3, 4, form)) == CONTENT[3:7]
    with pytest.raises(ShardError, match="etag"):
        storage.read_range(part(url, 3, 4, etag))


def test_versions() -> None:
    versions, info = Versions(), ObjectInfo(10, '"x"')
    versions.check("u", info, 10, 'W/"x"')
    versions.check("u", info, None, None)
    versions.check("u", info, 10, "modified Mon")  # of another kind: held to the first seen
    with pytest.raises(ShardError, match="first read"):
        versions.check("u", info, 10, "modified Tue")
    assert normal_etag('""') is normal_etag("") is None


def test_servers_without_head(server: FaultyServer, make: Make) -> None:
    for status in (403, 405, 501):
        server.head = status
        assert make().info(f"{server.url}/bucket/a.tar").size_bytes == len(CONTENT)
    (server.folder / "empty").write_bytes(b"")
    assert make().read_whole(f"{server.url}/empty", 0) == b""
    with pytest.raises(FileNotFoundError):
        make().info(f"{server.url}/nothing")


def test_five_percent_of_requests_fail(url: str, server: FaultyServer, make: Make) -> None:
    chance = 0.05 / len(PASSING)
    server.chances = {**dict.fromkeys(PASSING, chance), "ignore_range": chance}
    storage, draw = make(retries=8), random.Random(1)
    places = [
        (offset := draw.randrange(len(CONTENT)), draw.randint(0, min(40_000, len(CONTENT) - offset)))
        for _ in range(400)
    ]
    futures = [storage.submit(part(url, *place)) for place in places]
    for (offset, length), future in zip(places, futures, strict=True):
        assert future.result(60) == CONTENT[offset : offset + length]
    faults = [request for request in server.requests() if request.fault not in ("ok", "unknown_total", "ignore_range")]
    counted = storage.counters.peek()
    assert len(faults) >= 5
    assert counted["requests"] == sum(length > 0 for _, length in places) + counted["retries"]
    assert 0 < counted["request_errors"] == counted["retries"] <= len(faults)
    assert server.max_active <= QUICK.requests


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    plan=st.lists(st.sampled_from([*PASSING, "ignore_range", "ok"]), max_size=8),
    offset=st.integers(0, len(CONTENT)),
    length=st.integers(0, 400_000),
    step=st.sampled_from([50_000, 100_001, 1 << 20]),
)
def test_any_plan_of_faults(plan: list[str], offset: int, length: int, step: int, server: FaultyServer) -> None:
    server.plan.clear()
    server.plan.extend(plan)
    storage = Storage(StorageConfig(request_bytes=step, timeout_s=5, retries=9, backoff_s=0))
    try:
        length = min(length, len(CONTENT) - offset)
        assert storage.read_range(part(f"{server.url}/bucket/a.tar", offset, length)) == CONTENT[offset:][:length]
    finally:
        storage.close()


def test_large_reads_are_split_and_bounded(http_url: str, server: FaultyServer, make: Make) -> None:
    storage = make(requests=4, request_bytes=100_000)
    storage.info(http_url)
    server.delay_s = 0.05
    assert storage.read_range(part(http_url, 0, len(CONTENT))) == CONTENT
    assert sorted((r.first, r.last) for r in server.requests()) == [
        (i, i + 99_999) for i in range(0, 1_200_000, 100_000)
    ]
    assert server.max_active == 4


def test_one_failing_part_fails_the_read(server: FaultyServer, make: Make) -> None:
    storage = make(requests=2, request_bytes=1000, retries=0)
    server.plan.extend(["ok", "400"])
    with pytest.raises(StorageError, match="400"):
        storage.read_range(part(f"{server.url}/bucket/a.tar", 0, 500_000))
    assert len(server.requests()) < 50  # the other 498 were not made


def test_many_threads(http_url: str, make: Make) -> None:
    storage = make()
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda i: storage.read_range(part(http_url, i * 1000, 1000)), range(200)))
    assert b"".join(parts) == CONTENT[:200_000]


def _read_in_child(storage: Storage, url: str, answers: Any) -> None:
    answers.put((storage.read_range(part(url, 10, 1000)), storage.counters.peek()["requests"]))
    storage.close()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # what is tested is that it is harmless
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes(method: str, url: str, make: Make) -> None:
    storage = make()
    for _ in range(3):
        storage.read_range(part(url, 0, 1000))
    pending = storage.submit(part(url, 0, len(CONTENT)))
    context = multiprocessing.get_context(method)
    answers = context.SimpleQueue()
    child = context.Process(target=_read_in_child, args=(storage, url, answers))
    child.start()
    assert answers.get() == (CONTENT[10:1010], 1)
    child.join()
    assert child.exitcode == 0
    assert pending.result() == CONTENT
    assert storage.read_range(part(url, 5, 1000)) == CONTENT[5:1005]


def test_pickle_is_small(http_url: str, make: Make) -> None:
    storage = make(retries=1)
    storage.read_range(part(http_url, 0, 10))
    content = pickle.dumps(storage)
    assert len(content) < 1000
    copied = pickle.loads(content)
    assert copied.config == storage.config
    assert copied.read_range(part(http_url, 0, 10)) == CONTENT[:10]
    assert copied.counters.peek()["requests"] == 1
    copied.close()


def test_close_leaves_nothing_and_ends_what_is_under_way(url: str, server: FaultyServer, make: Make) -> None:
    def others() -> set[str]:
        return {thread.name for thread in threading.enumerate() if not thread.name.startswith(("faulty", "Thread-"))}

    before, open_before = others(), len(os.listdir("/proc/self/fd"))
    storage = make()
    storage.read_range(part(url, 0, 10))
    server.plan.append("hang")
    waiting = storage.submit(part(url, 0, 10))
    while len(server.requests()) < 2:
        time.sleep(0.01)
    storage.close()
    with pytest.raises(CancelledError):
        waiting.result(PATIENCE_S)
    assert others() <= before
    server.stop()
    assert len(os.listdir("/proc/self/fd")) <= open_before
    server.stopping.clear()
    server.start(int(server.url.rpartition(":")[2]))
    assert storage.read_range(part(url, 0, 10)) == CONTENT[:10]  # opened anew


def test_a_forgotten_storage_closes_itself(server: FaultyServer) -> None:
    storage = Storage(QUICK)
    storage.read_range(part(f"{server.url}/bucket/a.tar", 0, 10))
    assert "tessera-storage" in {thread.name for thread in threading.enumerate()}
    del storage
    assert "tessera-storage" not in {thread.name for thread in threading.enumerate()}


def test_as_a_file(http_url: str, make: Make) -> None:
    storage, draw = make(request_bytes=50_000), random.Random(2)
    with storage.open(http_url) as file:
        for _ in range(60):
            offset, length = draw.randrange(len(CONTENT)), draw.randrange(120_000)
            file.seek(offset)
            assert file.read(length) == CONTENT[offset : offset + length]
        assert file.seek(-10, os.SEEK_END) == len(CONTENT) - 10
        assert file.read() == CONTENT[-10:]
        assert file.read(5) == b""


def test_each_block_of_a_file_is_fetched_once(http_url: str, server: FaultyServer, make: Make) -> None:
    with make(request_bytes=50_000).open(http_url) as file:
        assert file.read() == CONTENT
    assert len(server.requests()) == 24


def test_jumped_over_blocks_stay_where_they_are(http_url: str, server: FaultyServer, make: Make) -> None:
    with make(request_bytes=50_000).open(http_url) as file:
        for offset in range(0, len(CONTENT), 200_000):
            file.seek(offset)
            assert file.read(10) == CONTENT[offset : offset + 10]
    assert len(server.requests()) == 6


def test_reading_in_order_is_fetched_ahead(server: FaultyServer, make: Make) -> None:
    server.delay_s = 0.02
    with make(request_bytes=40_000).open(f"{server.url}/bucket/a.tar") as file:
        while file.read(512):
            pass
    assert 4 <= server.max_active <= 9  # the block that is read, and eight
    assert len(server.requests()) == 30


def test_walks_a_remote_tar(tiny_dataset: Path, make: Make) -> None:
    shard = min(tiny_dataset.glob("*.tar"))
    with (
        FaultyServer(tiny_dataset) as server,
        make().open(f"{server.url}/{shard.name}") as remote,
        open(shard, "rb") as local,
    ):
        size = shard.stat().st_size
        assert list(walk_tar(remote, size)) == list(walk_tar(local, size))


@pytest.mark.parametrize("kind", ["plain", "file", "memory", "http"])
def test_write_read_list(kind: str, tmp_path: Path, server: FaultyServer, make: Make) -> None:
    root = {
        "plain": str(tmp_path / "bucket"),
        "file": (tmp_path / "bucket").as_uri(),
        "memory": f"memory://{tmp_path.name}-{kind}",
        "http": f"{server.url}/bucket",
    }[kind]
    storage = make(request_bytes=100)
    for name in ("b.tar", "a.tar", "a.tar.idx"):
        storage.write_whole(f"{root}/{name}", name.encode() * 100)
    listed_root = str(tmp_path / "bucket") if kind == "file" else root
    assert storage.list(f"{root}/*.tar") == [f"{listed_root}/a.tar", f"{listed_root}/b.tar"]
    assert storage.list(f"{root}/") == [f"{listed_root}/{name}" for name in ("a.tar", "a.tar.idx", "b.tar")]
    info = storage.info(f"{root}/a.tar")
    assert info.size_bytes == 500
    assert storage.read_whole(f"{root}/a.tar", 500) == b"a.tar" * 100
    assert storage.read_range(ByteRange(f"{root}/a.tar", 7, 490, 500, info.etag)) == (b"a.tar" * 100)[7:497]
    with storage.open(f"{root}/a.tar") as file:
        file.seek(450)
        assert file.read() == b"a.tar" * 10
    for failing in (storage.info, storage.open, lambda url: storage.read_range(ByteRange(url, 0, 5, 5, None))):
        with pytest.raises(FileNotFoundError):
            failing(f"{root}/none.tar")


def test_http_server_that_takes_no_files(server: FaultyServer, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.data_pipes.store.faulty_server._Handler.do_PUT", lambda handler: handler._error(405))
    with pytest.raises(StorageError, match="takes no files"):
        make().write_whole(f"{server.url}/bucket/x.idx", b"x")


def test_other_stores_are_held_to_one_version(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    url, storage = f"memory://{tmp_path.name}/a.tar", make()
    storage.write_whole(url, b"x" * 100)
    assert storage.read_range(ByteRange(url, 0, 10, 100, None)) == b"x" * 10
    storage.write_whole(url, b"y" * 100)
    assert storage.read_range(ByteRange(url, 0, 10, 100, None)) == b"y" * 10  # asked 30 s apart
    monkeypatch.setattr(fsspec_store, "_RECHECK_S", 0.0)
    with pytest.raises(ShardError, match="first read"):
        storage.read_range(ByteRange(url, 0, 10, 100, None))
    monkeypatch.undo()
    (tmp_path / "a").write_bytes(b"x" * 100)
    wanted = ByteRange(str(tmp_path / "a"), 50, 50, 100, None)
    assert storage.read_range(wanted) == b"x" * 50
    os.truncate(tmp_path / "a", 60)
    with pytest.raises(ShardError, match="60 bytes now, expected 100"):  # at once, since the answer was short
        storage.read_range(wanted)


def test_other_stores_time_out(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    url, storage = f"memory://{tmp_path.name}/a.tar", make(timeout_s=0.1, retries=1)
    storage.write_whole(url, b"x")
    cls = fsspec.get_filesystem_class("memory")
    given_up = threading.Event()
    monkeypatch.setattr(cls, "cat_file", lambda *_, **__: given_up.wait(PATIENCE_S))
    try:
        with pytest.raises(StorageError, match=r"no answer in 0\.1 s"):
            storage.read_range(ByteRange(url, 0, 1, 1, None))
    finally:
        given_up.set()
    assert storage.counters.peek()["timeouts"] == 2


class _StoreError(Exception):
    """Like gcsfs's HttpError and azure's HttpResponseError."""

    def __init__(self, code: int) -> None:
        super().__init__("no")
        self.code = code


@pytest.mark.parametrize(
    ("error", "expected", "requests"),
    [
        (_StoreError(404), FileNotFoundError, 1),
        (_StoreError(403), PermissionError, 1),
        (_StoreError(400), StorageError, 1),
        (_StoreError(503), StorageError, 3),
        (ConnectionResetError("gone"), StorageError, 3),
        (OSError("Forbidden: https://..."), PermissionError, 1),
        (RuntimeError("token expired"), StorageError, 1),
    ],
)
def test_errors_of_other_stores(
    error: Exception, expected: type[Exception], requests: int, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> bytes:
        raise error

    storage = make(retries=2)
    storage.write_whole("memory://errors/a", b"x")
    storage.counters.take()
    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "cat_file", fail)
    with pytest.raises(expected, match="memory://errors/a"):
        storage.read_range(ByteRange("memory://errors/a", 0, 1, 1, None))
    assert storage.counters.peek()["requests"] == requests


@pytest.mark.parametrize(
    ("scheme", "modules", "package"),
    [
        ("gs", ["gcsfs"], "gcsfs"),
        ("abfs", ["adlfs"], "adlfs"),
        ("s3", ["botocore", "data_pipes.store.s3"], "s3fs"),
        ("https", ["aiohttp", "data_pipes.store.http"], "aiohttp"),
    ],
)
def test_a_missing_package_is_named(
    scheme: str, modules: list[str], package: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, modules[-1], raising=False)
    monkeypatch.setitem(sys.modules, modules[0], None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"pip install {package}"):
        make().info(f"{scheme}://bucket/a.tar")


@pytest.mark.parametrize("call", ["info", "open", "list"])
def test_refused_urls(call: str, make: Make) -> None:
    storage = make()
    for url in ("pipe:cat x", "ftp://host/a", "https://u:p@host/a", "zip://a::s3://b/c"):
        with pytest.raises(ValueError, match=r"refused|not allowed|inside the URL"):
            getattr(storage, call)(url)
        with pytest.raises(ValueError, match=r"refused|not allowed|inside the URL"):
            storage.submit(ByteRange(url, 0, 1, 1, None))
        with pytest.raises(ValueError, match=r"refused|not allowed|inside the URL"):
            storage.write_whole(url, b"")


@pytest.mark.parametrize(
    "fields", [{"requests": 0}, {"request_bytes": 0}, {"timeout_s": 0}, {"retries": -1}, {"backoff_s": -1}]
)
def test_config(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        StorageConfig(**fields)
