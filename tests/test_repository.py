"""The small files beside the code agree with it: the citation, the hooks, the templates."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent


def test_the_citation_is_of_this_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert {"cff-version", "message", "title", "authors"} <= set(citation)


def test_every_hook_is_a_tool_of_the_development_environment() -> None:
    tools = Path(sys.executable).parent
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert local["repo"] == "local"
    for hook in local["hooks"]:
        folder, _, name = hook["entry"].split()[0].rpartition("/")
        assert folder == ".venv/bin"
        assert (tools / name).is_file(), f"{name} is not installed beside {sys.executable}; is it in the extra `dev`?"


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_issue_forms_have_what_their_readers_need(name: str) -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    assert {"name", "description", "body"} <= set(form)
    names = [part["id"] for part in form["body"] if part["type"] != "markdown"]
    assert len(names) == len(set(names))


PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(r"`((?:pretrain|data_pipes|launchers|tests|tools|configs|docs)/[\w./-]*)`", page.read_text())
    assert not [name for name in named if not (ROOT / name).exists()]
