"""The index agrees with what stock webdataset and tarfile read, whatever wrote the shard."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_expander

from data_pipes.errors import ShardError
from data_pipes.index.index import IndexedShard, index_shards
from data_pipes.index.walk import index_shard
from data_pipes.shards.index_file import ShardIndex
from data_pipes.shards.manifest import Manifest
from data_pipes.shards.tar import BLOCK, walk_tar
from launchers.cli import main

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT}


def write_tar(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_shard(path: Path, num_samples: int, first: int = 0) -> Path:
    samples = range(first, first + num_samples)
    return write_tar(path, [(f"{i:05d}.{ext}", ext.encode() * (i + 1)) for i in samples for ext in ("cls", "jpg")])


def read_by_index(path: Path, index: ShardIndex) -> list[tuple[str, dict[str, bytes]]]:
    data = path.read_bytes()
    return [
        (key, {ext: data[offset : offset + size] for ext, (offset, size) in index.members(i).items()})
        for i, key in enumerate(index.keys)
    ]


def read_by_webdataset(path: Path) -> list[tuple[str, dict[str, bytes]]]:
    with open(path, "rb") as stream:  # webdataset.WebDataset would leave it open
        samples = list(group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}])))
    return [
        (s["__key__"], {k: v for k, v in s.items() if k not in ("__key__", "__url__", "__local_path__")})
        for s in samples
    ]


def test_index_of_what_stock_webdataset_wrote(tmp_path: Path) -> None:
    pattern = str(tmp_path / "%03d.tar")
    with webdataset.ShardWriter(pattern, maxcount=4, verbose=0) as writer:
        for i in range(10):
            writer.write({"__key__": f"dir.v1/sample{i}", "jpg": os.urandom(700), "cls": i, "seg.png": b"", "JSON": {}})
    shards = sorted(tmp_path.glob("*.tar"))
    manifest = index_shards(shards, tmp_path)
    assert [entry.num_samples for entry in manifest.shards] == [4, 4, 2]
    for number, shard in enumerate(shards):
        index = ShardIndex.load(manifest.index_path(number), manifest.shards[number].index_sha256)
        assert read_by_index(shard, index) == read_by_webdataset(shard)
    assert set(index.members(0)) == {"jpg", "cls", "seg.png", "json"}


@pytest.mark.parametrize("form", FORMATS)
def test_formats_and_names(tmp_path: Path, form: str) -> None:
    names = ["a/b.jpg", "a/b.cls", "x" * 60 + "/" + "y" * 80 + ".png", "./dot.JPG"]
    if form != "ustar":
        names += ["größe/ümläut.jpg", "日本/写真.jpg", "z" * 300 + ".jpg", "é" * 99 + ".jpg"]
    path = write_tar(tmp_path / "s.tar", [(name, name.encode()) for name in names], FORMATS[form])
    index = index_shard(path)
    assert read_by_index(path, index) == read_by_webdataset(path)
    assert index.num_samples == len(names) - 1
    # One ranged read holds a whole sample, extended headers included: it is a tar of its own.
    data = path.read_bytes()
    for i in range(index.num_samples):
        start, size = int(index.sample_offset[i]), int(index.sample_size[i])
        assert start % BLOCK == size % BLOCK == 0
        with tarfile.open(fileobj=io.BytesIO(data[start : start + size] + bytes(2 * BLOCK))) as tar:
            assert len(tar.getmembers()) == len(index.members(i))


name_parts = st.text(st.sampled_from("ab.ü_ 1"), min_size=1, max_size=12)
members_lists = st.lists(
    st.tuples(st.lists(name_parts, min_size=1, max_size=2).map("/".join), st.binary(max_size=1030)), max_size=6
)


@settings(max_examples=60, deadline=None)
@given(members=members_lists, form=st.sampled_from(sorted(FORMATS.values())))
def test_any_names_give_the_samples_of_stock_webdataset_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, members: list[tuple[str, bytes]], form: int
) -> None:
    path = tmp_path_factory.mktemp("any") / "s.tar"
    write_tar(path, members, form)
    # Of ".hidden" webdataset makes keys like "folder/", of "a." the extension "": here they belong to no sample.
    bases = [name.rpartition("/")[2] for name, _ in members]
    special = any(base.startswith(".") or base.find(".") == len(base) - 1 for base in bases)
    try:
        index = index_shard(path)
    except ShardError:
        return  # two members of one name, or no sample
    assert special or read_by_index(path, index) == read_by_webdataset(path)
    assert sum(len(index.members(i)) for i in range(index.num_samples)) + index.num_skipped == len(members)


def test_members_without_a_sample_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("pictures")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in ("pictures/a.jpg", "README", "__meta__/info.json", "pictures/._b.jpg", "pictures/b.jpg"):
            tar.addfile(tarfile.TarInfo(name))
    index = index_shard(path)
    assert index.keys == ["pictures/a", "pictures/b"]
    assert index.num_skipped == 4


def header(name: str, size_field: bytes) -> bytes:
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    block[124:136] = size_field
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def base256(size: int) -> bytes:
    return b"\x80" + size.to_bytes(11, "big")


def test_base_256_size(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    path.write_bytes(header("a.jpg", base256(700)) + b"x" * 1024 + header("a.cls", b"00000000001\0") + bytes(3 * BLOCK))
    assert index_shard(path).members(0) == {"jpg": (512, 700), "cls": (2048, 1)}


class SparseFile(io.RawIOBase):
    """A file of many GiB that is zero but for a few blocks."""

    def __init__(self, blocks: dict[int, bytes]) -> None:
        self.blocks, self.position = blocks, 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = offset
        return offset

    def read(self, size: int = -1) -> bytes:
        return self.blocks.get(self.position, bytes(BLOCK))[:size].ljust(size, b"\0")


def test_members_beyond_8_gib() -> None:
    big = 9 << 30
    pax = b"19 size=9663676416\n"
    stream = SparseFile({0: header("a.bin", base256(big)), BLOCK + big: header("b.bin", b"00000000001\0")})
    members = list(walk_tar(stream, big + 5 * BLOCK))  # type: ignore[arg-type]
    assert [(m.name, m.data, m.size) for m in members] == [("a.bin", 512, big), ("b.bin", big + 1024, 1)]
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, len(pax)
    blocks = {0: info.tobuf(), BLOCK: pax, 2 * BLOCK: header("a.bin", b"00000000000\0")}
    members = list(walk_tar(SparseFile(blocks), big + 5 * BLOCK))  # type: ignore[arg-type]
    assert [(m.header, m.data, m.size) for m in members] == [(0, 3 * BLOCK, big)]


def test_index_file_round_trip(tmp_path: Path) -> None:
    index = index_shard(write_shard(tmp_path / "s.tar", 50))
    digest = index.save(tmp_path / "s.idx")
    loaded = ShardIndex.load(tmp_path / "s.idx", digest)
    assert loaded.keys == index.keys == [f"{i:05d}" for i in range(50)]
    assert [loaded.members(i) for i in range(50)] == [index.members(i) for i in range(50)]
    assert loaded.sample_offset.dtype == np.uint64
    assert loaded.to_bytes() == (tmp_path / "s.idx").read_bytes() == index.to_bytes()
    assert hashlib.sha256((tmp_path / "s.idx").read_bytes()).hexdigest() == digest
    with pytest.raises(IndexError, match="sample 50 of a shard with 50"):
        loaded.members(50)


def test_index_with_large_offsets_round_trip(tmp_path: Path) -> None:
    index = index_shard(write_shard(tmp_path / "s.tar", 2))
    shifted = ShardIndex(
        **{**vars(index), "size_bytes": 1 << 41, "member_offset": index.member_offset + np.uint64(1 << 40)}
    )
    shifted.save(tmp_path / "s.idx")
    assert ShardIndex.load(tmp_path / "s.idx").members(1)["jpg"][0] == index.members(1)["jpg"][0] + (1 << 40)


def test_damaged_index_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.idx"
    index_shard(write_shard(tmp_path / "s.tar", 3)).save(path)
    intact = path.read_bytes()
    for position in range(0, len(intact), 5):
        path.write_bytes(intact[:position])
        with pytest.raises(ShardError, match=r"damaged index file .* run `tessera index` again"):
            ShardIndex.load(path)
        path.write_bytes(intact[:position] + bytes([intact[position] ^ 1]) + intact[position + 1 :])
        with pytest.raises(ShardError, match="damaged index file"):
            ShardIndex.load(path)
    path.write_bytes(intact)
    with pytest.raises(ShardError, match="not the index that the manifest names"):
        ShardIndex.load(path, "0" * 64)
    with pytest.raises(ShardError, match="no such index file"):
        ShardIndex.load(tmp_path / "none.idx")


@pytest.mark.parametrize(
    ("field", "value"),
    [("member_offset", 1 << 50), ("member_size", 1 << 63), ("sample_offset", 1 << 50), ("member_extension", 7)],
)
def test_index_that_points_out_of_the_shard_is_refused(tmp_path: Path, field: str, value: int) -> None:
    index = index_shard(write_shard(tmp_path / "s.tar", 3))
    array = getattr(index, field).copy()
    array[1] = value
    ShardIndex(**{**vars(index), field: array}).save(tmp_path / "s.idx")
    with pytest.raises(ShardError, match="contradict"):
        ShardIndex.load(tmp_path / "s.idx")


def test_fingerprint_stays_when_the_folder_moves_and_changes_with_the_data(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    shards = [write_shard(tmp_path / "a" / f"{i}.tar", 3) for i in range(3)]
    fingerprint = index_shards(shards, tmp_path / "a", ["cat", "dog"]).fingerprint
    shutil.move(tmp_path / "a", tmp_path / "b")
    moved = Manifest.load(tmp_path / "b")
    assert moved.fingerprint == fingerprint
    assert moved.classes == ("cat", "dog")
    assert moved.shard_path(1) == tmp_path / "b" / "1.tar"
    assert ShardIndex.load(moved.index_path(1), moved.shards[1].index_sha256).num_samples == 3
    again = index_shards([tmp_path / "b" / f"{i}.tar" for i in range(3)], tmp_path / "b")
    assert again.fingerprint == fingerprint
    reordered = index_shards([tmp_path / "b" / f"{i}.tar" for i in (1, 0, 2)], tmp_path / "b")
    assert reordered.fingerprint != fingerprint
    write_shard(tmp_path / "b" / "1.tar", 3, first=5)
    changed = index_shards([tmp_path / "b" / f"{i}.tar" for i in range(3)], tmp_path / "b")
    assert changed.fingerprint != fingerprint


def test_valid_indexes_are_kept_and_stale_ones_are_not(tmp_path: Path) -> None:
    shards = [write_shard(tmp_path / f"{i}.tar", 4) for i in range(3)]

    def kept(*, force: bool = False) -> list[bool]:
        reports: list[IndexedShard] = []
        index_shards(shards, tmp_path, force=force, on_shard=reports.append)
        return [report.kept for report in reports]

    assert kept() == [False, False, False]
    assert kept() == [True, True, True]
    assert kept(force=True) == [False, False, False]
    idx = tmp_path / "0.tar.idx"
    idx.write_bytes(idx.read_bytes()[:-1])  # damaged
    write_shard(shards[1], 5)  # another size
    write_shard(shards[2], 4, first=7)  # the same size, written later
    os.utime(shards[2], ns=(2**62, idx.stat().st_mtime_ns + 10**9))
    assert kept() == [False, False, False]


def test_index_folder_keeps_equal_names_apart_and_leaves_the_shards_alone(tmp_path: Path) -> None:
    shards = []
    for number, folder in enumerate(("a", "b")):
        (tmp_path / folder).mkdir()
        shards.append(write_shard(tmp_path / folder / "000.tar", 2 + number))
    out = tmp_path / "out"
    manifest = index_shards(shards, out, index_dir=out / "index", workers=2)
    assert sorted(path.name for path in tmp_path.glob("[ab]/*")) == ["000.tar", "000.tar"]
    loaded = Manifest.load(out)
    assert loaded == manifest
    assert loaded.index_dir == "index"
    assert [ShardIndex.load(loaded.index_path(i)).num_samples for i in range(2)] == [2, 3]


def test_shard_lists_that_make_no_dataset(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "s.tar", 1)
    with pytest.raises(ShardError, match="no shard to index"):
        index_shards([], tmp_path)
    with pytest.raises(ShardError, match="given twice"):
        index_shards([shard, tmp_path / ".." / tmp_path.name / "s.tar"], tmp_path)
    with pytest.raises(ValueError, match="unique"):
        index_shards([shard], tmp_path, ["cat", "cat"])
    with pytest.raises(ShardError, match=r"cannot be opened .* check the path"):
        index_shards([tmp_path / "none.tar"], tmp_path)


def edited(content: dict[str, object], **changes: object) -> str:
    return json.dumps({**content, **changes})


def test_manifests_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such dataset folder; pack one with"):
        Manifest.load(tmp_path / "none")
    (tmp_path / "file.tar").touch()
    with pytest.raises(ValueError, match=r"no such dataset folder"):
        Manifest.load(tmp_path / "file.tar")
    with pytest.raises(ValueError, match=r"no manifest.json here; run `tessera index"):
        Manifest.load(tmp_path)
    index_shards([write_shard(tmp_path / "s.tar", 2)], tmp_path)
    (tmp_path / "train").mkdir()
    shutil.copy(tmp_path / "manifest.json", tmp_path / "train")
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text())
    entry = content["shards"][0]
    path.unlink()
    with pytest.raises(ValueError, match="datasets are in the folders train below"):
        Manifest.load(tmp_path)
    for text, message in {
        "{": "not a manifest",
        "[]": "not a manifest of tessera",
        edited(content, version=2): "manifest version 2, this program reads version 1",
        edited(content, shards=[]): "no shards",
        edited(content, shards=[{**entry, "num_samples": 0}]): "the dataset is empty",
        edited(content, shards=[{**entry, "num_samples": 3}]): "edited by hand",
        edited(content, shards=[{**entry, "num_samples": -3}]): "malformed entry",
        edited(content, shards=[{**entry, "num_samples": True}]): "malformed entry",
        edited(content, shards=[{**entry, "url": "../s.tar"}]): "malformed entry",
        edited(content, shards=[{**entry, "more": 1}]): "malformed manifest",
        edited(content, classes=[1]): "malformed classes",
        edited(content, classes=None): "malformed manifest",
    }.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            Manifest.load(tmp_path)


@pytest.mark.parametrize("url", ["pipe:touch hacked", "s3://bucket/000.tar"])
def test_urls_that_are_no_path_are_refused(tmp_path: Path, url: str) -> None:
    manifest = index_shards([write_shard(tmp_path / "s.tar", 2)], tmp_path)
    entry = type(manifest.shards[0])(**{**vars(manifest.shards[0]), "url": url})
    remote = Manifest(str(tmp_path), (entry,))
    with pytest.raises(ValueError, match="not a local path"):
        remote.shard_path(0)
    with pytest.raises(ValueError, match="not a local path"):
        remote.index_path(0)


@pytest.mark.parametrize("workers", [1, 2])
def test_all_shards_that_cannot_be_used_are_named_at_once(tmp_path: Path, workers: int) -> None:
    good = [write_tar(tmp_path / f"{n}.tar", [(f"{n}.png", b"x")]) for n in range(3)]
    empty = [write_tar(tmp_path / f"e{n}.tar", []) for n in range(2)]
    cut = tmp_path / "cut.tar"
    cut.write_bytes(good[0].read_bytes()[:700])
    shards = [good[0], empty[0], good[1], cut, empty[1], good[2]]
    for allow_empty, wrong in ((False, 3), (True, 1)):
        with pytest.raises(ShardError) as caught:
            index_shards(shards, tmp_path, workers=workers, allow_empty=allow_empty)
        names = {shard.name for shard in shards if str(shard) in str(caught.value)}
        assert names == ({"e0.tar", "e1.tar", "cut.tar"} if not allow_empty else {"cut.tar"})
        assert ("3 of 6 shards cannot be used" in str(caught.value)) == (wrong == 3)
        assert not (tmp_path / "manifest.json").exists()
    assert all(shard.with_name(shard.name + ".idx").exists() for shard in good)  # kept for the next attempt
    reports: list[bool] = []
    shards.remove(cut)
    manifest = index_shards(
        shards, tmp_path, workers=workers, allow_empty=True, on_shard=lambda report: reports.append(report.kept)
    )
    assert [entry.url for entry in manifest.shards] == ["0.tar", "1.tar", "2.tar"]
    assert reports == [True] * 3
    with pytest.raises(ShardError, match="2 of 2 shards cannot be used"):
        index_shards(empty, tmp_path / "none", allow_empty=True)


def test_the_command_leaves_empty_shards_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "a.tar", [("0.png", b"x")])
    write_tar(tmp_path / "b.tar", [])
    assert main(["index", str(tmp_path), "--workers", "1"]) != 0
    assert "b.tar: the shard holds no sample" in capsys.readouterr().err
    assert main(["index", str(tmp_path), "--workers", "1", "--allow-empty", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["num_empty_shards"] == 1
    assert "1 shards hold no sample and were left out" in printed.err
