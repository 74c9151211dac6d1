"""Packing videos: folders, zips and lists of labels; kept bytes, re-encoding, broken files, going on after a kill."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipes.config import DataConfig
from data_pipes.decode.video import Video, probe
from data_pipes.decode.video_container import extension_of
from data_pipes.errors import SampleError
from data_pipes.open import open_dataset
from data_pipes.pack.label_lists import read_labels
from data_pipes.pack.pack import pack
from data_pipes.pack.plan import PackOptions
from data_pipes.pack.reencode_picture import PictureOptions, UnreadableFile
from data_pipes.pack.reencode_video import VideoOptions, prepare_video
from data_pipes.shards.manifest import Manifest
from data_pipes.transforms.clip_sampling import ClipSampling
from launchers.cli import main
from tests.data_pipes.decode.test_video import EIGHT
from tests.data_pipes.pack.test_pack import content, samples
from tests.data_pipes.tiny_shards import picture
from tests.data_pipes.tiny_videos import decode_all, encode, pictures, rotated, sound, video, with_matrix

SMALL = PackOptions(shard_samples=3)
KINDS = {
    "mp4": {},
    "webm": {"kind": "webm", "codec": "libvpx"},
    "avi": {"kind": "avi", "codec": "mpeg4", "b_frames": 0},
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two classes of three videos, one of each container."""
    for label, name in enumerate(("juggling", "abseiling")):
        (tmp_path / "source" / name).mkdir(parents=True)
        for number, (suffix, options) in enumerate(KINDS.items()):
            (tmp_path / "source" / name / f"{number}.{suffix}").write_bytes(video(10 + label, **options))
    return tmp_path / "source"


def flat(source: Path, out: Path) -> Path:
    """The same files in one folder: 0.mp4 to 5.avi, the first three of them abseiling."""
    out.mkdir()
    for number, path in enumerate(sorted(source.rglob("*.*"))):
        (out / f"{number}{path.suffix}").write_bytes(path.read_bytes())
    return out


def labels_of(dataset: Path) -> dict[str, str]:
    """Key -> name of the class."""
    classes = Manifest.load(dataset).classes
    return {str(sample["__key__"]): classes[int(sample["cls"])] for sample in samples(dataset)}


def test_bytes_are_kept_and_the_loader_reads_them(source: Path, tmp_path: Path) -> None:
    (source / "juggling" / "notes.txt").touch()
    result = pack(source, tmp_path / "out", options=SMALL, workers=2)
    assert (result.media, result.ignored, result.skipped) == ("videos", ["juggling/notes.txt"], [])
    packed = {str(sample["__key__"]): sample for sample in samples(tmp_path / "out" / "train")}
    assert len(packed) == 6
    for path in source.rglob("*.*"):
        if path.suffix != ".txt":
            sample = packed[f"{path.parent.name}/{path.stem}"]
            assert sample[path.suffix[1:]] == path.read_bytes()
            assert sample["cls"] == str(["abseiling", "juggling"].index(path.parent.name)).encode()
    config = DataConfig(train=str(tmp_path / "out" / "train"), video=ClipSampling(4, 2))
    dataset = open_dataset(config, image_size=(16, 16), channels=3, global_batch=2)
    assert {dataset.item(position)[1] for position in range(6)} == {0, 1}


def test_a_zip_gives_the_same_shards(source: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "source.zip", "w") as archive:
        for path in sorted(source.rglob("*.*"), reverse=True):
            archive.write(path, f"videos/{path.relative_to(source).as_posix()}")
    pack(source, tmp_path / "a", options=SMALL)
    pack(tmp_path / "source.zip", tmp_path / "b", options=SMALL)
    assert content(tmp_path / "a" / "train") == content(tmp_path / "b" / "train")


def test_the_extension_follows_from_the_content(source: Path, tmp_path: Path) -> None:
    kinds = {"mp4": "mp4", "mov": "mov", "matroska": "mkv", "webm": "webm", "avi": "avi"}
    for kind, extension in kinds.items():
        data = video(4, kind, "libvpx" if kind == "webm" else "libx264", b_frames=0)
        assert extension_of(data) == extension
        assert prepare_video(data, VideoOptions()) == (data, extension)
    (source / "juggling" / "0.mp4").write_bytes(video(4, "matroska"))
    pack(source, tmp_path / "out")
    packed = {str(sample["__key__"]): sample for sample in samples(tmp_path / "out" / "train")}
    assert set(packed["juggling/0"]) == {"__key__", "mkv", "cls"}


# --- re-encoding


def test_only_what_is_not_as_asked_is_encoded_again() -> None:
    data = video(40)  # 64 x 48, GOP 12, 25 frames per second
    for options in (VideoOptions(), VideoOptions(48, 12, 25.0), VideoOptions(64), VideoOptions(fps=24.98)):
        assert prepare_video(data, options)[0] is data
    for options, expected in (
        (VideoOptions(short_side=32), (32, 42, 40, 25.0)),
        (VideoOptions(gop=8), (48, 64, 40, 25.0)),
        (VideoOptions(fps=10), (48, 64, 16, 10.0)),
        (VideoOptions(short_side=24, gop=8, fps=5.0), (24, 32, 8, 5.0)),
    ):
        encoded, extension = prepare_video(data, options)
        info = probe(encoded)
        assert (info.height, info.width, info.num_frames, info.fps) == pytest.approx(expected)
        assert info.longest_gop <= (options.gop or 32)
        assert (extension, info.codec) == ("mp4", "h264")
        assert prepare_video(data, options)[0] == encoded, "the bytes differ from time to time"


FINE = VideoOptions(gop=2, crf=4)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(lambda: video(20), id="plain"),
        pytest.param(lambda: video(20, gop=250, b_frames=3), id="b-frames"),
        pytest.param(lambda: video(20, options=(("x264-params", "fullrange=on"),)), id="full range"),
        pytest.param(lambda: video(20, options=(("x264-params", "colormatrix=bt709"),)), id="bt709"),
        pytest.param(lambda: video(20, "avi", "libx264", b_frames=2), id="avi, frames counted"),
        pytest.param(lambda: encode(pictures(8), [0, 40, 80, 400, 440, 1000, 1040, 1080], b_frames=0), id="vfr"),
        pytest.param(lambda: rotated(video(20), 1), id="rotated"),
        *(pytest.param(lambda m=matrix: with_matrix(video(20), *m), id=f"matrix {matrix}") for matrix in EIGHT[4:]),
    ],
)
def test_the_frames_stay_what_and_when_they_were(data: Any) -> None:
    data = data()
    again, _ = prepare_video(data, FINE)
    assert again != data
    with Video(data) as before, Video(again) as after:
        assert np.allclose(before.times_s, after.times_s, atol=1e-4)
        pixels = [each.frames(np.arange(each.num_frames)).astype(float) for each in (before, after)]
        assert pixels[0].shape == pixels[1].shape
        assert after.info().orientation == (False, 0)
    difference = pixels[0] - pixels[1]
    assert np.abs(difference).mean() < 4  # the other way round of the same video: 40
    assert np.abs(difference.mean((0, 1, 2))).max() < 1.6, "the colours are shifted"


def test_frames_are_left_out_evenly_in_time() -> None:
    data = video(40, gop=1, b_frames=0)  # 1.6 s
    encoded, _ = prepare_video(data, VideoOptions(fps=5, crf=4))
    expected = decode_all(data)[::5].astype(float)
    assert np.abs(decode_all(encoded) - expected).mean() < 4
    irregular = encode(pictures(8), [0, 40, 80, 400, 440, 1000, 1040, 1080], b_frames=0)
    with Video(prepare_video(irregular, VideoOptions(fps=5, crf=4))[0]) as after:
        assert np.allclose(after.times_s, [0, 0.2, 0.4, 0.6, 1.0]), "at 0.8 s, the frame of 0.6 s is still shown"
        found = after.frames(range(5)).astype(float)
    assert np.abs(found - decode_all(irregular)[[0, 2, 3, 4, 5]]).mean() < 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VideoOptions(short_side=0), "short_side is 0; expected 1 or more"),
        (lambda: VideoOptions(gop=0), "gop is 0"),
        (lambda: VideoOptions(fps=0.0), r"fps is 0\.0"),
        (lambda: VideoOptions(gop=8, crf=52), "crf is 52; expected 0"),
        (lambda: VideoOptions(crf=20), "say what to change"),
        (lambda: VideoOptions(verify="all"), "verify is 'all'"),  # type: ignore[arg-type]
    ],
)
def test_options_that_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_options_of_the_other_kind_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"quality is for pictures; .*source holds videos"):
        pack(source, tmp_path / "out", options=PackOptions(pictures=PictureOptions(quality=80)))
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(picture(0))
    with pytest.raises(ValueError, match=r"gop, crf is for videos; .*pictures holds pictures"):
        pack(tmp_path / "pictures", tmp_path / "out", options=PackOptions(videos=VideoOptions(gop=8, crf=20)))
    assert not (tmp_path / "out").exists()


def test_pictures_and_videos_in_one_folder(source: Path, tmp_path: Path) -> None:
    (source / "juggling" / "cover.png").write_bytes(picture(0))
    with pytest.raises(ValueError, match="1 pictures and 6 videos; say which of them to pack, with --media"):
        pack(source, tmp_path / "out")
    result = pack(source, tmp_path / "out", media="videos")
    assert (result.splits["train"].num_samples, result.ignored) == (6, ["juggling/cover.png"])
    assert pack(source, tmp_path / "out2", media="pictures").splits["train"].num_samples == 1


# --- broken files


def break_files(source: Path) -> dict[str, str]:
    """Puts broken files beside the good ones: name -> cause."""
    damaged = bytearray(video(40, b_frames=0, gop=40))
    middle = damaged.index(b"mdat") + (len(damaged) - damaged.index(b"mdat")) // 2
    damaged[middle : middle + 2000] = np.random.default_rng(0).bytes(2000)
    broken = {
        "cut.mp4": (video(20)[:-700], "video"),
        "empty.mp4": (b"", "video"),
        "page.mp4": (b"<html>404 Not Found</html>", "video"),
        "sound.mp4": (sound(), "no_video"),
        "damaged.mp4": (bytes(damaged), "frames"),
    }
    for name, (data, _) in broken.items():
        (source / "juggling" / name).write_bytes(data)
    return {f"juggling/{name}": cause for name, (_, cause) in broken.items()}


@pytest.mark.parametrize("videos", [VideoOptions(verify="decode"), VideoOptions(gop=8)], ids=["decode", "re-encode"])
def test_broken_files_stop_or_are_listed_with_their_cause(source: Path, tmp_path: Path, videos: VideoOptions) -> None:
    causes = break_files(source)
    options = PackOptions(videos=videos)
    with pytest.raises(UnreadableFile, match=r"juggling/\w+\.mp4 cannot be packed .*--skip-unreadable"):
        pack(source, tmp_path / "a", options=options)
    result = pack(source, tmp_path / "b", options=replace(options, skip_unreadable=True), workers=2)
    assert {entry["name"]: entry["cause"] for entry in result.skipped} == causes
    assert json.loads((tmp_path / "b" / "pack.json").read_text())["skipped"] == result.skipped
    assert result.splits["train"].num_samples == 6


def test_what_the_check_of_the_header_finds(source: Path, tmp_path: Path) -> None:
    causes = break_files(source)
    result = pack(source, tmp_path / "out", options=PackOptions(skip_unreadable=True))
    assert {entry["name"] for entry in result.skipped} == set(causes) - {"juggling/damaged.mp4"}
    with pytest.raises(SampleError, match="damaged"):
        prepare_video((source / "juggling" / "damaged.mp4").read_bytes(), VideoOptions(verify="decode"))


def test_a_killed_pack_continues_with_the_same_bytes(source: Path, tmp_path: Path) -> None:
    options = replace(SMALL, videos=VideoOptions(short_side=32, gop=8), val_fraction=0.4)
    pack(source, tmp_path / "whole", options=options)
    handled: list[int] = []

    def die(size_bytes: int) -> None:
        handled.append(size_bytes)
        if len(handled) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "out", options=options, on_sample=die)
    with pytest.raises(ValueError, match="gop was 8, is 16"):
        pack(source, tmp_path / "out", options=replace(options, videos=VideoOptions(short_side=32, gop=16)))
    assert pack(source, tmp_path / "out", options=options).num_resumed_shards >= 1
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    with pytest.raises(ValueError, match="never overwritten"):
        pack(source, tmp_path / "out", options=options)


# --- lists of labels


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("0.mp4,climb\n1.webm,climb\n2.avi,rest\n", ("climb", "rest")),
        ("\ufeff0 climb\n1.webm climb\n\n./2.avi  rest\n", ("climb", "rest")),
        ("label,id,split\nclimb,0,train\n'climb',1,train\nrest,2,train\n".replace("'", '"'), ("climb", "rest")),
        ("/data/ssv2/0.mp4 1\n/data/ssv2/1.webm 1\n2 3\n", ("0", "1", "2", "3")),
        ('0.mp4,"a, b"\n1.webm,"a, b"\n2.avi,c\n', ("a, b", "c")),
    ],
    ids=["csv", "blanks", "titles", "numbers", "quotes"],
)
def test_labels_from_a_list(source: Path, tmp_path: Path, text: str, classes: tuple[str, ...]) -> None:
    folder = flat(source, tmp_path / "flat")
    (tmp_path / "list.txt").write_text(text, encoding="utf-8")
    result = pack(folder, tmp_path / "out", labels=tmp_path / "list.txt")
    assert result.splits["train"].classes == classes
    first, second = (classes[1], classes[3]) if len(classes) == 4 else classes
    assert labels_of(tmp_path / "out" / "train") == {"0": first, "1": first, "2": second}
    assert result.ignored == ["3.mp4", "4.webm", "5.avi"]


def test_two_lists_over_one_folder(source: Path, tmp_path: Path) -> None:
    folder = flat(source, tmp_path / "flat")
    (tmp_path / "train.csv").write_text("0.mp4,b\n1.webm,a\n2.avi,b\n")
    (tmp_path / "val.csv").write_text("4.webm,b\n")
    lists = {"labels": tmp_path / "train.csv", "val_labels": tmp_path / "val.csv"}
    result = pack(folder, tmp_path / "out", **lists)  # type: ignore[arg-type]
    assert labels_of(tmp_path / "out" / "train") == {"0": "b", "1": "a", "2": "b"}
    assert labels_of(tmp_path / "out" / "val") == {"4": "b"}
    assert result.ignored == ["3.mp4", "5.avi"]
    (tmp_path / "val.csv").write_text("4.webm,c\n")
    with pytest.raises(ValueError, match=r"1 classes are not in the training source, e\.g\. 'c'"):
        pack(folder, tmp_path / "out2", **lists)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="both a second list of labels and val_fraction are given"):
        pack(folder, tmp_path / "out2", **lists, options=PackOptions(val_fraction=0.5))  # type: ignore[arg-type]


def test_files_that_only_the_list_has(source: Path, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("juggling/0.mp4,a\ngone.mp4,a\nabseiling/1,b\n")
    with pytest.raises(UnreadableFile, match=r"gone\.mp4 is not there, and 0 more of the list"):
        pack(source, tmp_path / "out", labels=tmp_path / "list.csv")
    with pytest.raises(UnreadableFile, match=r"gone\.mp4 is not there.*--skip-missing"):
        pack(source, tmp_path / "out", labels=tmp_path / "list.csv", options=PackOptions(skip_unreadable=True))
    result = pack(source, tmp_path / "out", labels=tmp_path / "list.csv", options=PackOptions(skip_missing=True))
    assert [(entry["name"], entry["cause"]) for entry in result.skipped] == [("gone.mp4", "missing")]
    assert labels_of(tmp_path / "out" / "train") == {"juggling/0": "a", "abseiling/1": "b"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the list of labels is empty"),
        ("0.mp4\n", "line 1: found '0.mp4'; expected a path, a blank and a label"),
        ("0.mp4,1,2\n", "line 1: 3 columns; expected `path,label`, or a first line that names the columns"),
        ("0.mp4,1\n\n1.webm\n", "line 3: 1 columns; expected 2"),
        ("0.mp4,a\n0.mp4,b\n", "line 2: 0.mp4 has the labels 'a' and 'b'"),
        ("0.mp4,\n", "line 1: found '0.mp4' with the label ''"),
        ("0.mp4 12345678\n", "the label 12345678; expected numbers of classes"),
        ("0.mp4,a\n./0,b\n", "0.mp4 has the labels 'a' and 'b'"),
        ("x.mp4,a\n", "none of its 1 paths is a file of"),
    ],
)
def test_lists_that_are_refused(source: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        pack(flat(source, tmp_path / "flat"), tmp_path / "out", labels=tmp_path / "list.csv")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="no UTF-8 text"):
        read_labels(tmp_path / "binary")


# --- the command


def test_the_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    break_files(source)
    (source / "list.csv").write_text("juggling/0.mp4 0\njuggling/cut.mp4 1\nnowhere.mp4 1\n")
    arguments = ["pack", str(source), str(tmp_path / "out"), "--json", "--labels", str(source / "list.csv")]
    arguments += ["--short-side", "32", "--gop", "8", "--fps", "12.5", "--crf", "30", "--workers", "1"]
    assert main(arguments) != 0
    capsys.readouterr()
    assert main([*arguments, "--skip-unreadable"]) != 0  # forgives one thing, not the other
    capsys.readouterr()
    assert main([*arguments, "--skip-unreadable", "--skip-missing"]) == 0
    printed = capsys.readouterr()
    answer = json.loads(printed.out)
    assert (answer["media"], answer["num_skipped"]) == ("videos", 2)
    assert answer["skipped_by_cause"] == {"missing": 1, "video": 1}
    assert "left out: 2 files (missing: 1, video: 1)" in printed.err
    info = probe(samples(tmp_path / "out" / "train")[0]["mp4"])
    assert (info.height, info.width, info.fps, info.longest_gop <= 8) == (32, 42, 12.5, True)


def test_an_odd_short_side_becomes_the_even_one_below() -> None:
    with Video(prepare_video(encode(pictures(4)), VideoOptions(short_side=23))[0]) as video:
        assert min(video.info().height, video.info().width) == 22
