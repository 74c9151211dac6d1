"""`tessera export`: every model goes where it can, and is told where it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from launchers.cli import main
from tests.pretrain.export.tiny_runs import train_on_clips
from tests.pretrain.tiny_tokenizer import train_tokenizer, write_photos


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_photos(folder / "photos", [4], ((20, 20),))
    half = ["objective.mean=[0.5,0.5,0.5]", "objective.std=[0.5,0.5,0.5]"]
    return train_tokenizer(folder / "photos", folder, "run", *half).run_dir


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_on_clips(tmp_path_factory.mktemp("clips"))


def export(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    assert main(["export", *arguments, "--json"]) == 0, capsys.readouterr().err
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_a_tokenizer_goes_to_diffusers(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    found = export(capsys, str(tokenizer), str(out), "--to", "diffusers", "--ema", "--scaling-factor", "0.5")
    assert (found["weights"], found["step"], found["scaling_factor"]) == ("ema", 2, 0.5)
    assert json.loads((out / "config.json").read_text())["scaling_factor"] == 0.5


def test_clips_go_to_transformers(clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = export(capsys, str(clips), str(tmp_path / "out"), "--to", "transformers", "--pretraining")
    assert found["architecture"] == "VideoMAEForPreTraining"
    errors = found["errors"]
    assert isinstance(errors, dict)
    assert set(errors) == {"features", "predictions", "loss", "eps_effect"}
    assert max(errors.values()) < 1e-5


@pytest.mark.parametrize(("kind", "entry"), [("tokenizer", "state_dict"), ("clips", "model")])
def test_models_go_back_to_their_authors(
    kind: str, entry: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    found = export(capsys, str(request.getfixturevalue(kind)), str(out), "--to", "original", "--ema")
    assert (found["weights"], found["step"]) == ("ema", 2)
    assert found["layout"] == {"tokenizer": "dc_ae", "clips": "video_mae"}[kind]
    assert list(torch.load(out / "model.pth", weights_only=True)) == [entry]
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "model.pth"]


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("tokenizer", ["--to", "timm"], "is a tokenizer: export it --to diffusers, onnx or original"),
        ("clips", ["--to", "diffusers"], "is no tokenizer: export it --to timm, transformers, onnx or original"),
        ("clips", ["--to", "timm"], "an encoder of clips"),
        ("clips", ["--to", "onnx", "--pool", "avg"], "--pool goes with --to timm"),
        ("clips", ["--to", "original", "--pretraining"], "--pretraining goes with --to transformers"),
        ("clips", ["--to", "timm", "--pretraining"], "--pretraining goes with --to transformers"),
        ("tokenizer", ["--to", "onnx", "--scaling-factor", "1.0"], "--scaling-factor goes with --to diffusers"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    kind: str,
    options: list[str],
    words: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run: Path = request.getfixturevalue(kind)
    assert main(["export", str(run), str(tmp_path / "out"), *options]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
