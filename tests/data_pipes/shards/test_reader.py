"""Reading members at random, and noticing that a shard is not the one that was indexed."""

from __future__ import annotations

import copy
import io
import tarfile
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import webdataset

from data_pipes.errors import ShardError
from data_pipes.index.index import index_shards
from data_pipes.shards import reader as reader_module
from data_pipes.shards.manifest import Manifest
from data_pipes.shards.reader import ShardReader
from tests.data_pipes.tiny_shards import picture, write_shards


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return write_shards(tmp_path / "data", [3, 5, 2])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves shards open
def test_reads_what_webdataset_reads(manifest: Manifest) -> None:
    reader = ShardReader(manifest)
    for shard in range(3):
        expected = list(webdataset.WebDataset(str(manifest.shard_path(shard)), shardshuffle=False))
        for sample, members in enumerate(expected):
            raw = reader.read(shard, sample)
            assert raw.key == members["__key__"] == reader.key(shard, sample)
            assert raw.members == {name: data for name, data in members.items() if not name.startswith("__")}


def test_chosen_members_only(tmp_path: Path) -> None:
    members = {"cls": b"3", "png": picture(0), "txt": b"x" * 5000}
    manifest = write_shards(tmp_path, [2], {0: members})
    raw = ShardReader(manifest, ("png", "cls")).read(0, 0)
    assert raw.members == {"cls": b"3", "png": members["png"]}
    assert sorted(raw.found) == ["cls", "png", "txt"]
    assert ShardReader(manifest, ("jpg",)).read(0, 0).members == {}


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("name", ["a", "folder/" + "b" * 80, "deep/" * 30 + "c", "n" * 90 + "/" + "d" * 40, "bär/ü"])
def test_names_of_every_kind(tmp_path: Path, tar_format: int, name: str) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=tar_format) as tar:
        for extension, data in (("JPEG", b"picture"), ("cls", b"1")):
            info = tarfile.TarInfo(f"{name}.{extension}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    raw = ShardReader(index_shards([path], tmp_path)).read(0, 0)
    assert raw.key == name
    assert raw.members == {"jpeg": b"picture", "cls": b"1"}


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def test_a_changed_shard_is_an_error(manifest: Manifest) -> None:
    path = manifest.shard_path(1)
    content = path.read_bytes()
    first_header = content.index(b"000004.")
    overwrite(path, first_header, b"009999.")
    with pytest.raises(ShardError, match=r"shard-000001\.tar: no header of 000004\.(cls|png) at byte"):
        ShardReader(manifest).read(1, 1)
    path.write_bytes(content)
    overwrite(path, first_header + 124, b"00000000077\0")  # the size field
    with pytest.raises(ShardError, match="no header of 000004"):
        ShardReader(manifest).read(1, 1)
    ShardReader(manifest).read(1, 0)


def test_a_cut_or_missing_shard_is_an_error(manifest: Manifest) -> None:
    path = manifest.shard_path(0)
    reader = ShardReader(manifest)
    reader.read(0, 0)
    content = path.read_bytes()
    overwrite(path, 0, b"")
    with open(path, "r+b") as file:
        file.truncate(1024)
    with pytest.raises(
        ShardError, match=r"shard-000000\.tar: it has 0 of the .* bytes from byte .* cut while it was open"
    ):
        reader.read(0, 2)
    with pytest.raises(ShardError, match=f"1,024 bytes, the manifest says {len(content):,}"):
        ShardReader(manifest).read(0, 0)
    path.unlink()
    with pytest.raises(ShardError, match=r"shard-000000\.tar: cannot be read.*No such file"):
        ShardReader(manifest).read(0, 0)


def test_a_foreign_index_is_an_error(manifest: Manifest) -> None:
    manifest.index_path(0).write_bytes(manifest.index_path(2).read_bytes())
    with pytest.raises(ShardError, match="not the index that the manifest names"):
        ShardReader(manifest).read(0, 0)


@pytest.mark.parametrize("field", ["num_samples", "size_bytes"])
def test_an_index_that_contradicts_the_manifest_is_an_error(manifest: Manifest, field: str) -> None:
    entry = manifest.shards[0]
    wrong = replace(entry, **{field: getattr(entry, field) + 1})
    changed = replace(manifest, shards=(wrong, *manifest.shards[1:]))
    with pytest.raises(ShardError, match=r"3 samples in .* bytes, the manifest says"):
        ShardReader(changed).key(0, 0)


def test_few_handles_and_indexes_stay_open(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "_MAX_OPEN_SHARDS", 2)
    monkeypatch.setattr(reader_module, "_MAX_INDEXED_SAMPLES", 6)
    reader = ShardReader(manifest)
    for _ in range(3):
        for shard in (0, 1, 2):
            reader.read(shard, 0)
            assert len(reader._files) <= 2
            assert 0 < sum(index.num_samples for index in reader._indexes.values()) <= 7
    reader.close()
    assert reader.read(2, 1).key == "000009"


def test_threads_and_copies_share_nothing_harmful(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "_MAX_OPEN_SHARDS", 1)
    reader = ShardReader(manifest)
    wrong: list[str] = []

    def work() -> None:
        for i in range(60):
            shard = i % 3
            if reader.read(shard, 0).key != f"{(0, 3, 8)[shard]:06d}":
                wrong.append("key")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert copy.deepcopy(reader).read(1, 1) == reader.read(1, 1)
