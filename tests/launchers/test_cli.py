"""The command line: help with examples, exit codes, one JSON line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launchers.cli import COMMANDS, main, parse
from tests.pretrain.runs import CONFIG, overrides_of


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert f"tessera {command} " in shown.split("examples:")[1]
    assert "--json" in shown


def test_overrides_may_stand_behind_options() -> None:
    arguments = parse(["train", "a.yaml", "train.steps=1", "--json", "seed=3"])
    assert arguments.overrides == ["train.steps=1", "seed=3"]
    assert arguments.json
    with pytest.raises(SystemExit) as caught:
        parse(["train", "a.yaml", "--jsonn", "seed=3"])
    assert caught.value.code == 2


def test_train_prints_one_json_line(tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = overrides_of(tiny_dataset, tmp_path, "run", "train.steps=2")
    assert main(["train", str(CONFIG), *overrides, "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert json.loads(lines[0])["status"] == "finished"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("train.stepz=3", "did you mean train.steps"),
        ("data.train=/nowhere", "/nowhere"),
        ("train.global_batch=64", "shorter than one step|lower the batch"),
        ("train.micro_batch=0", "train.micro_batch is 0; expected at least 1"),
        ("train.epochs=1", "exactly one"),
        ("device=cuda", "no CUDA device"),
        ("parallel.strategy=fsdp2", "not started by torchrun"),
        ("objective.model.encoder.in_channels=3", "mean has 1 numbers"),
    ],
)
def test_mistakes_exit_with_2_before_anything_is_written(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, words: str
) -> None:
    length = ["train.steps=null", "train.epochs=1"] if "global_batch" in change else ["train.steps=2"]
    overrides = overrides_of(tiny_dataset, tmp_path / "out", "run", *length, change)
    assert main(["train", str(CONFIG), *overrides]) == 2
    error = capsys.readouterr().err
    assert any(word in error for word in words.split("|")), error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()
