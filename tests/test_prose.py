"""One form of documentation everywhere: what an IDE shows, a reader finds in the same place in each file.

A field or constant is documented by the string below it. A docstring is a sentence, more prose where it is needed, then
the sections `Args:`, `Returns:` (or `Yields:`) and `Raises:`; no argument is explained outside of `Args:`, and no error
outside of `Raises:`. `python tests/test_prose.py [FOLDER ...]` lists what breaks this.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pretrain", "data_pipes", "launchers", "tessera")
SECTIONS = ("Args", "Returns", "Yields", "Raises")
Definition = ast.FunctionDef | ast.AsyncFunctionDef


def problems(path: Path) -> Iterator[str]:
    """What breaks the rules in one file, as `file:line: what`."""
    text = path.read_text()
    lines, tree = text.split("\n"), ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef):
            for statement in node.body:
                if isinstance(statement, ast.Assign | ast.AnnAssign):
                    below = lines[statement.end_lineno] if statement.end_lineno < len(lines) else ""  # type: ignore[operator,index,misc]
                    if below.strip().startswith("#") and _indent(below) == statement.col_offset:
                        yield f"{path}:{statement.lineno}: a field documented by a comment below it; use a string"
        if isinstance(node, Definition):
            docstring = ast.get_docstring(node)
            if docstring:
                yield from (f"{path}:{node.lineno}: {node.name}: {what}" for what in _of_docstring(node, docstring))


def _of_docstring(node: Definition, docstring: str) -> Iterator[str]:
    heads = [line[:-1] for line in docstring.split("\n") if line.rstrip(":") in SECTIONS and line.endswith(":")]
    if heads != [name for name in SECTIONS if name in heads]:
        yield f"sections {heads}; expected the order {', '.join(SECTIONS)}, each once"
    prose = re.split(r"^(?:Args|Returns|Yields|Raises):$", docstring, maxsplit=1, flags=re.MULTILINE)[0]
    arguments = node.args
    names = [one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    for name in names:
        if re.search(rf"(?:^|[.;:,] )`?{name}`?(?:, `?\w+`?)*: ", prose, flags=re.MULTILINE):
            yield f"argument {name} is explained outside of `Args:`"
    if re.search(r"\bRaises [A-Z`]", prose):
        yield "an error is named outside of `Raises:`"


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


@pytest.mark.parametrize("package", PACKAGES)
def test_documentation_has_one_form(package: str) -> None:
    found = [problem for path in sorted((ROOT / package).rglob("*.py")) for problem in problems(path)]
    assert not found, "\n".join(found)


if __name__ == "__main__":
    folders = [Path(name) for name in sys.argv[1:]] or [ROOT / package for package in PACKAGES]
    listed = [path for folder in folders for path in (sorted(folder.rglob("*.py")) if folder.is_dir() else [folder])]
    for path in listed:
        print(*problems(path), sep="\n", end="\n" if list(problems(path)) else "")
