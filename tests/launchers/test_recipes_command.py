"""Shipped recipes are listed, shown, and found by their names from everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launchers.cli import main
from pretrain.config import ConfigError, load_config
from pretrain.phases import is_pipeline, load_pipeline
from pretrain.recipes import find_recipe, recipe_names, summary_of


def test_the_list_has_a_line_for_each(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
    assert len(lines) == len(list((root / "configs").rglob("*.yaml")))
    assert all(summary_of(name) for name in recipe_names())
    assert main(["recipes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipes"]["demo/digits"].startswith("The demo")


def test_one_is_shown_as_it_is(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "show", "mae/vit_base"]) == 0
    assert capsys.readouterr().out == (root / "configs" / "mae" / "vit_base.yaml").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["show", "mae/vit_bsae"], "did you mean mae/vit_base?"), (["show"], "give the recipe's name")],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mae/vit_base", "mae/vit_base.yaml", "configs/mae/vit_base.yaml"])
def test_found_from_another_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config(name, ["data.train=a", "data.val=b"]).name == "mae_vit_base"
    assert is_pipeline(Path("dcae/tiny/pipeline"))
    assert [phase.name for phase in load_pipeline(Path("dcae/tiny/pipeline"))] == ["phase1", "phase2", "phase3"]


def test_a_file_comes_first_and_nothing_outside_is_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mae").mkdir()
    (tmp_path / "mae" / "vit_base").write_text("name: mine\n")
    assert find_recipe("mae/vit_base") == Path("mae/vit_base")
    assert find_recipe("demo/../demo/digits") == Path("demo/../demo/digits")
    with pytest.raises(ConfigError, match=r"did you mean demo/digits\?"):
        load_config("demo/digit")
