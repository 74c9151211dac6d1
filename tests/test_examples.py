"""The examples run as a user runs them: from another folder, and from an installed wheel."""

from __future__ import annotations

import os
import re
import shutil
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

from tests.processes import run_to_end

ROOT = Path(__file__).resolve().parent.parent
EXPECTED = {
    "extract_features": r"summaries \(5, 32\), tokens \(5, 16, 32\)",
    "iterate_loader": r"resumed at sample 512: 14 batches came again in the same order",
    "own_objective": r"k-NN [\d.]+ % of 360 digits, .*\nrotations told apart: [\d.]+%",
}
"""Example -> what it prints."""


def test_every_example_is_here() -> None:
    assert sorted(path.stem for path in (ROOT / "examples").glob("*.py")) == sorted(EXPECTED)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script = ROOT / "examples" / f"{name}.py"
    done = run_to_end([sys.executable, str(script), str(tmp_path / "out")], env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(EXPECTED[name], done.stdout), done.stdout


def test_an_objective_of_one_s_own_is_short() -> None:
    text = (ROOT / "examples" / "own_objective.py").read_text()
    assert len(text[text.index("class ConvEncoder") : text.index("def main")].splitlines()) <= 85


@pytest.mark.slow
@pytest.mark.timeout(1800)  # eight processes that import torch
def test_the_examples_run_from_an_installed_wheel(tmp_path: Path) -> None:
    """A clean environment, with the packages of the running one beside ours; nothing of the checkout is on its path."""
    source = tmp_path / "source"
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv*", "runs", "data", "site", "build", "*.egg-info")
    )
    uv, venv = Path(sys.executable).with_name("uv"), tmp_path / "venv"
    assert uv.is_file(), "uv stands beside the interpreter; `make test` puts it there"
    build = [str(uv), "build", "--offline", "--no-build-isolation", "--python", sys.executable]
    _run([*build, "--out-dir", str(tmp_path), str(source)], tmp_path)
    (wheel,), (source_archive,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    with tarfile.open(source_archive) as archive:
        assert any(name.endswith("/configs/mae/vit_base.yaml") for name in archive.getnames())
    _run([str(uv), "venv", "--offline", "--python", sys.executable, str(venv)], tmp_path)
    python = str(venv / "bin" / "python")
    _run([str(uv), "pip", "install", "--offline", "--no-deps", "--python", python, str(wheel)], tmp_path)
    (site,) = (venv / "lib").glob("python*/site-packages")
    (site / "running.pth").write_text(sysconfig.get_path("purelib") + "\n")
    shutil.rmtree(source / "tessera")
    examples = tmp_path / "examples"
    shutil.copytree(ROOT / "examples", examples)
    where = _run([python, "-c", "import tessera, pretrain; print(tessera.__file__, pretrain.__file__)"], tmp_path)
    assert where.count(str(site)) == 2, where
    for name, expected in EXPECTED.items():
        printed = _run([python, str(examples / f"{name}.py"), str(tmp_path / name)], tmp_path)
        assert re.search(expected, printed), printed
    _use_the_commands(venv / "bin" / "tessera", tmp_path / "user")
    typed = (site / "tessera" / "py.typed", site / "pretrain" / "py.typed")
    assert all(path.is_file() for path in typed)
    assert _run([str(venv / "bin" / "tessera"), "export", "--help"], tmp_path).startswith("usage: tessera export")


def _use_the_commands(tessera: Path, folder: Path) -> None:
    """A user's first hour without a checkout: shipped recipes by their names, from data to a report."""
    folder.mkdir()

    def run(*arguments: str) -> str:
        return _run([str(tessera), *arguments], folder)

    assert "mae/vit_base " in run("recipes")
    assert run("recipes", "show", "demo/digits") == (ROOT / "configs" / "demo" / "digits.yaml").read_text()
    run("pack", "builtin:digits", "digits", "--val-fraction", "0.2")
    small = ["name=digits", "train.epochs=null", "train.steps=2", "optim.warmup_epochs=0", "device=cpu"]
    run("train", "demo/digits", "data.train=digits/train", "data.val=digits/val", *small)
    run("eval", "runs/digits", "--suite", "eval/demo", "tasks.linear.settings.iterations=5")
    run("export", "runs/digits", "exported", "--to", "timm")
    run("report", "runs/digits")
    assert (folder / "exported" / "model.safetensors").is_file()
    assert (folder / "runs" / "digits" / "report.html").is_file()


def _run(command: list[str], folder: Path) -> str:
    """What a command prints, without the checkout on Python's path."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = run_to_end(command, env={**environment, "OMP_NUM_THREADS": "1"}, cwd=folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
