"""What goes wrong in a command is a sentence with the name of what it is about, and exit code 2."""

from __future__ import annotations

import argparse
import errno
import os
from pathlib import Path

import pytest

from data_pipes.decode.picture import decode_pixels
from data_pipes.errors import BadDataError, DecodeError
from data_pipes.loading.quarantine import BadSample, Quarantine
from data_pipes.loading.workers import WorkerError
from data_pipes.store.files import write_atomically
from launchers import cli
from pretrain.export.publish import ExportError
from pretrain.tracking.journal import JournalWriter
from pretrain.tracking.mlflow_shipper import LockedError, ShippingError
from tests.pretrain.runs import overrides_of, run_here

ERRORS = (
    ExportError("the export differs"),
    ShippingError("no server"),
    LockedError("another process ships"),
    WorkerError("a worker died"),
    ImportError("No module named 'onnx'; pip install tessera-pretrain[onnx]"),
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/full/file.tar"),
    ValueError("a mistake"),
)


@pytest.mark.parametrize("error", ERRORS, ids=[type(error).__name__ for error in ERRORS])
def test_a_command_ends_with_a_sentence(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All commands run within the one `main`, so one of them stands for all."""

    def failing(_: argparse.Namespace) -> None:
        raise error

    arguments = argparse.Namespace(command="export", run_command=failing, json=False)
    monkeypatch.setattr(cli, "parse", lambda given: arguments)
    assert cli.main(["export"]) == 2
    written = capsys.readouterr().err
    assert written == f"tessera export: {error}\n"


def test_a_defect_is_no_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_: argparse.Namespace) -> None:
        raise RuntimeError("a sample was lost")

    monkeypatch.setattr(cli, "parse", lambda given: argparse.Namespace(command="eval", run_command=failing, json=False))
    with pytest.raises(RuntimeError, match="a sample was lost"):
        cli.main(["eval"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_a_full_disk_has_the_files_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    journal = JournalWriter(tmp_path / "journal.jsonl")
    os.dup2(os.open("/dev/full", os.O_WRONLY), journal._open_descriptor())
    journal.append("event", {"name": "x"})  # its lines wait in memory
    with pytest.raises(OSError, match=r"No space left on device: '.*journal.jsonl'"):
        journal.flush_to_disk()
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*picture.png'"):
            write_atomically(tmp_path / "picture.png", b"content")
    assert list(tmp_path.glob("*picture*")) == []


@pytest.mark.parametrize("content", [b"", b"no picture at all", b"\0" * 100])
def test_what_is_no_picture_is_described_by_what_it_holds(content: bytes) -> None:
    with pytest.raises(DecodeError) as caught:
        decode_pixels(content, 3)
    assert "object at 0x" not in str(caught.value)
    assert ("a file of 0 bytes" if not content else f"{len(content)} bytes that begin with") in str(caught.value)


def test_bad_samples_are_never_more_than_those_seen() -> None:
    bad = BadSample("shard-000000.tar", "a", "decode", "damaged", 0)
    with pytest.raises(BadDataError, match=r"^1 of the first 1 samples of this run are bad"):
        Quarantine(None, 0.0, 100).record(0, [bad])


def test_a_run_that_is_over_says_how_to_train_on(
    tiny_dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    overrides = overrides_of(tiny_dataset, tmp_path, "run", "train.steps=2", "data.val=null")
    run_here(overrides)
    assert run_here(overrides)["steps_this_start"] == 0
    assert (
        "the run has reached its end, step 2 of train.steps=2; to train on, start it with a larger"
        in capfd.readouterr().err
    )
