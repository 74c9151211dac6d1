"""Reading, listing and writing by the S3 protocol, against a whole S3 server on loopback."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from data_pipes.errors import ShardError
from data_pipes.store.errors import StorageError
from data_pipes.store.storage import Storage
from data_pipes.store.transport import ByteRange, StorageConfig
from tests.data_pipes.store.s3_server import put_objects, s3_server

CONTENT = random.Random(0).randbytes(500_000)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    objects = {"train/a.tar": CONTENT, "train/b.tar": b"b" * 100, "train/sub/c.tar": b"", "odd/what?#ü 1.tar": b"odd"}
    with s3_server(objects) as url:
        yield url


@pytest.fixture
def storage(bucket: str) -> Iterator[Storage]:
    storage = Storage(StorageConfig(request_bytes=100_000, timeout_s=5, retries=2, backoff_s=0.01))
    yield storage
    storage.close()


def test_reads(bucket: str, storage: Storage) -> None:
    url, draw = f"{bucket}/train/a.tar", random.Random(1)
    info = storage.info(url)
    assert info.size_bytes == len(CONTENT)
    places = [(offset := draw.randrange(len(CONTENT)), draw.randint(0, len(CONTENT) - offset)) for _ in range(20)]
    futures = [storage.submit(ByteRange(url, *place, info.size_bytes, info.etag)) for place in places]
    for (offset, length), future in zip(places, futures, strict=True):
        assert future.result(30) == CONTENT[offset : offset + length]
    assert storage.read_whole(f"{bucket}/train/sub/c.tar", 0) == b""
    assert storage.read_whole(f"{bucket}/odd/what?#ü 1.tar", 10) == b"odd"
    with storage.open(url) as file:
        file.seek(250_000)
        assert file.read() == CONTENT[250_000:]
    assert storage.counters.peek()["bytes_fetched"] == sum(length for _, length in places) + 3 + 300_000
    assert "retries" not in storage.counters.peek()


def test_lists_and_writes(bucket: str, storage: Storage) -> None:
    shards = [f"{bucket}/train/a.tar", f"{bucket}/train/b.tar"]
    assert storage.list(f"{bucket}/train") == storage.list(f"{bucket}/train/") == shards
    assert storage.list(f"{bucket}/train/*.tar") == storage.list(f"{bucket}/*/*.tar")[1:] == shards
    assert storage.list(f"{bucket}/**/*.tar")[-1] == f"{bucket}/train/sub/c.tar"
    assert storage.list(f"{bucket}/train/*") == shards  # the folder `sub` is no object
    storage.write_whole(f"{bucket}/new/a.tar.idx", b"index")
    assert storage.list(f"{bucket}/new") == [f"{bucket}/new/a.tar.idx"]
    storage.write_whole(f"{bucket}/new/a.tar.idx", b"another")
    assert storage.read_whole(f"{bucket}/new/a.tar.idx", 10) == b"another"


def test_a_replaced_object(bucket: str, storage: Storage) -> None:
    url = f"{bucket}/changing/a.tar"
    put_objects({"changing/a.tar": b"x" * 100})
    info = storage.info(url)
    wanted = ByteRange(url, 0, 10, info.size_bytes, info.etag)
    assert storage.read_range(wanted) == b"x" * 10
    put_objects({"changing/a.tar": b"y" * 100})
    with pytest.raises(ShardError, match=f"changing/a.tar.* expected etag {info.etag}"):
        storage.read_range(wanted)
    put_objects({"changing/a.tar": b"x" * 50})
    for offset in (0, 60):
        with pytest.raises(ShardError, match="50 bytes now, expected 100"):
            storage.read_range(wanted._replace(offset=offset))
    assert "retries" not in storage.counters.peek()


def test_what_is_not_there(bucket: str, storage: Storage) -> None:
    for url in (f"{bucket}/train/none.tar", "s3://no-such-bucket/a.tar"):
        with pytest.raises(FileNotFoundError, match=url):
            storage.info(url)
        with pytest.raises(FileNotFoundError, match=url):
            storage.read_range(ByteRange(url, 0, 5, 5, None))
    for url in (f"{bucket}/none/", "s3://no-such-bucket/"):
        with pytest.raises(FileNotFoundError, match=url):
            storage.list(url)
    assert storage.list(f"{bucket}/none/*.tar") == []
    with pytest.raises(StorageError):
        storage.write_whole("s3://no-such-bucket/a", b"")


def test_no_credentials(bucket: str, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert os.environ["AWS_EC2_METADATA_DISABLED"] == "true"
    with pytest.raises(PermissionError, match="FSSPEC_S3_ANON"):
        storage.info(f"{bucket}/train/a.tar")
