"""`tessera pack` and `tessera index` as a user calls them."""

from __future__ import annotations

import argparse
import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from data_pipes.shards.manifest import Manifest
from launchers.commands import index as index_command
from launchers.commands import pack as pack_command
from launchers.progress import progress_bar


def call(module: object, *argv: str | Path) -> dict[str, object]:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)  # type: ignore[attr-defined]
    result: dict[str, object] = module.run(parser.parse_args([str(text) for text in argv]))  # type: ignore[attr-defined]
    return result


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for name in ("cat", "dog"):
        (tmp_path / "source" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (8, 6), (i, 9, 9)).save(tmp_path / "source" / name / f"{i}.png")
    (tmp_path / "source" / "README").touch()
    return tmp_path / "source"


def test_pack_and_index(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    result = call(pack_command, source, out, "--val-fraction", "0.4", "--shard-samples", "2", "--workers", "2")
    train = Manifest.load(out / "train")
    summary = result["splits"]
    assert isinstance(summary, dict)
    assert summary["train"] == {
        "num_samples": train.num_samples,
        "num_shards": len(train.shards),
        "size_bytes": train.size_bytes,
        "num_classes": 2,
        "fingerprint": train.fingerprint,
    }
    assert (result["num_ignored"], result["num_skipped"], result["num_resumed_shards"]) == (1, 0, 0)
    json.dumps(result)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"{out}/train: {train.num_samples} samples in {len(train.shards)} shards" in printed.err
    assert "not packed, since they are no pictures, or not in the list of labels: 1 files, e.g. README" in printed.err

    again = call(index_command, out / "train")
    assert again["fingerprint"] == train.fingerprint
    assert again["num_kept_indexes"] == len(train.shards)
    assert Manifest.load(out / "train").classes == ("cat", "dog"), "indexing again must not lose the class names"
    assert "indexes were still valid" in capsys.readouterr().err


def test_pack_options_reach_the_shards(source: Path, tmp_path: Path) -> None:
    (source / "cat" / "bad.png").touch()
    call(
        pack_command, source, tmp_path / "out", "--short-side", "3", "--limit", "9", "--skip-unreadable", "--no-shuffle"
    )
    identity = json.loads((tmp_path / "out" / "pack.json").read_text())["identity"]
    assert {name: identity[name] for name in ("short_side", "limit", "skip_unreadable", "shuffle")} == {
        "short_side": 3,
        "limit": 9,
        "skip_unreadable": True,
        "shuffle": False,
    }
    with tarfile.open(tmp_path / "out" / "train" / "shard-000000.tar") as tar:
        member = tar.extractfile("cat/0.png")
        assert member is not None
        assert Image.open(io.BytesIO(member.read())).size == (4, 3)


def test_mistakes_are_value_errors(source: Path, tmp_path: Path) -> None:
    call(pack_command, source, tmp_path / "out")
    with pytest.raises(ValueError, match="never overwritten"):
        call(pack_command, source, tmp_path / "out")
    with pytest.raises(ValueError, match="short_side is 0"):
        call(pack_command, source, tmp_path / "out2", "--short-side", "0")
    with pytest.raises(ValueError, match="workers is 0"):
        call(pack_command, source, tmp_path / "out2", "--workers", "0")
    with pytest.raises(SystemExit):
        call(pack_command, source, tmp_path / "out2", "--val", source, "--val-fraction", "0.1")


def write_tar(path: Path, *names: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name))
    return path


def test_index_patterns_braces_and_folders(tmp_path: Path) -> None:
    for i in (0, 2, 10):
        write_tar(tmp_path / "a" / f"s{i}.tar", f"{i}.txt", "README")
    everything = index_command.find_shards([str(tmp_path / "a")])
    assert [path.name for path in everything] == ["s0.tar", "s2.tar", "s10.tar"]
    assert index_command.find_shards([str(tmp_path / "*" / "s*.tar")]) == everything
    assert [p.name for p in index_command.find_shards([str(tmp_path / "a" / "s{0..1}.tar")])] == ["s0.tar", "s1.tar"]
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    result = call(index_command, tmp_path / "a", "--classes", tmp_path / "names.txt", "--workers", "1")
    assert (result["num_samples"], result["num_shards"], result["num_skipped_members"]) == (3, 3, 3)
    assert Manifest.load(tmp_path / "a").classes == ("cat", "dog")


def test_index_mistakes(tmp_path: Path) -> None:
    one, two = (write_tar(tmp_path / name / "s.tar", "a.txt") for name in "ab")
    for argument, message in {
        str(tmp_path): "no shard here",
        str(tmp_path / "none*.tar"): "no shard here",
        "pipe:cat x": "run a shell command",
        str(tmp_path / "a" / "s{0..1}.tar"): r"s0.tar: the shard cannot be opened",
    }.items():
        with pytest.raises(ValueError, match=message):
            call(index_command, argument, "--workers", "1")
    with pytest.raises(ValueError, match=r"the shards lie in 2 folders, .* give --out"):
        call(index_command, one, two)
    assert call(index_command, one, two, "--out", tmp_path / "out", "--workers", "1")["num_samples"] == 2
    (tmp_path / "a" / "s.tar.gz").write_bytes(gzip.compress(one.read_bytes()))
    with pytest.raises(ValueError, match=r"s.tar.gz: compressed with gzip"):
        call(index_command, tmp_path / "a")


def test_help_of_the_command_line_is_complete() -> None:
    for module in (pack_command, index_command):
        assert module.HELP
        assert "tessera " in module.EXAMPLES
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        assert parser.format_help()
        assert all(action.help for action in parser._actions)


def test_progress_shows_count_and_rate() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with progress_bar(console, "pictures") as progress:
        task = progress.add_task("pack", total=4)
        progress.advance(task, 2)
        progress.advance(task, 2)
    assert "4/4" in out.getvalue()
    assert "pictures/s" in out.getvalue()
    with progress_bar(Console(file=out), "pictures") as silent:
        assert silent.disable
