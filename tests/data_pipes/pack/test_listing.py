"""What is taken for a picture, a class and a label: guesses are few, said aloud, and can be replaced by options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipes.pack.label_lists import read_labels
from data_pipes.pack.list_format import ListFormat, parse_columns
from data_pipes.pack.listing import is_hidden, list_source
from data_pipes.pack.pack import pack
from data_pipes.pack.plan import PackOptions
from data_pipes.pack.reencode_picture import UnreadableFile
from data_pipes.pack.sources import FolderSource, MemorySource
from launchers.cli import main
from tests.data_pipes.pack.test_pack import picture, samples

HIDDEN = [
    ".ipynb_checkpoints/1-checkpoint.jpg",
    "cat/.ipynb_checkpoints/1-checkpoint.jpg",
    ".thumbnails/large/1.jpg",
    ".Trash-1000/files/old.jpg",
    "cat/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg",
    "@Recycle/1.jpg",
    "#recycle/1.jpg",
    "$RECYCLE.BIN/S-1/1.jpg",
    "System Volume Information/1.jpg",
    "__MACOSX/cat/._1.jpg",
    "__MACOSX/cat/1.jpg",
    "lost+found/1.jpg",
    "cat/._1.jpg",
]


def files(*names: str) -> MemorySource:
    return MemorySource("SRC", {name: picture(number) for number, name in enumerate(names)})


@pytest.mark.parametrize("hidden", HIDDEN)
def test_hidden_and_system_folders_are_no_classes(hidden: str) -> None:
    assert is_hidden(hidden)
    listing = list_source(files("cat/1.jpg", "dog/1.jpg", hidden))
    assert listing.classes == ("cat", "dog")
    assert [(entry.key, entry.label) for entry in listing.entries] == [("cat/1", 0), ("dog/1", 1)]
    assert listing.ignored == [hidden]


def test_names_that_only_look_alike_are_classes() -> None:
    names = ("a.b/1.jpg", "@home/1.jpg", "#1/1.jpg", "__pycache/1.jpg", "Trash/1.jpg", "thumbnails/1.jpg")
    assert not any(map(is_hidden, names))
    assert len(list_source(files(*names)).classes) == 6


def test_a_hidden_source_is_not_hidden(tmp_path: Path) -> None:
    folder = tmp_path / ".cache" / "set" / "cat"
    folder.mkdir(parents=True)
    (folder / "1.jpg").write_bytes(picture(0))
    assert len(list_source(FolderSource(tmp_path / ".cache" / "set")).entries) == 1


def test_a_list_may_name_hidden_files(tmp_path: Path) -> None:
    (tmp_path / "list").write_text(".a/1.jpg,x\nb/2.jpg,y\n")
    listing = list_source(files(".a/1.jpg", ".a/3.jpg", "b/2.jpg"), labels=read_labels(tmp_path / "list"))
    assert {entry.file.name: entry.label for entry in listing.entries} == {".a/1.jpg": 0, "b/2.jpg": 1}
    assert listing.ignored == [".a/3.jpg"]


def test_hidden_files_do_not_decide_what_is_packed(tmp_path: Path) -> None:
    """Also where a list may name them: thumbnails of videos do not make it a folder of both."""
    (tmp_path / "list").write_text("0.mp4,x\n1.mp4,y\n")
    names = ("0.mp4", "1.mp4", "._0.mp4", "@eaDir/0.mp4/SYNOPHOTO_THUMB_M.jpg", ".thumbnails/1.jpg")
    listing = list_source(files(*names), labels=read_labels(tmp_path / "list"))
    assert (listing.media, [entry.file.name for entry in listing.entries]) == ("videos", ["0.mp4", "1.mp4"])
    assert set(listing.ignored) == set(names[2:])


def labels_of(text: str, folder: Path, *names: str, form: ListFormat | None = None) -> dict[str, str | None]:
    """File -> name of its class, None without a label."""
    (folder / "list").write_text(text)
    listing = list_source(files(*names), labels=read_labels(folder / "list", form))
    return {entry.file.name: listing.classes[entry.label] if entry.label >= 0 else None for entry in listing.entries}


NAMES = ("0.jpg", "1.jpg", "a b, c.jpg")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.jpg,001\n1.jpg,002\n", {"0.jpg": "001", "1.jpg": "002"}),
        ("0.jpg 00\n1.jpg 7\n", {"0.jpg": "00", "1.jpg": "7"}),
        ("0.jpg,0\n1.jpg,2\n", {"0.jpg": "0", "1.jpg": "2"}),
        ("0.jpg\tNew York\n1.jpg\tOslo, Norway\n", {"0.jpg": "New York", "1.jpg": "Oslo, Norway"}),
        ("0.jpg;a, b\n1.jpg;c\n", {"0.jpg": "a, b", "1.jpg": "c"}),
        ("a b, c.jpg 3\n1.jpg 4\n", {"a b, c.jpg": "3", "1.jpg": "4"}),
        ('"a b, c.jpg",x\n1.jpg,"y, z"\n', {"a b, c.jpg": "x", "1.jpg": "y, z"}),
        ("0.jpg,-1\n1.jpg,5\n", {"0.jpg": None, "1.jpg": "5"}),
        ("0.jpg,-1\n1.jpg,cat\n", {"0.jpg": None, "1.jpg": "cat"}),
        ("0.jpg 16 -1\n1.jpg 300 -1\n", {"0.jpg": None, "1.jpg": None}),
        ("filename\tcategory\n0.jpg\tx\n", {"0.jpg": "x"}),
        ('{"0.jpg": "x",\n "1.jpg": -1}', {"0.jpg": "x", "1.jpg": None}),
        ('[{"id": "0", "label": "b", "template": "Holding [it]"}]', {"0.jpg": "Holding [it]"}),
    ],
)
def test_lists_as_they_come(text: str, expected: dict[str, str | None], tmp_path: Path) -> None:
    assert labels_of(text, tmp_path, *NAMES) == expected


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("bild;klasse\n0.jpg;x\n1.jpg;y\n", ListFormat(None, "bild", "klasse")),
        ("klasse|bild\nx|0.jpg\ny|1.jpg\n", ListFormat("|", "bild", "klasse")),
        ("x,0.jpg\ny,1.jpg\n", ListFormat("comma", "1", "0")),
        ("0.jpg 3 x 9\n1.jpg 4 y 9\n", ListFormat("blank", "0", "2")),
        ("path,n,label\n0.jpg,1,x\n1.jpg,1,y\n", ListFormat(None, "path", "label")),
    ],
)
def test_what_is_said_is_done(text: str, form: ListFormat, tmp_path: Path) -> None:
    assert labels_of(text, tmp_path, *NAMES, form=form) == {"0.jpg": "x", "1.jpg": "y"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "bild,klasse\n0.jpg,x\n",
            r"line 1: 'bild' is no file and looks like a title; say --columns image=bild,label=",
        ),
        ("0.jpg 0 3 7\n1.jpg 1\n", "line 1: several numbers behind a path"),
        ('0.jpg,"x\n1.jpg,y\n', r"line 1: unexpected end of data"),
        ("path,label\n", "has titles and no line behind them"),
        ("[1, 2]", "no list of objects with the same keys"),
        ("x|0.jpg\ny|1.jpg\n", r"expected a path, a blank and a label"),
    ],
)
def test_lists_that_need_words(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        labels_of(text, tmp_path, *NAMES)


def test_forms_that_cannot_be(tmp_path: Path) -> None:
    for wrong in ("image=a", "a,b", "image=,label=b", "image=a,label=b,c=d"):
        with pytest.raises(ValueError, match="expected image=TITLE,label=TITLE"):
            parse_columns(wrong)
    with pytest.raises(ValueError, match="the delimiter is 'tabs'; expected one character, or comma, tab"):
        ListFormat("tabs")
    with pytest.raises(ValueError, match="no column 'klasse'; the first line has path, label"):
        labels_of("path,label\n0.jpg,x\n", tmp_path, *NAMES, form=ListFormat(None, "path", "klasse"))


def test_one_flag_forgives_one_thing(tmp_path: Path) -> None:
    folder = tmp_path / "SRC"
    folder.mkdir()
    (folder / "0.jpg").write_bytes(picture(0))
    (folder / "broken.jpg").write_bytes(b"<html>")
    (tmp_path / "list.csv").write_text("0.jpg,a\nbroken.jpg,b\ngone.jpg,c\n")
    for options, message in (
        (PackOptions(), "gone.jpg is not there.*--skip-missing"),
        (PackOptions(skip_unreadable=True), "gone.jpg is not there.*--skip-missing"),
        (PackOptions(skip_missing=True), "broken.jpg cannot be packed.*--skip-unreadable"),
    ):
        with pytest.raises(UnreadableFile, match=message):
            pack(folder, tmp_path / f"out{message[:3]}", labels=tmp_path / "list.csv", options=options)
    both = PackOptions(skip_missing=True, skip_unreadable=True)
    result = pack(folder, tmp_path / "out", labels=tmp_path / "list.csv", options=both)
    assert {entry["name"]: entry["cause"] for entry in result.skipped} == {
        "gone.jpg": "missing",
        "broken.jpg": "unreadable",
    }
    assert [sample["cls"] for sample in samples(tmp_path / "out" / "train")] == [b"0"]


def test_what_was_understood_is_said_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, said = tmp_path / "SRC", []
    for name in ("cat/1.jpg", "cat/2.jpg", "dog/1.jpg", ".ipynb_checkpoints/1.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(len(said)))

    def listen(text: str) -> None:
        assert not (tmp_path / "out").exists()
        said.append(text)

    pack(folder, tmp_path / "out", on_understood=listen)
    assert said == [f"train: 3 pictures of {folder}, 2 classes: cat (2), dog (1); 1 hidden files left out"]
    (tmp_path / "list.tsv").write_text("bild\tklasse\ncat/1.jpg\tx\ndog/1.jpg\t-1\n")
    arguments = ["pack", str(folder), str(tmp_path / "listed"), "--labels", str(tmp_path / "list.tsv"), "--json"]
    assert main([*arguments, "--columns", "image=bild,label=klasse", "--delimiter", "tab"]) == 0
    printed = capsys.readouterr()
    assert "read as columns by tab, path in 'bild', label in 'klasse', 0 of its files missing" in printed.err
    assert "e.g. cat/1.jpg is x; 1 without a label" in printed.err
    assert json.loads(printed.out)["splits"]["train"]["num_samples"] == 2
    by_key = {sample["__key__"]: sample.get("cls") for sample in samples(tmp_path / "listed" / "train")}
    assert by_key == {"cat/1": b"0", "dog/1": None}
    assert main(["pack", str(folder), str(tmp_path / "other"), "--delimiter", "tab"]) != 0
    assert "--columns and --delimiter are about lists of labels" in capsys.readouterr().err
