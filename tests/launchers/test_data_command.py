"""`tessera data stats`, `verify` and `peek` as a user calls them."""

from __future__ import annotations

import argparse
import io
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipes.config import DataConfig
from data_pipes.errors import ShardError
from data_pipes.index.index import index_shards
from data_pipes.inspect.stats import SizeHistogram
from data_pipes.open import open_dataset
from data_pipes.order.order import OrderConfig
from data_pipes.sequential.pictures import SequentialImages
from data_pipes.shards.index_file import ShardIndex
from data_pipes.shards.manifest import Manifest
from data_pipes.store.storage import Storage
from data_pipes.transforms.image import EvalTransform
from launchers.cli import main
from launchers.commands import data as data_command
from tests.data_pipes.tiny_videos import video


def call(*argv: str | Path) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    data_command.add_arguments(parser)
    parser.set_defaults(json=False)  # as the command line does
    result: dict[str, Any] = data_command.run(parser.parse_args([str(text) for text in argv]))
    json.dumps(result)
    return result


def failing(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> dict[str, Any]:
    """The JSON of a `verify` that finds flaws."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        call(*argv, "--json")
    assert caught.value.code == 1
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


@pytest.fixture
def dataset(tiny_dataset: Path, tmp_path: Path) -> Path:
    """A copy of its own, to be damaged."""
    return Path(shutil.copytree(tiny_dataset, tmp_path / "data"))


def test_stats(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = call("stats", dataset)
    manifest = Manifest.load(dataset)
    assert (result["num_samples"], result["num_shards"], result["num_classes"]) == (61, 3, 4)
    assert result["size_bytes"] == manifest.size_bytes
    assert result["samples_per_shard"] == {"min": 20, "mean": 20.3, "max": 21}
    indexes = [ShardIndex.load(manifest.index_path(shard)) for shard in range(3)]
    sizes = [sum(s for _, s in index.members(i).values()) for index in indexes for i in range(index.num_samples)]
    found = result["sample_bytes"]
    assert (found["min"], found["max"], found["mean"]) == (min(sizes), max(sizes), round(sum(sizes) / 61, 1))
    assert found["p50"] == pytest.approx(np.percentile(sizes, 50, method="inverted_cdf"), rel=0.011)
    assert {name: part["num_samples"] for name, part in result["extensions"].items()} == {"png": 61, "cls": 61}
    assert sum(part["size_bytes"] for part in result["extensions"].values()) == sum(sizes)
    sampled = result["sampled"]
    assert {label["name"]: label["num_samples"] for label in sampled["labels"]} == {"a": 16, "b": 15, "c": 15, "d": 15}
    assert (sampled["num_read"], sampled["num_unlabelled"], sampled["bad"]) == (61, 0, {})
    assert sampled["pictures"] == {"PNG L": 61}
    assert sampled["height"]["p50"] == sampled["width"]["max"] == 8
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "61 samples in 3 shards" in printed.err
    assert "most frequent: a 16" in printed.err


def test_stats_of_a_part_are_repeatable(dataset: Path) -> None:
    first, again, other = (call("stats", dataset, "--read", "9", "--seed", seed) for seed in "001")
    assert first == again
    assert first["sampled"] != other["sampled"]
    assert first["sampled"]["num_read"] == sum(label["num_samples"] for label in first["sampled"]["labels"]) == 9
    for shard in dataset.glob("*.tar"):
        shard.unlink()
    assert call("stats", dataset, "--read", "0")["sampled"] == {}, "the index alone must do"


def test_stats_of_mixed_members(tmp_path: Path) -> None:
    sixteen, array = io.BytesIO(), io.BytesIO()
    Image.fromarray(np.full((7, 5), 40_000, np.uint16)).save(sixteen, "TIFF")
    np.save(array, np.zeros((4, 3, 6), np.uint16))
    samples = {
        "a": {"tif": sixteen.getvalue(), "json": b'{"target": "dog"}'},
        "b": {"npy": array.getvalue(), "cls": b"9"},
        "c": {"png": b"no picture", "json": b'{"target": NaN}'},
        "d": {"txt": b"only a caption"},
    }
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for key, members in samples.items():
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    index_shards([tmp_path / "s.tar"], tmp_path, classes=("cat", "dog"))
    sampled = call("stats", tmp_path, "--label-key", "target")["sampled"]
    assert sampled["labels"] == [{"label": 1, "name": "dog", "num_samples": 1}]
    assert sampled["num_unlabelled"] == 2  # a label of NaN is a missing one, as null is
    assert sampled["pictures"] == {"TIFF 1 x 16 bit": 1, "NPY 6 x 16 bit": 1}
    assert sampled["bad"] == {"decode": 1, "label": 1, "no_image": 1}


def test_percentiles_are_exact_to_a_percent() -> None:
    random = np.random.Generator(np.random.PCG64(0))
    sizes = (random.pareto(1.2, 20_000) * 5000).astype(np.int64)
    whole, parts = SizeHistogram(), SizeHistogram()
    whole.add(sizes)
    for part in np.array_split(sizes, 7):
        one = SizeHistogram()
        one.add(part)
        parts.merge(one)
    assert parts.summary() == whole.summary()
    for percent in (1, 10, 50, 90, 99):
        exact = np.percentile(sizes, percent, method="inverted_cdf")
        assert whole.summary()[f"p{percent}"] == pytest.approx(exact, rel=0.011, abs=1)
    empty = SizeHistogram()
    empty.add(np.zeros(0, np.uint64))
    assert empty.summary() == {}


def test_verify_of_intact_data(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = call("verify", dataset, "--out", tmp_path / "corrupt.jsonl")
    assert (result["intact"], result["num_flaws"], result["num_decoded"], result["list"]) == (True, 0, 0, None)
    assert call("verify", dataset, "--decode")["num_decoded"] == 61
    assert not (tmp_path / "corrupt.jsonl").exists()
    assert "intact; 61 samples in 3 shards, 61 pictures decoded" in capsys.readouterr().err


def change(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def test_verify_finds_every_kind_of_damage(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards, out = sorted(dataset.glob("*.tar")), tmp_path / "list" / "corrupt.jsonl"
    out.parent.mkdir()
    index = ShardIndex.load(Manifest.load(dataset).index_path(0))
    offset, size = index.members(3)["png"]
    change(shards[0], offset + size // 2, b"\xff\xff\xff")  # inside a picture
    change(shards[0], index.members(5)["cls"][0], b"9")  # a label beyond the classes
    offset, size = index.members(7)["png"]
    change(shards[0], offset + size - 9, b"\x07")  # behind the pixels of a picture, where no decoder looks
    assert call("verify", dataset)["intact"], "a tar has no checksum for its files"
    result = failing(capsys, "verify", dataset, "--decode", "--out", out)
    assert result["causes"] == {"decode": 1, "label": 1, "checksum": 1}
    assert (result["num_flaws"], result["num_bad_shards"], result["num_decoded"]) == (3, 1, 59)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["shard"], line["key"]) for line in lines] == [
        (shards[0].name, index.key(3)),
        (shards[0].name, index.key(5)),
        (shards[0].name, index.key(7)),
    ]
    assert "the label (.cls) is b'9'" in lines[1]["error"]

    change(shards[1], 1024 + 100, b"7")  # the mode in the second header
    shards[2].write_bytes(shards[2].read_bytes()[:-4096])
    parallel = failing(capsys, "verify", dataset, "--decode", "--out", out, "--workers", "2")
    assert parallel["causes"] == {**result["causes"], "shard": 1, "size": 1}
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["key"] for line in lines[3:]] == [None, None]
    assert "bad checksum" in lines[3]["error"]
    assert "bytes, the manifest says" in lines[4]["error"]


def test_verify_finds_missing_and_exchanged_files(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third = sorted(dataset.glob("*.tar"))
    first.unlink()
    third.with_name(third.name + ".idx").unlink()
    shutil.copy(dataset / "shard-000002.tar", second)  # another shard, intact in itself
    out = dataset / "corrupt.jsonl"
    result = failing(capsys, "verify", dataset, "--out", out)
    assert result["causes"] in ({"shard": 1, "index": 2}, {"shard": 1, "size": 1, "index": 1})
    errors = [json.loads(line)["error"] for line in out.read_text().splitlines()]
    assert "cannot be opened" in errors[0]
    assert "sample 0 is '0002', in its index '0001'" in errors[1] or "bytes, the manifest says" in errors[1]
    assert "no such index file" in errors[2]


def test_verify_needs_a_worker(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="workers is 0"):
        call("verify", index_one(tmp_path), "--workers", "0")


def index_one(folder: Path) -> Path:
    with tarfile.open(folder / "s.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    index_shards([folder / "s.tar"], folder)
    return folder


def test_peek_shows_the_training_order(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sheets" / "sheet.png"
    options = ("--num", "10", "--epoch-position", "57", "--seed", "5", "--size", "8", "--channels", "1")
    result = call("peek", dataset, "--out", out, *options)
    config = DataConfig(train=str(dataset), order=OrderConfig(seed=5))
    training = open_dataset(config, image_size=(8, 8), channels=1, global_batch=256)
    expected = [training.item(position) for position in range(57, 67)]
    assert result["keys"] == [key for _, _, key in expected]
    assert result["labels"] == [label for _, label, _ in expected]
    assert (result["positions"], result["bad"]) == ([57, 66], [])
    with Image.open(out) as sheet:
        assert (sheet.format, sheet.mode) == ("PNG", "RGB")
        assert result["size_bytes"] == out.stat().st_size
        first = np.asarray(sheet)[23 : 23 + 128, 8 : 8 + 128]
    assert abs(float(first.mean()) - float(expected[0][0].float().mean())) < 3, "the first cell is the first sample"
    assert (np.asarray(Image.open(out))[23 + 128 : 23 + 158, 8:136] < 128).any(), "there is text under it"
    assert "10 samples, positions 57 to 66, seed 5" in capsys.readouterr().err


def test_peek_marks_what_was_replaced(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = ShardIndex.load(Manifest.load(dataset).index_path(1))
    change(dataset / "shard-000001.tar", index.members(2)["png"][0], b"garbage")
    result = call("peek", dataset, "--out", tmp_path / "sheet.png", "--num", "61", "--size", "8")
    assert [bad["key"] for bad in result["bad"]] == [index.key(2)]
    assert index.key(2) not in result["keys"]
    assert "1 bad samples were replaced, e.g. " in capsys.readouterr().err


def test_mistakes_are_value_errors(dataset: Path, tmp_path: Path) -> None:
    for action in ("stats", "verify", "peek"):
        with pytest.raises(ValueError, match="no such dataset folder"):
            call(action, tmp_path / "none")
    for options in (("--num", "0"), ("--epoch-position", "-1")):
        with pytest.raises(ValueError, match="expected >= 1 and >= 0"):
            call("peek", dataset, *options)
    for path in dataset.glob("*.idx"):
        path.write_bytes(b"damaged")
    for action in ("stats", "peek"):
        with pytest.raises(ShardError, match="this is not the index"):
            call(action, dataset, "--out", tmp_path / "x") if action == "peek" else call(action, dataset)


def test_help_is_complete() -> None:
    parser = argparse.ArgumentParser()
    data_command.add_arguments(parser)
    assert data_command.HELP
    for action in ("stats", "verify", "peek"):
        assert f"tessera data {action} " in data_command.EXAMPLES
        with pytest.raises(SystemExit) as caught:
            parser.parse_args([action, "--help"])
        assert caught.value.code == 0


def test_a_data_set_in_a_store(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url, storage = "memory://data-command/train", Storage()
    for path in dataset.iterdir():
        storage.write_whole(f"{url}/{path.name}", path.read_bytes())
    local, remote = call("stats", dataset), call("stats", url)
    assert remote == {**local, "source": url}
    assert call("verify", url, "--decode")["num_decoded"] == 61
    options = ("--num", "5", "--size", "8", "--out", tmp_path / "sheet.png")
    assert call("peek", url, *options)["keys"] == call("peek", dataset, *options)["keys"]
    damaged = (dataset / "shard-000000.tar").read_bytes()[:-3000]
    storage.write_whole(f"{url}/shard-000000.tar", damaged)
    result = failing(capsys, "verify", url, "--out", tmp_path / "corrupt.jsonl")
    assert sum(result["causes"].values()) == result["num_bad_shards"] == 1


def coloured(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((40, 56, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def indexed(folder: Path, members: list[tuple[str, bytes]]) -> Path:
    """A data set of one shard with these members."""
    folder.mkdir()
    with tarfile.open(folder / "s.tar", "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    index_shards([folder / "s.tar"], folder)
    return folder


NAMELESS = {
    "two pictures": (
        [(f"{n}.{part}", coloured(n)) for n in range(3) for part in ("left.png", "Right.png")],
        "left.png",
    ),
    "dots in the names": ([(f"{n} track 2.{n}.png", coloured(n)) for n in range(3)], "*.png"),
    "another ending": ([(f"{n}.jfif", coloured(n)) for n in range(3)], "jfif"),
    "no ending of a picture": ([(f"{n}.image", coloured(n)) for n in range(3)], "image"),
    "only texts": ([(f"{n}.{part}", b"{}") for n in range(3) for part in ("json", "txt")], None),
}


@pytest.mark.parametrize("name", NAMELESS)
def test_a_set_without_known_pictures_is_not_intact(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """verify, stats, index and a run say so at once; and data.image_member makes it usable."""
    members, member = NAMELESS[name]
    folder = indexed(tmp_path / "set", members)
    out = ("--out", tmp_path / "flaws.jsonl")
    for options in ((), ("--decode",)):
        result = failing(capsys, "verify", folder, *out, *options)
        assert (result["num_without_media"], result["num_decoded"], result["causes"]) == (3, 0, {"no_image": 3})
    flaws = [json.loads(line) for line in (tmp_path / "flaws.jsonl").read_text().splitlines()]
    assert {flaw["cause"] for flaw in flaws} == {"no_image"}
    assert call("stats", folder)["media"] == []
    assert "warning: " in capsys.readouterr().err
    assert main(["index", str(folder), "--workers", "1"]) == 0
    assert "no sample has a picture or video; the members are ." in capsys.readouterr().err
    config = DataConfig(train=str(folder))
    with pytest.raises(ValueError, match="no sample has a picture; the members are "):
        open_dataset(config, image_size=(20, 28), channels=3, global_batch=2)
    if member is None:
        return
    assert call("verify", folder, "--decode", "--image-member", member)["num_decoded"] == 3
    assert call("stats", folder, "--image-member", member)["sampled"]["pictures"] == {"PNG RGB": 3}
    named = replace(config, image_member=member)
    dataset = open_dataset(named, image_size=(20, 28), channels=3, global_batch=2)
    seen = {key: set(image.unique().tolist()) for image, _, key in (dataset.item(position) for position in range(3))}
    assert sorted(seen.values(), key=min) == [{0}, {1}, {2}]
    sequential = SequentialImages(str(folder), EvalTransform((20, 28), 28), image_member=member)
    assert [set(sequential[n][0].unique().tolist()) for n in range(3)] == [{0}, {1}, {2}]
    with pytest.raises(ValueError, match=r"no sample has a picture named other\.png \(data\.image_member\)"):
        open_dataset(replace(config, image_member="other.png"), image_size=(20, 28), channels=3, global_batch=2)


def test_single_samples_without_a_picture_are_flaws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = indexed(
        tmp_path / "set", [("0.png", coloured(0)), ("0.txt", b"a"), ("1.txt", b"b"), ("2.png", coloured(2))]
    )
    result = failing(capsys, "verify", folder, "--out", tmp_path / "flaws.jsonl")
    assert (result["num_flaws"], result["num_without_media"]) == (1, 1)
    flaw = json.loads((tmp_path / "flaws.jsonl").read_text())
    assert (flaw["key"], flaw["error"]) == ("1", "no picture or video among the members ['txt']")


def test_tensors_of_encode_are_no_absence(tmp_path: Path) -> None:
    assert call("verify", indexed(tmp_path / "set", [("0.latent.safetensors", b"x"), ("0.cls", b"1")]))["intact"]


def test_verify_opens_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = video(12)
    broken = bytearray(good)
    place = good.index(b"mdat") + 2000
    broken[place : place + 400] = bytes(400)
    intact = indexed(tmp_path / "good", [("0.mp4", good), ("1.mp4", good)])
    result = call("verify", intact, "--decode")
    assert (result["intact"], result["num_decoded"], result["num_videos"]) == (True, 2, 2)
    assert "0 pictures decoded, 2 videos decoded" in capsys.readouterr().err
    assert call("stats", intact)["sampled"]["pictures"] == {"mp4 (video, not opened)": 2}
    damaged = indexed(tmp_path / "bad", [("0.mp4", good), ("1.mp4", bytes(broken)), ("2.mp4", good[:-300])])
    found = failing(capsys, "verify", damaged, "--decode", "--out", tmp_path / "flaws.jsonl")
    assert (found["num_flaws"], found["num_decoded"]) == (2, 1)
    assert found["causes"] == {"frames": 1, "video": 1}
    named = indexed(tmp_path / "named", [("0.front.bin", good), ("1.front.bin", good[:-300])])
    found = failing(capsys, "verify", named, "--decode", "--image-member", "front.bin", "--out", tmp_path / "f.jsonl")
    assert (found["num_videos"], found["causes"]) == (1, {"video": 1})


@pytest.mark.parametrize("member", ["", ".jpg", "a/b.jpg"])
def test_members_that_cannot_be(member: str, tmp_path: Path) -> None:
    folder = indexed(tmp_path / "set", [("0.png", coloured(0))])
    with pytest.raises(ValueError, match=r"data\.image_member is .*; expected what stands behind the first dot"):
        open_dataset(DataConfig(train=str(folder), image_member=member), image_size=(8, 8), channels=3, global_batch=2)
