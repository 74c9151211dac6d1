"""Packing: what goes in comes out of stock webdataset, deterministic, resumable, never overwriting."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import shutil
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander

from data_pipes.index.walk import index_shard
from data_pipes.pack import pack as pack_module
from data_pipes.pack.listing import list_source
from data_pipes.pack.pack import pack
from data_pipes.pack.plan import PackOptions
from data_pipes.pack.reencode_picture import PictureOptions, UnreadableFile, prepare_picture
from data_pipes.pack.shard_writer import ShardPlan, ShardWriter, Stopped
from data_pipes.pack.sources import FolderSource, Source, ZipSource, natural_key
from data_pipes.shards.index_file import ShardIndex
from data_pipes.shards.manifest import Manifest
from tests.process_server import ProcessServer
from tests.processes import PATIENCE_S

SMALL = PackOptions(shard_samples=5)


def picture(seed: int, size: tuple[int, int] = (9, 7), form: str = "JPEG", mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, form)
    return out.getvalue()


def make_folder(root: Path, classes: tuple[str, ...] = ("cat", "dog", "class10", "class2"), each: int = 6) -> Path:
    for label, name in enumerate(classes):
        for i in range(each):
            form, suffix = (("JPEG", "JPEG"), ("PNG", "png"))[i % 2]
            path = root / name / ("sub" if i == 3 else "") / f"pic.{i}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(100 * label + i, form=form))
    return root


def make_zip(folder: Path, path: Path, prefix: str = "") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            if file.is_file():
                archive.write(file, prefix + file.relative_to(folder).as_posix())
    return path


def samples(dataset: Path) -> list[dict[str, bytes]]:
    """The samples of all shards by stock webdataset."""
    found = []
    for shard in sorted(dataset.glob("shard-*.tar")):
        with open(shard, "rb") as stream:
            found += list(group_by_keys(tar_file_expander([{"url": shard.name, "stream": stream}])))
    return [{k: v for k, v in sample.items() if k not in ("__url__", "__local_path__")} for sample in found]


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "source")


def test_what_goes_in_comes_out(source: Path, tmp_path: Path) -> None:
    result = pack(source, tmp_path / "out", options=SMALL)
    manifest = Manifest.load(tmp_path / "out" / "train")
    assert manifest == result.splits["train"]
    assert manifest.classes == ("cat", "class2", "class10", "dog")
    assert [entry.num_samples for entry in manifest.shards] == [5, 5, 5, 5, 4]
    packed = {str(s["__key__"]): s for s in samples(tmp_path / "out" / "train")}
    files = [path for path in source.rglob("*") if path.is_file()]
    assert len(packed) == len(files) == manifest.num_samples == 24
    for path in files:
        name = path.relative_to(source).with_suffix("")
        sample = packed[str(name.with_name(name.name.replace(".", "_")))]
        assert sample["jpg" if path.suffix == ".JPEG" else "png"] == path.read_bytes()
        assert sample["cls"] == str(manifest.classes.index(name.parts[0])).encode()
    for i in range(5):
        index = ShardIndex.load(manifest.index_path(i), manifest.shards[i].index_sha256)
        assert set(index.members(0)) in ({"cls", "jpg"}, {"cls", "png"})


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_pipeline_of_stock_webdataset_reads_it(source: Path, tmp_path: Path) -> None:
    """webdataset leaves its files open, hence the filters."""
    pack(source, tmp_path / "out", options=SMALL)
    urls = str(tmp_path / "out" / "train" / "shard-{000000..000004}.tar")
    dataset = webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("jpg;png", "cls")
    pairs = list(dataset)
    assert len(pairs) == 24
    assert all(image.shape == (7, 9, 3) and label in range(4) for image, label in pairs)


def test_shards_mix_classes_unless_told_not_to(source: Path, tmp_path: Path) -> None:
    pack(source, tmp_path / "mixed", options=replace(SMALL, shard_samples=12))
    pack(source, tmp_path / "plain", options=replace(SMALL, shuffle=False))
    pack(source, tmp_path / "other", options=replace(SMALL, shard_samples=12, seed=1))
    keys = {name: [s["__key__"] for s in samples(tmp_path / name / "train")] for name in ("mixed", "plain", "other")}
    assert keys["plain"] == sorted(keys["mixed"], key=lambda key: natural_key(str(key)))
    assert len({str(key).split("/")[0] for key in keys["mixed"][:12]}) == 4
    assert sorted(keys["mixed"]) == sorted(keys["other"])
    assert keys["mixed"] != keys["other"]


def test_packing_twice_and_with_more_workers_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    options = replace(SMALL, val_fraction=0.3, pictures=PictureOptions(short_side=5))
    pack(source, tmp_path / "a", options=options)
    shutil.move(source, tmp_path / "moved")
    for path in (tmp_path / "moved").rglob("*"):
        os.utime(path, (1, 1))
    pack(tmp_path / "moved", tmp_path / "b", options=options, workers=3)
    assert content(tmp_path / "a") == content(tmp_path / "b")


@pytest.mark.parametrize("prefix", ["", "train/", "data/set/train/"])
def test_a_zip_gives_the_same_shards_as_its_folder(source: Path, tmp_path: Path, prefix: str) -> None:
    archive = make_zip(source, tmp_path / "source.zip", prefix)
    from_folder = pack(source, tmp_path / "a", options=SMALL).splits["train"]
    from_zip = pack(archive, tmp_path / "b", options=SMALL).splits["train"]
    assert from_zip.fingerprint == from_folder.fingerprint
    assert content(tmp_path / "a" / "train") == content(tmp_path / "b" / "train")


def test_validation_share_is_disjoint_exhaustive_and_stable(source: Path, tmp_path: Path) -> None:
    def split(out: str, **changes: object) -> dict[str, set[str]]:
        pack(source, tmp_path / out, options=replace(SMALL, val_fraction=0.4, **changes))  # type: ignore[arg-type]
        return {name: {str(s["__key__"]) for s in samples(tmp_path / out / name)} for name in ("train", "val")}

    first = split("a")
    assert not first["train"] & first["val"]
    assert len(first["train"] | first["val"]) == 24
    assert 3 <= len(first["val"]) <= 16
    assert split("b", seed=5, shuffle=False) == first
    assert Manifest.load(tmp_path / "a" / "val").classes == Manifest.load(tmp_path / "a" / "train").classes
    (source / "dog" / "pic.9.png").write_bytes(picture(999, form="PNG"))
    grown = split("c")
    assert grown["val"] - {"dog/pic_9"} == first["val"]


def test_validation_source_keeps_the_labels_of_training(source: Path, tmp_path: Path) -> None:
    val = make_folder(tmp_path / "validation", ("dog",), each=3)
    result = pack(source, tmp_path / "out", val=val, options=SMALL)
    assert result.splits["val"].classes == result.splits["train"].classes == ("cat", "class2", "class10", "dog")
    assert [s["cls"] for s in samples(tmp_path / "out" / "val")] == [b"3"] * 3
    wrapped = make_zip(val, tmp_path / "val.zip", "val/")
    assert pack(source, tmp_path / "out2", val=wrapped, options=SMALL).splits["val"].num_samples == 3
    make_folder(tmp_path / "foreign", ("dog", "wolf"))
    with pytest.raises(ValueError, match=r"1 classes are not in the training source, e.g. 'wolf'"):
        pack(source, tmp_path / "out3", val=tmp_path / "foreign", options=SMALL)
    with pytest.raises(ValueError, match="unlabelled, but the training source is labelled"):
        pack(source, tmp_path / "out3", val=source / "cat" / "sub", options=SMALL)
    with pytest.raises(ValueError, match="a validation source and val_fraction are given; choose one"):
        pack(source, tmp_path / "out3", val=val, options=replace(SMALL, val_fraction=0.5))
    assert not (tmp_path / "out3").exists()


def test_pictures_in_one_folder_are_unlabelled(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "source", ("photos",), each=3)
    archive = make_zip(folder, tmp_path / "photos.zip")
    for number, flat in enumerate((folder, folder / "photos", archive)):
        manifest = pack(flat, tmp_path / f"flat{number}").splits["train"]
        assert manifest.classes == ()
        assert set(samples(tmp_path / f"flat{number}" / "train")[0]) in ({"__key__", "jpg"}, {"__key__", "png"})


def test_sources_that_cannot_be_packed(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(
        ValueError, match=r"no such folder or zip; built-in sets are builtin:digits, builtin:motion, builtin:photos"
    ):
        pack(tmp_path / "none", out)
    with pytest.raises(ValueError, match="no built-in set 'cats'"):
        pack("builtin:cats", out)
    (tmp_path / "a.zip").write_bytes(b"PK not a zip")
    with pytest.raises(ValueError, match="not a readable zip"):
        pack(tmp_path / "a.zip", out)
    (tmp_path / "a.tar").touch()
    with pytest.raises(ValueError, match="use `tessera index"):
        pack(tmp_path / "a.tar", out)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").touch()
    with pytest.raises(ValueError, match="no pictures found among 1 files"):
        pack(tmp_path / "empty", out)
    (source / "stray.png").write_bytes(picture(0, form="PNG"))
    with pytest.raises(ValueError, match=r"1 pictures lie beside the class folders, e.g. stray.png"):
        pack(source, out)
    make_folder(tmp_path / "splits", ("val", "train"))
    with pytest.raises(ValueError, match=r"train, val look like splits, not classes; pack train as SRC"):
        pack(tmp_path / "splits", out)
    assert not out.exists()


@pytest.mark.parametrize("name", ["../cat/a.png", "/cat/a.png", "cat/../../a.png"])
def test_a_zip_whose_names_lead_out_is_refused(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(name, picture(0, form="PNG"))
    with pytest.raises(ValueError, match="leads out of the zip"):
        pack(tmp_path / "a.zip", tmp_path / "out")


def test_a_zip_with_backslashes_or_twice_the_same_name_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("cat\\a.png", picture(0, form="PNG"))
    with pytest.raises(ValueError, match="backslashes"):
        pack(tmp_path / "a.zip", tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("cat/a.png", picture(0, form="PNG"))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("cat/a.png", picture(1, form="PNG"))
    with pytest.raises(ValueError, match=r"two files have the name cat/a\.png"):
        pack(tmp_path / "b.zip", tmp_path / "out")


def test_links_are_followed_but_not_in_circles(source: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "cat").symlink_to(source / "cat")
    (tmp_path / "linked" / "same").symlink_to(source / "cat")
    assert len(list_source(FolderSource(tmp_path / "linked")).entries) == 12
    (source / "cat" / "up").symlink_to(source)
    with pytest.raises(ValueError, match="a link to a folder above itself"):
        pack(tmp_path / "linked", tmp_path / "out")
    (source / "cat" / "up").unlink()
    (source / "cat" / "gone.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(ValueError, match=r"gone.png: neither a file nor a folder \(a broken link\?\)"):
        pack(tmp_path / "linked", tmp_path / "out")


def test_keys_are_unique_and_fit_for_webdataset(tmp_path: Path) -> None:
    names = ["a/x.1.png", "a/x_1.png", "a/x_1.jpg", "a/x\n1.png", "__b__/y.png", "a/.hidden.png", "a/größe.png"]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in names:
            archive.writestr(name, picture(0, form="PNG"))
    listing = list_source(ZipSource(tmp_path / "a.zip"))
    assert [p.key for p in listing.entries] == ["x__b__/y", "a/größe", "a/x_1", "a/x_1-1", "a/x_1-2", "a/x_1-3"]
    assert listing.ignored == ["a/.hidden.png"]
    result = pack(tmp_path / "a.zip", tmp_path / "out")
    assert sorted(str(s["__key__"]) for s in samples(tmp_path / "out" / "train")) == sorted(
        p.key for p in listing.entries
    )
    assert result.ignored == ["a/.hidden.png"]
    assert json.loads((tmp_path / "out" / "pack.json").read_text())["ignored_examples"] == ["a/.hidden.png"]


def test_natural_order() -> None:
    names = ["b", "a10", "a2", "a02", "A3", "a²", "a" + "9" * 5000]
    assert sorted(names, key=natural_key)[:4] == ["a02", "a2", "A3", "a10"]


class Killed(Exception):
    """As if the process had died."""


def test_a_killed_pack_continues_and_ends_with_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(SMALL, val_fraction=0.2, pictures=PictureOptions(short_side=5))
    pack(source, tmp_path / "whole", options=options)
    out = tmp_path / "out"
    handled = 0

    def die(size_bytes: int) -> None:
        nonlocal handled
        handled += 1
        if handled == 7:
            raise Killed

    with pytest.raises(Killed):
        pack(source, out, options=options, on_sample=die)
    assert (out / "train" / "shard-000000.tar.idx").is_file()
    assert not (out / "train" / "shard-000001.tar").exists()
    assert not (out / "train" / "manifest.json").exists()
    before = (out / "train" / "shard-000000.tar").stat().st_ino
    probes: list[int] = []
    monkeypatch.setattr(pack_module, "shrink_factors", lambda *arguments: probes.append(1))
    result = pack(source, out, options=options)
    assert result.num_resumed_shards == 1
    assert (out / "train" / "shard-000000.tar").stat().st_ino == before, "a finished shard was written again"
    assert not probes, "the plan of the first run was not kept"
    assert content(out) == content(tmp_path / "whole")


def pack_and_die(source: str, out: str) -> None:
    """In a process of its own."""
    left = [12]

    def die(size_bytes: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            os._exit(9)

    pack(source, out, options=PackOptions(shard_samples=5), on_sample=die)


def test_a_really_killed_process_continues_too(source: Path, tmp_path: Path, process_server: ProcessServer) -> None:
    pack(source, tmp_path / "whole", options=SMALL)
    died = process_server.run("tests.data_pipes.pack.test_pack:pack_and_die", str(source), str(tmp_path / "out"))
    assert died.returncode == 9
    assert list(tmp_path.glob("out/train/.*.tmp")), "nothing was left in the middle of a shard"
    (
        tmp_path / "out" / "train" / ".shard-000009.tar.idx.1.tmp"
    ).touch()  # as a kill while an index is written leaves it
    assert pack(source, tmp_path / "out", options=SMALL).num_resumed_shards == 2
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["cut", "gone", "index"])
def test_damaged_shards_of_a_killed_pack_are_written_again(source: Path, tmp_path: Path, damage: str) -> None:
    pack(source, tmp_path / "whole", options=SMALL)
    handled: list[int] = []

    def die(size_bytes: int) -> None:
        handled.append(size_bytes)
        if len(handled) == 13:
            raise Killed

    out = tmp_path / "out"
    with pytest.raises(Killed):
        pack(source, out, options=SMALL, on_sample=die)
    shard = out / "train" / "shard-000001.tar"
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-512])
    elif damage == "gone":
        shard.unlink()
    else:
        (out / "train" / "shard-000001.tar.idx").write_bytes(b"")
    assert pack(source, out, options=SMALL).num_resumed_shards == 1
    assert content(out) == content(tmp_path / "whole")


def test_nothing_is_overwritten(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    pack(source, out, options=SMALL)
    before = content(out)
    for options in (SMALL, replace(SMALL, seed=1)):
        with pytest.raises(ValueError, match="holds a finished dataset; it is never overwritten"):
            pack(source, out, options=options)
    assert content(out) == before
    for foreign in ("photos", "file"):
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / "photos" / "me.jpg").touch()
        (tmp_path / "file").touch()
        with pytest.raises(ValueError, match="not begun by `tessera pack`"):
            pack(source, tmp_path / foreign, options=SMALL)
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["me.jpg"]


def test_a_begun_pack_is_only_continued_with_the_same_options_and_source(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def die(size_bytes: int) -> None:
        raise Killed

    with pytest.raises(Killed):
        pack(source, out, options=SMALL, on_sample=die)
    with pytest.raises(
        ValueError, match=r"other options or another source \(seed was 0, is 3; shard_samples was 5, is 6"
    ):
        pack(source, out, options=replace(SMALL, seed=3, shard_samples=6))
    with pytest.raises(ValueError, match="quality was 95, is 90"):
        pack(source, out, options=replace(SMALL, pictures=PictureOptions(quality=90)))
    (source / "cat" / "new.png").write_bytes(picture(5, form="PNG"))
    with pytest.raises(ValueError, match="source_train was"):
        pack(source, out, options=SMALL)
    (source / "cat" / "new.png").unlink()
    with (out / ".pack" / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another `tessera pack` is writing here"):
            pack(source, out, options=SMALL)
    assert pack(source, out, options=SMALL).splits["train"].num_samples == 24


@pytest.mark.parametrize("workers", [1, 2])
def test_unreadable_pictures_stop_or_are_listed(source: Path, tmp_path: Path, workers: int) -> None:
    (source / "cat" / "broken.jpg").write_bytes(b"\xff\xd8\xff not a picture")
    (source / "dog" / "empty.png").touch()
    (source / "dog" / "cut.png").write_bytes(picture(1, form="PNG")[:60])
    with pytest.raises(UnreadableFile, match=r"(broken.jpg|empty.png|cut.png) cannot be packed .*--skip-unreadable"):
        pack(source, tmp_path / "a", options=SMALL, workers=workers)
    assert not list(tmp_path.glob("a/train/.*.tmp"))
    result = pack(source, tmp_path / "b", options=replace(SMALL, skip_unreadable=True), workers=workers)
    assert sorted(entry["name"] for entry in result.skipped) == ["cat/broken.jpg", "dog/cut.png", "dog/empty.png"]
    assert result.splits["train"].num_samples == 24
    assert json.loads((tmp_path / "b" / "pack.json").read_text())["skipped"] == result.skipped


def test_the_failure_is_reported_and_not_the_shards_that_it_stopped(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    another_stopped = threading.Event()

    def write(writer: ShardWriter, plan: ShardPlan, source: Source) -> None:
        if plan.number == 0:
            assert another_stopped.wait(PATIENCE_S)
            time.sleep(0.2)
            raise UnreadableFile("the cause")
        another_stopped.set()
        raise Stopped

    monkeypatch.setattr(ShardWriter, "write", write)
    with pytest.raises(UnreadableFile, match="the cause"):
        pack(source, tmp_path / "out", options=SMALL, workers=2)


def test_a_shard_without_a_readable_picture_is_left_out(tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / "source").mkdir(exist_ok=True)
        (tmp_path / "source" / f"{name}.png").write_bytes(picture(1, form="PNG") if name != "b" else b"")
    options = PackOptions(shard_samples=1, shuffle=False, skip_unreadable=True)
    manifest = pack(tmp_path / "source", tmp_path / "out", options=options).splits["train"]
    assert [entry.url for entry in manifest.shards] == [f"shard-00000{i}.tar" for i in (0, 2, 3)]
    for path in (tmp_path / "source").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UnreadableFile, match="none of the pictures for train can be read"):
        pack(tmp_path / "source", tmp_path / "out2", options=options)


def test_a_full_disk_names_the_shard_and_keeps_what_is_finished(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> ShardIndex:
        if "000002" in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return index_shard(path)

    monkeypatch.setattr("data_pipes.pack.shard_writer.index_shard", full)
    with pytest.raises(OSError, match=r"shard-000002.tar: cannot be written \(No space left on device\); free"):
        pack(source, tmp_path / "out", options=SMALL)
    assert not list(tmp_path.glob("out/train/.*.tmp"))
    monkeypatch.undo()
    assert pack(source, tmp_path / "out", options=SMALL).num_resumed_shards == 2


def test_limit_takes_the_first_in_packing_order(source: Path, tmp_path: Path) -> None:
    pack(source, tmp_path / "all")
    handled: list[int] = []
    planned: list[tuple[int, int]] = []
    pack(
        source,
        tmp_path / "few",
        options=PackOptions(limit=7),
        on_plan=lambda *plan: planned.append(plan),
        on_sample=handled.append,
    )
    assert samples(tmp_path / "few" / "train") == samples(tmp_path / "all" / "train")[:7]
    assert planned == [(7, sum(handled))]
    assert len(handled) == 7


def test_shard_size_is_kept(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    for i in range(24):
        (tmp_path / "source" / f"{i}.png").write_bytes(picture(i, (80, 60), "PNG"))
    limit = 100_000
    manifest = pack(tmp_path / "source", tmp_path / "a", options=PackOptions(shard_size_bytes=limit)).splits["train"]
    assert all(limit * 0.7 < entry.size_bytes <= limit + 10240 for entry in manifest.shards[:-1])
    options = PackOptions(shard_size_bytes=limit, pictures=PictureOptions(short_side=30))
    smaller = pack(tmp_path / "source", tmp_path / "b", options=options).splits["train"]
    assert len(smaller.shards) <= len(manifest.shards) / 2
    assert all(limit * 0.7 < entry.size_bytes <= limit * 1.2 + 10240 for entry in smaller.shards[:-1])


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [((90, 60), 30, (45, 30)), ((60, 90), 30, (30, 45)), ((1000, 60), 7, (117, 7)), ((61, 60), 59, (60, 59))],
)
def test_short_side(size: tuple[int, int], short_side: int, expected: tuple[int, int]) -> None:
    data, extension = prepare_picture(picture(0, size), PictureOptions(short_side))
    assert extension == "jpg"
    assert Image.open(io.BytesIO(data)).size == expected


def test_small_pictures_keep_their_bytes() -> None:
    for form in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM"):
        data = picture(0, (40, 30), form)
        assert prepare_picture(data, PictureOptions(short_side=30))[0] == data
        assert prepare_picture(data, PictureOptions(verify="decode"))[0] == data


@pytest.mark.parametrize(
    ("form", "mode", "extension", "mode_after"),
    [
        ("JPEG", "L", "jpg", "L"),
        ("JPEG", "CMYK", "jpg", "CMYK"),
        ("PNG", "RGBA", "png", "RGBA"),
        ("PNG", "P", "png", "RGB"),
        ("PNG", "1", "png", "L"),
        ("WEBP", "RGB", "jpg", "RGB"),
        ("WEBP", "RGBA", "png", "RGBA"),
        ("TIFF", "L", "png", "L"),
        ("BMP", "RGB", "png", "RGB"),
    ],
)
def test_reencoding_keeps_what_a_picture_is(form: str, mode: str, extension: str, mode_after: str) -> None:
    data = picture(0, (40, 30), form, mode)
    if mode == "RGBA":
        half = Image.open(io.BytesIO(data)).convert("RGBA")
        half.putalpha(128)
        out = io.BytesIO()
        half.save(out, form)
        data = out.getvalue()
    packed, found = prepare_picture(data, PictureOptions(short_side=10))
    image = Image.open(io.BytesIO(packed))
    assert (found, image.mode, image.size) == (extension, mode_after, (13, 10))


def test_reencoding_is_bicubic_with_antialias() -> None:
    wave = np.indices((64, 64)).sum(0) % 2 * 255
    out = io.BytesIO()
    Image.fromarray(wave.astype(np.uint8)).save(out, "PNG")
    packed, _ = prepare_picture(out.getvalue(), PictureOptions(short_side=16))
    pixels = np.asarray(Image.open(io.BytesIO(packed))).astype(int)
    assert abs(pixels - 127).max() < 8, "a checkerboard must become grey"


def test_sixteen_bits_stay() -> None:
    ramp = np.linspace(0, 65535, 40 * 30).reshape(30, 40).astype(np.uint16)
    out = io.BytesIO()
    Image.fromarray(ramp).save(out, "PNG")
    packed, _ = prepare_picture(out.getvalue(), PictureOptions(short_side=15))
    after = np.asarray(Image.open(io.BytesIO(packed))).astype(int)
    assert after.max() > 60000
    assert abs(after - ramp.reshape(15, 2, 20, 2).mean((1, 3))).max() < 3000


def test_orientation_and_profile_stay() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    out = io.BytesIO()
    Image.open(io.BytesIO(picture(0, (40, 30)))).save(out, "JPEG", exif=exif, icc_profile=b"profile")
    packed, _ = prepare_picture(out.getvalue(), PictureOptions(short_side=10))
    image = Image.open(io.BytesIO(packed))
    assert image.getexif()[0x0112] == 6
    assert image.info["icc_profile"] == b"profile"
    assert image.size == (13, 10), "the pixels are not turned"


def test_pictures_that_would_lose_something_or_run_something() -> None:
    frames = [Image.open(io.BytesIO(picture(i, (40, 30)))) for i in range(2)]
    out = io.BytesIO()
    frames[0].save(out, "TIFF", save_all=True, append_images=frames[1:])
    with pytest.raises(UnreadableFile, match="several frames"):
        prepare_picture(out.getvalue(), PictureOptions(short_side=10))
    assert prepare_picture(out.getvalue(), PictureOptions()) == (out.getvalue(), "tif")
    eps = io.BytesIO()
    frames[0].save(eps, "EPS")
    with pytest.raises(UnreadableFile, match="not a picture of a format that is read"):
        prepare_picture(eps.getvalue(), PictureOptions(verify="decode"))
    deep = bytearray(picture(0, (40, 30), "PNG"))
    deep[24] = 16
    deep[29:33] = __import__("zlib").crc32(deep[12:29]).to_bytes(4, "big")
    with pytest.raises(UnreadableFile, match="16-bit PNG in colour"):
        prepare_picture(bytes(deep), PictureOptions(short_side=10))


def test_header_check_and_full_decode_differ_as_documented() -> None:
    cut = picture(0, (200, 200))[:-4000]
    assert prepare_picture(cut, PictureOptions())[0] == cut
    with pytest.raises(UnreadableFile, match="truncated"):
        prepare_picture(cut, PictureOptions(verify="decode"))
    with pytest.raises(UnreadableFile, match="truncated"):
        prepare_picture(cut, PictureOptions(short_side=100))


@pytest.mark.parametrize(
    "wrong",
    [{"val_fraction": 1.0}, {"val_fraction": -0.1}, {"limit": 0}, {"shard_samples": 0}, {"shard_size_bytes": 0}],
)
def test_wrong_options(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        PackOptions(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected"):
        PictureOptions(short_side=0)
    with pytest.raises(ValueError, match="expected"):
        PictureOptions(quality=101)


def test_real_pictures(shared_data: Path, tmp_path: Path) -> None:
    options = PackOptions(limit=60, val_fraction=0.2, shard_size_bytes=64 << 10)
    result = pack(shared_data / "cifar10_test.zip", tmp_path / "cifar", options=options, workers=2)
    assert len(result.splits["train"].classes) == 10
    assert sum(manifest.num_samples for manifest in result.splits.values()) == 60
    photos = PackOptions(limit=8, pictures=PictureOptions(short_side=64))
    manifest = pack(shared_data / "photos_300.zip", tmp_path / "photos", options=photos).splits["train"]
    assert manifest.classes == ()
    for sample in samples(tmp_path / "photos" / "train"):
        assert min(Image.open(io.BytesIO(sample["jpg"])).size) == 64
