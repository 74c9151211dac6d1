"""Shards that are streamed: what is promised about order and batches, and every way that a shard can be damaged."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path

import pytest
import torch
import webdataset
import webdataset.utils
from torch import Tensor

from data_pipes.batch import Batch, BatchPlan
from data_pipes.config import DataConfig
from data_pipes.errors import BadDataError, SampleError, ShardError
from data_pipes.loader import open_loader
from data_pipes.loading.dataset import Extras
from data_pipes.loading.unindexed_loader import SampleMaker, UnindexedLoader
from data_pipes.loading.unindexed_stream import SampleStream, UnindexedConfig, expand_urls
from data_pipes.shards.reader import RawSample
from data_pipes.store.storage import Storage
from tests.data_pipes.tiny_shards import picture


@pytest.fixture(autouse=True)
def _webdataset_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset.utils, "enforce_security", webdataset.utils.enforce_security)
    monkeypatch.setenv("WDS_SECURE", os.environ.get("WDS_SECURE", "0"))


def tar_of(members: Sequence[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def samples_of(numbers: Sequence[int]) -> list[tuple[str, bytes]]:
    return [
        member for n in numbers for member in ((f"{n:04d}.bin", bytes([n % 256])), (f"{n:04d}.cls", b"%d" % (n % 7)))
    ]


def write(folder: Path, counts: Sequence[int], pack: Callable[[bytes], bytes] = gzip.compress) -> list[str]:
    urls, number = [], 0
    for shard, count in enumerate(counts):
        urls.append(str(folder / f"{shard:03d}.tar.gz"))
        Path(urls[-1]).write_bytes(pack(tar_of(samples_of(range(number, number + count)))))
        number += count
    return urls


def make(raw: RawSample, uniforms: Sequence[float]) -> Tensor:
    value = raw.members["bin"][0]
    if value % 10 == 9:
        raise SampleError("decode", "ends with a nine")
    return torch.tensor([value, int(uniforms[0] * 256)], dtype=torch.uint8)


def loader_of(
    urls: Sequence[str],
    plan: BatchPlan,
    *,
    seed: int = 0,
    shuffle: int = 8,
    workers: int = 0,
    max_bad_fraction: float = 1.0,
    maker: Callable[[RawSample, Sequence[float]], Tensor] = make,
    quarantine_dir: Path | None = None,
) -> UnindexedLoader:
    stream = SampleStream(
        urls,
        ("bin", "cls"),
        Storage(),
        UnindexedConfig(list(urls), shuffle),
        seed=seed,
        rank=plan.rank,
        world_size=plan.world_size,
    )
    return UnindexedLoader(
        stream,
        SampleMaker(maker, 1, Extras()),
        plan,
        workers=workers,
        max_bad_fraction=max_bad_fraction,
        quarantine_dir=quarantine_dir,
        pin_memory=False,
    )


def take(loader: UnindexedLoader, count: int, position: int = 0) -> list[Batch]:
    with closing(loader):
        return list(islice(loader.batches(position), count))


def content(batches: Sequence[Batch]) -> list[tuple[str, int, list[int], int]]:
    return [
        (key, int(label), image.tolist(), int(position))
        for batch in batches
        for key, label, image, position in zip(batch.keys, batch.labels, batch.images, batch.positions, strict=True)
    ]


@pytest.mark.parametrize("pack", [gzip.compress, bytes], ids=["gzip", "plain"])
def test_every_sample_once_a_pass(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    urls = write(tmp_path, [9, 3, 8], pack)
    stream = SampleStream(urls, ("bin",), Storage(), UnindexedConfig(urls, shuffle=1), seed=3)
    keys = [raw.key for _, raw in islice(stream.samples(0), 60)]
    for epoch in range(3):
        assert sorted(keys[20 * epoch : 20 * epoch + 20]) == [f"{n:04d}" for n in range(20)]
    assert keys[:20] != keys[20:40]
    _, raw = next(stream.samples(0))
    assert set(raw.members) == {"bin"}
    assert raw.found == ("bin", "cls")


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_share_each_pass(tmp_path: Path, world_size: int) -> None:
    urls = write(tmp_path, [4, 4, 4, 4])
    orders = [
        SampleStream(urls, (), Storage(), UnindexedConfig(urls), seed=1, rank=rank, world_size=world_size).shard_order(
            0
        )
        for rank in range(world_size)
    ]
    dealt = [url for _ in range(4) for order in orders for url in islice(order, 1)]
    for start in range(0, len(dealt) - 3, 4):
        assert sorted(dealt[start : start + 4]) == urls


def test_batches_are_equal_and_labelled(tmp_path: Path) -> None:
    urls = write(tmp_path, [5, 1, 7])
    for rank in range(2):
        batches = take(loader_of(urls, BatchPlan(16, 4, rank, 2)), 30, position=32)
        assert {len(batch.keys) for batch in batches} == {4}
        assert batches[0].positions.tolist() == list(range(32 + 8 * rank, 36 + 8 * rank))
        assert all(label == int(key) % 7 and image[0] == int(key) for key, label, image, _ in content(batches))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_same_batches_with_any_number_of_workers(tmp_path: Path, workers: int) -> None:
    urls = write(tmp_path, [25, 30])
    expected = content(take(loader_of(urls, BatchPlan(8, 8)), 12))
    assert content(take(loader_of(urls, BatchPlan(8, 8), workers=workers), 12)) == expected
    assert not [key for key, *_ in expected if key.endswith("9")]  # bad samples were replaced
    assert content(take(loader_of(urls, BatchPlan(8, 8), workers=workers), 12, position=8)) != expected
    assert content(take(loader_of(urls, BatchPlan(8, 8), workers=workers, seed=1), 12)) != expected


def test_bad_samples_are_written_down(tmp_path: Path) -> None:
    loader = loader_of(write(tmp_path, [40]), BatchPlan(8, 8), quarantine_dir=tmp_path / "bad")
    take(loader, 10)
    assert loader.bad.by_cause["decode"] == loader.bad.num_bad > 4
    assert '"key": "0009"' in (tmp_path / "bad" / "rank00000.jsonl").read_text()
    assert loader.counters.take()["samples_loaded"] == 80


def test_too_many_bad_samples_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(BadDataError, match="max_bad_fraction"):
        take(loader_of(write(tmp_path, [40]), BatchPlan(8, 8), max_bad_fraction=0.02), 1000)


def test_nothing_but_bad_samples_is_no_endless_wait(tmp_path: Path) -> None:
    def refuse(raw: RawSample, uniforms: Sequence[float]) -> Tensor:
        raise SampleError("decode", "no good")

    with pytest.raises(BadDataError, match="does not fill"):
        take(loader_of(write(tmp_path, [9]), BatchPlan(8, 8), maker=refuse), 1)


def test_empty_shards_are_no_endless_wait(tmp_path: Path) -> None:
    urls = write(tmp_path, [0, 0])
    with pytest.raises(ShardError, match="none of the 2 shards holds a sample"):
        take(loader_of(urls, BatchPlan(8, 8)), 1)


def _first_member_again(tar: bytes) -> bytes:
    return tar_of([*samples_of([1, 2]), *samples_of([1])])


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut between members": (lambda tar: gzip.compress(tar[: 1024 * 10]), "without the end marker"),
    "cut inside data": (lambda tar: gzip.compress(tar[: 1024 * 10 + 513]), "inside '0005.bin'|truncated"),
    "cut inside a header": (lambda tar: gzip.compress(tar[: 1024 * 10 + 100]), "truncated"),
    "zero block in mid-file": (lambda tar: gzip.compress(tar[:10240] + bytes(512) + tar[10752:]), "zero block"),
    "two zero blocks in mid-file": (lambda tar: gzip.compress(tar[:10240] + bytes(1024) + tar[11264:]), "end marker"),
    "bad header": (lambda tar: gzip.compress(tar[:10240] + b"\xff" + tar[10241:]), "no valid tar header"),
    "gzip cut": (lambda tar: gzip.compress(tar)[:-9], "damaged or cut short"),
    "gzip checksum": (lambda tar: gzip.compress(tar)[:-8] + bytes(8), "damaged or cut short"),
    "garbage behind": (lambda tar: gzip.compress(tar) + b"garbage", "damaged or cut short"),
    "not adjacent": (lambda tar: gzip.compress(_first_member_again(tar)), "not adjacent"),
    "same extension": (lambda tar: gzip.compress(tar_of([("1.bin", b"1"), ("1.BIN", b"2")])), "two members"),
    "no tar": (lambda tar: gzip.compress(b"hello" * 1000), "no valid tar header"),
    "absolute name": (lambda tar: gzip.compress(tar_of([("/etc/1.bin", b"1")])), "leads out of the shard"),
    "zstd": (lambda tar: b"\x28\xb5\x2f\xfd" + tar, "zstd"),
    "too large": (lambda tar: gzip.compress(tar_of([("1.bin", bytes(3000))])), "max_member_bytes"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_silent_loss(tmp_path: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    path = tmp_path / "a.tar.gz"
    path.write_bytes(change(tar_of(samples_of(range(20)))))
    stream = SampleStream(
        [str(path)], ("bin",), Storage(), UnindexedConfig([str(path)], shuffle=1, max_member_bytes=2000), seed=0
    )
    with pytest.raises(ShardError, match=message) as caught:
        list(islice(stream.samples(0), 60))
    assert str(path) in str(caught.value)


def test_state_belongs_to_the_data(tmp_path: Path) -> None:
    urls = write(tmp_path, [4, 4])
    loader = loader_of(urls, BatchPlan(8, 8))
    loader.check_state(loader.state(80))
    for other in (loader_of(urls[:1], BatchPlan(8, 8)), loader_of(urls, BatchPlan(8, 8), seed=1)):
        with pytest.raises(ValueError, match="changed; restore them"):
            other.check_state(loader.state(80))


def test_urls(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage()
    assert expand_urls(["a/{00..02}.tar.gz", "b.tar"], storage) == [*(f"a/0{n}.tar.gz" for n in range(3)), "b.tar"]
    for wrong in ("pipe:cat x", "ftp://host/x.tar", "zip://a::s3://b/c", "https://user:word@host/x.tar"):
        with pytest.raises(ValueError, match=r"pipe|scheme|chained|password"):
            expand_urls([wrong], storage)
    with pytest.raises(ValueError, match="names no shard"):
        expand_urls([], storage)
    monkeypatch.setattr("data_pipes.loading.unindexed_stream._MAX_SHARDS", 1000)
    with pytest.raises(ValueError, match="more than 1,000 shards"):
        expand_urls(["{0000..1000}"], storage)


def test_secure_mode_is_on_while_a_stream_is_read(tmp_path: Path) -> None:
    loader = loader_of(write(tmp_path, [40]), BatchPlan(8, 8))
    batches = loader.batches(0)
    next(batches)
    with pytest.raises(ValueError, match="unsafe_gopen is False"):
        webdataset.gopen("pipe:true")
    code = "import webdataset; print(webdataset.utils.enforce_security)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"  # and in the processes that are started meanwhile
    del batches
    loader.close()
    assert not webdataset.utils.enforce_security


def test_from_a_configuration(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    members = [
        m for n in range(20) for m in ((f"{n:02d}.png", picture(n)), (f"{n:02d}.cls", b"3"), (f"{n:02d}.txt", b"x"))
    ]
    path.write_bytes(gzip.compress(tar_of(members)))
    config = DataConfig(unindexed=UnindexedConfig([str(path)]), workers=1, captions=True)
    loader = open_loader(config, BatchPlan(8, 4), image_size=(8, 8), channels=3, state=None)
    with closing(loader):
        batch = next(iter(loader.batches(0)))
    assert batch.images.shape == (4, 3, 8, 8)
    assert batch.labels.tolist() == [3] * 4
    assert batch.captions == ["x"] * 4


@pytest.mark.parametrize("member", ["left.png", "l*.png"])
def test_the_member_that_is_named(tmp_path: Path, member: str) -> None:
    members = [m for n in range(20) for m in ((f"{n:02d}.right.png", b"none"), (f"{n:02d}.left.png", picture(n)))]
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(tar_of(members)))
    config = DataConfig(unindexed=UnindexedConfig([str(tmp_path / "a.tar.gz")]), image_member=member)
    with closing(open_loader(config, BatchPlan(8, 4), image_size=(8, 8), channels=3, state=None)) as loader:
        assert len(next(iter(loader.batches(0))).keys) == 4
