"""A data set in a store is the same data set: same samples, same order, whatever fails on the way."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from data_pipes.batch import Batch, BatchPlan
from data_pipes.cache.cache import ChunkCache
from data_pipes.cache.folder import CacheConfig
from data_pipes.config import DataConfig
from data_pipes.errors import ShardError
from data_pipes.loader import Loader
from data_pipes.open import open_dataset
from data_pipes.order.order import OrderConfig
from data_pipes.sequential.pictures import SequentialImages
from data_pipes.store.transport import StorageConfig
from data_pipes.transforms.image import EvalTransform
from tests.data_pipes.store.faulty_server import FaultyServer
from tests.data_pipes.store.s3_server import s3_server
from tests.data_pipes.tiny_shards import write_shards
from tests.process_server import Forked, ProcessServer

SHARDS = (70, 90, 33, 47)
NUM_SAMPLES = sum(SHARDS)
SIDE = 96
SAMPLE_BYTES = 3 * SIDE * SIDE  # 27 KB: all samples are 6.6 MB, more than the smallest cache
QUICK = StorageConfig(backoff_s=0.01, timeout_s=5.0, requests=8, request_bytes=100_000)
ORDER = OrderConfig(seed=5, window=64, chunk_bytes=200_000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise that does not compress, as arrays."""
    members = {}
    for number in range(NUM_SAMPLES):
        file = io.BytesIO()
        np.save(file, np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), np.uint8))
        members[number] = {"npy": file.getvalue(), "cls": str(number % 7).encode()}
    root = tmp_path_factory.mktemp("remote") / "set"
    write_shards(root, SHARDS, members)
    return root


def config_for(place: str, cache: Path | None = None, max_bytes: int = 64 << 20, **changes: object) -> DataConfig:
    cached = CacheConfig(None if cache is None else str(cache), max_bytes)
    config = DataConfig(train=place, order=ORDER, storage=QUICK, cache=cached, max_bad_fraction=0.0)
    return replace(config, **changes)  # type: ignore[arg-type]


def loader_for(config: DataConfig, rank: int = 0, world_size: int = 1) -> Loader:
    dataset = open_dataset(config, image_size=(8, 8), channels=3, global_batch=24)
    return Loader(dataset, BatchPlan(24, 24 // world_size, rank, world_size), config, pin_memory=False)


def take(loader: Loader, num_batches: int, position: int = 0) -> list[Batch]:
    with closing(loader):
        batches = loader.batches(position)
        return [next(batches) for _ in range(num_batches)]


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    assert [batch.keys for batch in found] == [batch.keys for batch in expected]
    assert all(torch.equal(a.images, b.images) for a, b in zip(found, expected, strict=True))
    assert all(torch.equal(a.labels, b.labels) for a, b in zip(found, expected, strict=True))


@contextmanager
def store(kind: str, folder: Path) -> Iterator[str]:
    """The folder in a store, as a URL."""
    files = {path.name: path for path in folder.iterdir() if path.is_file()}
    if kind == "memory":
        memory = fsspec.filesystem("memory")
        for name, path in files.items():
            memory.pipe(f"/remote-loader/{name}", path.read_bytes())
        yield "memory://remote-loader"
        memory.rm("/remote-loader", recursive=True)
    elif kind == "s3":
        with s3_server({f"set/{name}": path for name, path in files.items()}) as bucket:
            yield f"{bucket}/set"
    else:
        faults = {"503": 0.01, "reset": 0.01, "drop": 0.01, "short": 0.01, "500": 0.01}
        with FaultyServer(folder, chances=faults) as server:
            yield server.url


EPOCH = NUM_SAMPLES // 24 + 1


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("kind", ["memory", "s3", "http, 5% of the requests fail"])
def test_an_epoch_from_a_store_is_the_local_one(folder: Path, tmp_path: Path, kind: str, cached: bool) -> None:
    expected = take(loader_for(config_for(str(folder))), EPOCH)
    with store(kind, folder) as url:
        loader = loader_for(config_for(url, tmp_path / "cache" if cached else None, workers=2))
        assert_same(take(loader, EPOCH), expected)
    sums = loader.counters.take()
    amplification = sums["bytes_fetched"] / sums["bytes_used"]
    print(
        f"\n{kind}: {sums['requests']:.0f} requests, {sums.get('retries', 0):.0f} retries, read amplification "
        f"{amplification:.2f}"
    )
    assert amplification < (2.2 if cached else 1.2)  # windows of two chunks, and an epoch read at once: see the bench
    if kind.startswith("http"):
        assert sums["retries"] > 0


def test_a_second_epoch_comes_out_of_the_cache(folder: Path, tmp_path: Path) -> None:
    with FaultyServer(folder) as server:
        loader = loader_for(config_for(server.url, tmp_path / "cache"))
        expected = take(loader_for(config_for(str(folder))), 4 * EPOCH)
        with closing(loader):
            batches = loader.batches(0)
            for number in range(4 * EPOCH):
                assert_same([next(batches)], expected[number : number + 1])
                if number < EPOCH:
                    time.sleep(0.05)  # as a step would take
            requests = len(server.requests())
            for _ in range(EPOCH):
                next(batches)
            assert len(server.requests()) == requests


@pytest.mark.parametrize("worker_kind", ["thread", "process"])
def test_a_cache_smaller_than_the_window_changes_nothing(folder: Path, tmp_path: Path, worker_kind: str) -> None:
    cache, cap = tmp_path / "cache", 4 << 20
    expected = take(loader_for(config_for(str(folder))), 2 * EPOCH)
    with store("http", folder) as url:
        config = config_for(url, cache, cap, workers=2, worker_kind=worker_kind)
        loader = loader_for(replace(config, order=replace(ORDER, window=4096, streams=1)))
        reference = loader_for(replace(config_for(str(folder)), order=replace(ORDER, window=4096, streams=1)))
        expected = take(reference, 2 * EPOCH)
        with closing(loader):
            batches = loader.batches(0)
            for number in range(2 * EPOCH):
                assert_same([next(batches)], expected[number : number + 1])
                assert bytes_in(cache) <= cap
    sums = loader.counters.take()
    assert sums["cache_hits"] > 0
    assert sums["bytes_fetched"] / sums["bytes_used"] < 1.9


def bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_blocks * 512 if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


@pytest.mark.parametrize("change", ["bytes", "size"])
def test_a_changed_shard_stops_the_run_with_its_name(folder: Path, tmp_path: Path, change: str) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    shard = copy / "shard-000001.tar"
    with FaultyServer(copy) as server:
        loader = loader_for(config_for(server.url))
        with closing(loader):
            batches = loader.batches(0)
            next(batches)
            data = shard.read_bytes()
            shard.write_bytes(data[:-512] if change == "size" else data[:4096] + b"x" * 512 + data[4608:])
            with pytest.raises(ShardError, match=r"shard-000001\.tar"):
                deque(islice(batches, 2 * EPOCH), maxlen=0)


def test_a_missing_data_set_and_forbidden_urls_say_so(folder: Path) -> None:
    with FaultyServer(folder) as server, pytest.raises(ValueError, match=r"no such object.*tessera index"):
        loader_for(config_for(server.url + "/nothing"))
    with pytest.raises(ValueError, match="pipe:"):
        loader_for(config_for("pipe:cat /etc/passwd"))


def test_validation_reads_a_batch_in_one_round_trip(folder: Path) -> None:
    local = SequentialImages(folder, EvalTransform((8, 8)))
    with FaultyServer(folder, delay_s=0.02) as server:
        remote = SequentialImages(server.url, EvalTransform((8, 8)), storage=QUICK)
        remote[0]
        found = remote.__getitems__(range(60))
        assert server.max_active >= 4
    for (image, label), i in zip(found, range(60), strict=True):
        assert torch.equal(image, local[i][0])
        assert label == local[i][1]


def read(url: str, cache: str, rank: int, size: int, position: int, batches: int, kind: str) -> None:
    """In a process of its own: prints a line for each batch."""
    torch.set_num_threads(1)
    config = config_for(url, Path(cache), 4 << 20, workers=2, worker_kind=kind)
    loader = loader_for(config, rank, size)
    for number, batch in enumerate(loader.batches(position)):
        print(json.dumps([batch.keys, int(batch.images.sum())]), flush=True)
        if number + 1 == batches:
            loader.close()
            break


@pytest.fixture
def start(process_server: ProcessServer) -> Iterator[Callable[..., Forked]]:
    """Starts `read`; ends what still runs after the test."""
    started: list[Forked] = []

    def start(url: str, cache: Path, *rest: object) -> Forked:
        started.append(process_server.open("tests.data_pipes.test_remote_loader:read", url, str(cache), *rest))
        return started[-1]

    yield start
    for process in started:
        process_server.kill(process.pid)
        process.stdout.close()


def lines(process: Forked) -> list[list[object]]:
    found = [json.loads(line) for line in process.stdout]
    process.stdout.close()
    assert process.wait() == 0
    return found


def summary(batches: list[Batch]) -> list[list[object]]:
    return [[batch.keys, int(batch.images.sum())] for batch in batches]


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_a_node_killed_in_mid_epoch_goes_on_with_its_half_full_cache(
    folder: Path, tmp_path: Path, kind: str, start: Callable[..., Forked]
) -> None:
    cache, position = tmp_path / "cache", 5 * 24
    with store("http", folder) as url:
        ranks = [start(url, cache, rank, 2, 0, 10**6, kind) for rank in range(2)]
        for process in ranks:
            for _ in range(4):
                process.stdout.readline()
        for process in ranks:  # rank and workers: the node
            os.killpg(process.pid, signal.SIGKILL)
        for process in ranks:
            process.wait()
            process.stdout.close()
        assert bytes_in(cache) > 0
        [again] = [start(url, cache, 0, 1, position, EPOCH, kind)]
        found = lines(again)
    assert found == summary(take(loader_for(config_for(str(folder))), EPOCH, position))
    assert bytes_in(cache) <= 4 << 20


def test_two_runs_share_a_cache(folder: Path, tmp_path: Path, start: Callable[..., Forked]) -> None:
    cache, highest = tmp_path / "cache", 0
    with store("http", folder) as url:
        runs = [start(url, cache, 0, 1, position, EPOCH, "thread") for position in (0, 24 * 20)]
        while any(process.poll() is None for process in runs) and highest <= 4 << 20:
            highest = max(highest, bytes_in(cache))
            time.sleep(0.02)
        highest = max(highest, bytes_in(cache))
        found = [lines(process) for process in runs]
    assert 0 < highest <= 4 << 20
    assert found[0] == summary(take(loader_for(config_for(str(folder))), EPOCH))
    assert found[1] == summary(take(loader_for(config_for(str(folder))), EPOCH, 24 * 20))
    assert ChunkCache(CacheConfig(str(cache), 4 << 20)).status().used_bytes <= 4 << 20


def test_a_killed_worker_process_is_an_error_with_advice(folder: Path, tmp_path: Path) -> None:
    with FaultyServer(folder, delay_s=0.02) as server:
        loader = loader_for(config_for(server.url, tmp_path / "cache", workers=1, worker_kind="process"))
        with closing(loader):
            batches = loader.batches(0)
            next(batches)
            [worker] = [child for child in multiprocessing.active_children() if child.pid is not None]
            os.kill(worker.pid or 0, signal.SIGKILL)
            with pytest.raises(RuntimeError, match="data worker process died"):
                deque(islice(batches, 10), maxlen=0)
