"""The directions that imports may take, and the rules that no reader should have to check by hand."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(path for package in ("pretrain", "data_pipes", "launchers") for path in (ROOT / package).rglob("*.py"))
FORBIDDEN = {
    "data_pipes": ("pretrain", "launchers"),
    "pretrain": ("launchers",),
    "pretrain/models": (
        "pretrain.parallel",
        "pretrain.objectives",
        "pretrain.train",
        "pretrain.checkpoint.checkpoints",
    ),
    "pretrain/losses": ("pretrain.models", "pretrain.objectives", "pretrain.parallel", "pretrain.train"),
    "pretrain/objectives": (
        "pretrain.parallel",
        "pretrain.train",
        "pretrain.checkpoint.checkpoints",
        "pretrain.tracking.tracker",
    ),
    "pretrain/parallel": ("pretrain.train", "pretrain.checkpoint.checkpoints", "pretrain.tracking.tracker"),
}


def _imports(path: Path) -> set[str]:
    """Modules imported at run time, at any depth; blocks under `if TYPE_CHECKING` do not count."""
    names: set[str] = set()
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update({node.module, *(f"{node.module}.{alias.name}" for alias in node.names)})
        pending.extend(ast.iter_child_nodes(node))
    return names


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports_go_one_way(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        for name in _imports(path):
            for forbidden in FORBIDDEN[folder]:
                assert not f"{name}.".startswith(f"{forbidden}."), (
                    f"{path.relative_to(ROOT)} imports {name}; {folder} must not know {forbidden}"
                )


def test_no_drawers() -> None:
    drawers = {"utils.py", "misc.py", "common.py", "helpers.py", "util.py"}
    assert not [str(path) for path in MODULES if path.name in drawers]


def test_every_module_says_what_it_is_for() -> None:
    assert not [str(path) for path in MODULES if not ast.get_docstring(ast.parse(path.read_text()))]
