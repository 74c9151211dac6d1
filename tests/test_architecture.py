"""The rules that no reader should have to check by hand.

Which way imports go stands in pyproject.toml, `[tool.importlinter]`, and `make lint` checks it. Here: the circles that
those contracts leave open, that each of them finds what it forbids, and the rules that are not about imports.
"""

from __future__ import annotations

import ast
import graphlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pretrain", "data_pipes", "launchers", "tessera")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
PLANTED = {
    "data_pipes/order/planted.py": (
        "def late():\n    import launchers.cli",
        "data_pipes.order.planted -> launchers.cli",
    ),
    "pretrain/weights/planted.py": (
        "def late():\n    import pretrain.planted",
        "- pretrain.weights.planted -> pretrain.planted (l.2)\n  pretrain.planted -> pretrain.train (l.1)",
    ),
    "pretrain/planted.py": ("import pretrain.train", "pretrain.weights is not allowed to import pretrain.train"),
    "pretrain/models/planted.py": (
        "def late():\n    from pretrain import parallel",
        "pretrain.models.planted -> pretrain.parallel",
    ),
    "pretrain/losses/planted.py": (
        "if TYPE_CHECKING:\n    from pretrain.models import mae",
        "pretrain.losses.planted -> pretrain.models.mae",
    ),
    "pretrain/objectives/planted.py": (
        "def late():\n    import pretrain.tracking.journal",
        "pretrain.objectives.planted -> pretrain.tracking.journal",
    ),
    "data_pipes/store/planted.py": (
        "def late():\n    import data_pipes.shards.planted",
        "No cycles are allowed in data_pipes.",
    ),
    "data_pipes/shards/planted.py": (
        "if TYPE_CHECKING:\n    import data_pipes.store.planted",
        "- .store -> .shards (1 import)",
    ),
}
"""Files with one forbidden import each, within functions or for type checkers alone, and what the report says of it."""


def test_a_folder_and_its_subfolders_make_no_circle() -> None:
    graph = grimp.build_graph(*PACKAGES, cache_dir=None, exclude_type_checking_imports=False)
    assert len(graph.modules) == len(MODULES)

    def room(module: str) -> str:
        """The folder that a module lies in; a module directly in a package is a room of its own."""
        folder = module.rpartition(".")[0]
        return module if folder in ("", *PACKAGES) or graph.find_children(module) else folder

    arrows: dict[str, set[str]] = {}
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            if room(module) != room(imported):
                arrows.setdefault(room(module), set()).add(room(imported))
    graphlib.TopologicalSorter(arrows).prepare()  # CycleError names the rooms of a circle


def test_every_import_contract_finds_what_it_forbids(tmp_path: Path) -> None:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name, (text, _) in PLANTED.items():
        (tmp_path / name).write_text(text)
    run = "import importlinter.cli; importlinter.cli.lint_imports_command()"
    command = [sys.executable, "-c", run, "--no-cache", "--no-logo"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert re.search(r"Contracts: 0 kept, \d broken\.", done.stdout), done.stdout
    for _, expected in PLANTED.values():
        assert expected in done.stdout, (expected, done.stdout)


def test_no_drawers() -> None:
    drawers = {"utils.py", "misc.py", "common.py", "helpers.py", "util.py"}
    assert not [str(path) for path in MODULES if path.name in drawers]


def test_every_module_says_what_it_is_for() -> None:
    assert not [str(path) for path in MODULES if not ast.get_docstring(ast.parse(path.read_text()))]
