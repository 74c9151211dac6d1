"""`tessera eval` of a tokenizer: figures, files, and points in the run's journal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launchers.cli import parse
from launchers.commands.eval import run
from pretrain.tracking.journal import read_metrics
from pretrain.weights.tokenizer import is_tokenizer, load_tokenizer
from tests.pretrain.runs import overrides_of, run_here
from tests.pretrain.tiny_tokenizer import train_tokenizer, write_photos

SUITE = """
batch_size: 4
tasks:
  quality: {protocol: psnr_uint8}
  latents: {protocol: latent_statistics}
"""


def test_a_run_is_evaluated_on_its_own_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_photos(tmp_path / "train", [8], ((16, 20),))
    write_photos(tmp_path / "val", [5], ((20, 16),))
    config = train_tokenizer(tmp_path / "train", tmp_path, "run", f"data.val={tmp_path / 'val'}")
    (tmp_path / "suite.yaml").write_text(SUITE)
    given = ["eval", str(config.run_dir), "--suite", str(tmp_path / "suite.yaml"), "--device", "cpu"]
    assert is_tokenizer(config.run_dir)
    summary = run(parse([*given, "--ema", "num_samples=3"]))
    folder = config.run_dir / "eval" / "step-00000002-ema"
    record = json.loads((folder / "quality.json").read_text())
    assert record["num_test"] == 3
    assert record["model_digest"] == load_tokenizer(config.run_dir, ema=True).digest
    assert record["view"]["image_size"] == [16, 16]
    assert "psnr" in capsys.readouterr().err
    points = read_metrics(config.run_dir)["eval_ema/quality/psnr"]
    assert [(point.step, point.value) for point in points] == [(2, record["metrics"]["psnr"])]
    assert summary["files"] == [str(folder / "quality.json"), str(folder / "latents.json")]
    run(parse(given))
    assert "eval/latents/effective_rank" in read_metrics(config.run_dir)
    with pytest.raises(ValueError, match="is a tokenizer: leave out --untrained"):
        run(parse([*given, "--untrained"]))


def test_what_is_a_tokenizer(tiny_dataset: Path, tmp_path: Path) -> None:
    run_here(overrides_of(tiny_dataset, tmp_path, "mae", "train.steps=1"))
    assert not is_tokenizer(tmp_path / "mae")
    assert not is_tokenizer(tmp_path / "absent")
    assert not is_tokenizer(tmp_path)
    (tmp_path / "exported").mkdir()
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (tmp_path / "exported" / name).write_text("{}")
    assert is_tokenizer(tmp_path / "exported")
