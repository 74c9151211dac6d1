"""Shards in a store are indexed as local ones are: the same index, the same strictness, and a run that goes on."""

from __future__ import annotations

import argparse
import gzip
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipes.errors import ShardError
from data_pipes.index.index import IndexedShard, index_shards
from data_pipes.index.progress import JOURNAL_NAME
from data_pipes.shards.index_file import ShardIndex
from data_pipes.shards.manifest import Manifest
from data_pipes.store.errors import StorageError
from data_pipes.store.storage import Storage
from data_pipes.store.transport import ObjectInfo, StorageConfig
from launchers.commands import index as index_command
from tests.data_pipes.index.test_index import write_shard
from tests.data_pipes.store.faulty_server import FaultyServer
from tests.data_pipes.store.s3_server import put_objects, s3_server


def call(*argv: str | Path) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    index_command.add_arguments(parser)
    return index_command.run(parser.parse_args([*map(str, argv), "--workers", "1"]))


@pytest.fixture
def storage() -> Iterator[Storage]:
    storage = Storage(StorageConfig(backoff_s=0.01, retries=20, request_bytes=1 << 14))
    yield storage
    storage.close()


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    (tmp_path / "store" / "train").mkdir(parents=True)
    return [write_shard(tmp_path / "store" / "train" / f"s{i}.tar", 150, first=i) for i in (0, 2, 10)]


@pytest.fixture
def server(shards: list[Path]) -> Iterator[FaultyServer]:
    with FaultyServer(shards[0].parent.parent) as server:
        yield server


def local_index(shards: list[Path], folder: Path) -> Manifest:
    """Copies of the shards in `folder`, indexed there."""
    folder.mkdir()
    return index_shards([shutil.copy(shard, folder / shard.name) for shard in shards], folder)


def indexes(manifest: Manifest, storage: Storage) -> list[bytes]:
    found = [storage.read_whole(manifest.index_url(i), 1 << 30) for i in range(len(manifest.shards))]
    for data, entry in zip(found, manifest.shards, strict=True):
        assert ShardIndex.from_bytes(data, "index", entry.index_sha256).num_samples == entry.num_samples
    return found


def test_shards_of_a_web_server_into_a_local_folder(
    server: FaultyServer, shards: list[Path], tmp_path: Path, storage: Storage
) -> None:
    out = tmp_path / "out"
    result = call(f"{server.url}/train", "--out", out)
    manifest = Manifest.load(out)
    assert [entry.url for entry in manifest.shards] == [f"{server.url}/train/s{i}.tar" for i in (0, 2, 10)]
    assert [entry.etag for entry in manifest.shards] == [storage.info(entry.url).etag for entry in manifest.shards]
    assert None not in [entry.etag for entry in manifest.shards]
    assert manifest.index_dir == "index"
    assert indexes(manifest, storage) == indexes(local_index(shards, tmp_path / "local"), storage)
    assert sorted(path.name for path in out.iterdir()) == ["index", "manifest.json"]
    assert (result["num_samples"], result["num_kept_indexes"], result["out"]) == (450, 0, str(out))

    server.log.clear()
    assert call(f"{server.url}/train/*.tar", "--out", out)["num_kept_indexes"] == 3
    assert not [request for request in server.requests() if request.path.endswith(".tar")], "etags say all"

    content = bytearray(shards[1].read_bytes())
    content[512] ^= 1  # the same size and the same index: only the etag tells
    shards[1].write_bytes(content)
    os.utime(shards[1], ns=(0, shards[0].stat().st_mtime_ns + 5 * 10**9))
    Path(manifest.index_url(2)).unlink()
    assert call(f"{server.url}/train/s{{0,2,10}}.tar", "--out", out)["num_kept_indexes"] == 1
    again = Manifest.load(out)
    assert again.fingerprint == manifest.fingerprint
    assert [new.etag == old.etag for new, old in zip(again.shards, manifest.shards, strict=True)] == [True, False, True]


def test_an_interrupted_run_goes_on(server: FaultyServer, tmp_path: Path, storage: Storage) -> None:
    urls = [f"{server.url}/train/s{i}.tar" for i in (0, 2, 10)]
    kept: list[bool] = []

    def on_shard(report: IndexedShard) -> None:
        kept.append(report.kept)
        if len(kept) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index_shards(urls, tmp_path / "out", storage=storage, on_shard=on_shard)
    journal = tmp_path / "out" / JOURNAL_NAME
    journal.write_text(journal.read_text() + '{"url": "half a li')
    with pytest.raises(ValueError, match=r"no manifest\.json here"):
        Manifest.load(tmp_path / "out")
    reports: list[IndexedShard] = []
    manifest = index_shards(urls, tmp_path / "out", storage=storage, on_shard=reports.append)
    assert [report.kept for report in reports] == [True, True, False]
    assert manifest == Manifest.load(tmp_path / "out")
    assert not journal.exists()
    index_shards(urls, tmp_path / "out", storage=storage, on_shard=reports.append, force=True)
    assert not any(report.kept for report in reports[3:])


def test_a_server_that_fails_all_the_time(
    server: FaultyServer, shards: list[Path], tmp_path: Path, storage: Storage
) -> None:
    server.chances = {"drop": 0.15, "503": 0.1}
    urls = [f"{server.url}/train/s{i}.tar" for i in (0, 2, 10)]
    manifest = index_shards(urls, tmp_path / "out", storage=storage)
    assert indexes(manifest, storage) == indexes(local_index(shards, tmp_path / "local"), storage)
    assert storage.counters.peek()["retries"] > 3


def test_shards_in_a_bucket_with_everything_beside_them(
    shards: list[Path], tmp_path: Path, storage: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    local = local_index(shards, tmp_path / "local")
    with s3_server({f"data/train/{shard.name}": shard for shard in shards}) as bucket:
        try:
            result = call(f"{bucket}/data/train")
            assert f"{bucket}/data/train: 450 samples in 3 shards" in capsys.readouterr().err
            manifest = Manifest.load(f"{bucket}/data/train", storage)
            assert [entry.url for entry in manifest.shards] == ["s0.tar", "s2.tar", "s10.tar"]
            assert manifest.fingerprint == local.fingerprint == result["fingerprint"], "one data set, wherever it is"
            assert indexes(manifest, storage) == indexes(local, storage)
            assert manifest.index_url(0) == f"{bucket}/data/train/s0.tar.idx"
            assert call(f"{bucket}/data/train/*.tar")["num_kept_indexes"] == 3
            put_objects({"data/train/s2.tar": write_shard(tmp_path / "other.tar", 150, first=55)})
            assert call(f"{bucket}/data/train/s{{0,2,10}}.tar")["num_kept_indexes"] == 2
            assert call(f"{bucket}/data/train", "--force")["num_kept_indexes"] == 0
        finally:
            storage.close()


def test_several_processes(server: FaultyServer, shards: list[Path], tmp_path: Path, storage: Storage) -> None:
    urls = [f"{server.url}/train/{shard.name}" for shard in shards]
    manifest = index_shards(urls, tmp_path / "out", ["cat", "dog"], workers=2, index_dir=tmp_path / "idx")
    assert manifest.classes == ("cat", "dog")
    assert sorted(path.suffix for path in (tmp_path / "idx").iterdir()) == [".idx"] * 3
    assert indexes(Manifest.load(tmp_path / "out"), storage) == indexes(
        local_index(shards, tmp_path / "local"), storage
    )


def test_objects_in_memory(shards: list[Path], tmp_path: Path, storage: Storage) -> None:
    for shard in shards:
        storage.write_whole(f"memory://in/{shard.name}", shard.read_bytes())
    found = index_command.find_shards(["memory://in"], storage)
    assert found == [f"memory://in/s{i}.tar" for i in (0, 2, 10)]
    manifest = index_shards(found, "memory://in/", storage=storage, workers=8)
    assert Manifest.load("memory://in", storage) == manifest
    assert manifest.fingerprint == local_index(shards, tmp_path / "local").fingerprint
    with pytest.raises(ShardError, match=r"a local shard of a data set in memory://in; upload the shards, or name"):
        index_shards([shards[0]], "memory://in", storage=storage)


def test_damage_and_compression_name_the_object(server: FaultyServer, shards: list[Path], tmp_path: Path) -> None:
    train, out = shards[0].parent, tmp_path / "out"
    (train / "z.tar.gz").write_bytes(gzip.compress(shards[0].read_bytes()))
    with pytest.raises(
        ShardError, match=r"http.*z.tar.gz: compressed with gzip; .* unpack it to a plain .tar; .* data\.unindexed"
    ):
        call(f"{server.url}/train", "--out", out)
    (train / "z.tar.gz").unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-2000])
    with pytest.raises(ShardError, match=r"http.*s2.tar: the file is truncated.*samples begin before that place"):
        call(f"{server.url}/train", "--out", out)
    shards[1].write_bytes(b"")
    with pytest.raises(ShardError, match=r"http.*s2.tar: the file is empty"):
        call(f"{server.url}/train", "--out", out)
    with pytest.raises(StorageError, match=r"s1.tar: not there"):
        call(f"{server.url}/train/s{{0..1}}.tar", "--out", out)


def test_mistakes_are_found_before_anything_is_read(server: FaultyServer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for argv, message in (
        ((f"{server.url}/train",), r"web servers take no files; name a folder for the index with --out"),
        ((f"{server.url}/none*.tar", "--out", tmp_path), "no shard here"),
        (("pipe:cat x",), "run a shell command"),
        (("ftp://host/a.tar",), "the scheme ftp: is not allowed"),
        ((f"{server.url}/train/s0.tar", f"{server.url}/train/*.tar", "--out", tmp_path), "given twice"),
        ((f"{server.url}/train", "--out", tmp_path / "file" / "out"), "the manifest cannot be written .* --out"),
    ):
        server.log.clear()
        with pytest.raises(ValueError, match=message):
            call(*argv)
        assert not [request for request in server.requests() if request.path.endswith(".tar")]


class Replaced(Storage):
    """A store in which an object is replaced as soon as it was read."""

    looks = 0

    def info(self, url: str) -> ObjectInfo:
        self.looks += 1
        found = super().info(url)
        return found if self.looks < 3 else replace(found, etag="another")


def test_an_object_that_is_replaced_meanwhile(shards: list[Path], tmp_path: Path) -> None:
    storage = Replaced()
    storage.write_whole("memory://replaced/s.tar", shards[0].read_bytes())
    with pytest.raises(ShardError, match=r"memory://replaced/s.tar: the object was replaced while it was indexed"):
        index_shards(["memory://replaced/s.tar"], tmp_path / "out", storage=storage)
    assert not list((tmp_path / "out").glob("index/*"))
    storage.close()
