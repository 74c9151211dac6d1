"""Writes docs/configuration.md: every key of every YAML, from the dataclasses that own them.

usage: python tools/configuration.py            (a test holds the page to what this writes)
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipes.bounds import bounds_of
from pretrain.config import RunConfig
from pretrain.evaluation.encoder.protocols import PROTOCOLS
from pretrain.evaluation.encoder.suite import SuiteConfig
from pretrain.evaluation.tokenizer import protocols as tokenizer_protocols
from pretrain.evaluation.tokenizer import suite as tokenizer_suite
from pretrain.objectives.table import OBJECTIVES
from pretrain.phases import PipelineConfig

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
HEAD = """# Configuration

Every key that a YAML file or a `key.path=value` argument can set, with its type, default and meaning. Written by
`python tools/configuration.py` from the fields of the dataclasses: edit those, not this page. `null` in YAML is None.
"""


def main() -> None:
    PAGE.write_text(page())


def page() -> str:
    """The whole page."""
    parts = [HEAD, "\n## A run\n\nRead by `tessera train CONFIG` and `torchrun -m pretrain CONFIG`.\n"]
    known: dict[type, str] = {}
    parts += tables("", RunConfig, known, skip=("objective", "objective_name"))
    for name, (config, _) in OBJECTIVES.items():
        parts.append(f"\n## Objective `{name}`\n\nThe keys under `objective` where `objective.name` is `{name}`.\n")
        parts += tables("objective", config, known)
    parts.append("\n## A pipeline\n\nRuns one after the other, also read by `tessera train`.\n")
    parts += tables("", PipelineConfig, known)
    parts.append("\n## A suite of encoders\n\nRead by `tessera eval MODEL --suite SUITE.yaml`.\n")
    parts += tables("", SuiteConfig, known)
    for name, protocol in PROTOCOLS.items():
        parts.append(f"\n### Protocol `{name}`\n\nThe keys under `tasks.<task>.settings` of a task of this protocol.\n")
        parts += tables("", protocol.config, known)
    parts.append("\n## A suite of tokenizers\n\nRead by `tessera eval` where the model is a tokenizer.\n")
    parts += tables("", tokenizer_suite.TokenizerSuiteConfig, known)
    for name, entry in tokenizer_protocols.PROTOCOLS.items():
        parts.append(f"\n### Metric `{name}`\n\nThe keys under `tasks.<task>.settings` of a task of this protocol.\n")
        parts += tables("", entry.config, known)
    return "".join(parts)


def tables(prefix: str, config: type, known: dict[type, str], skip: tuple[str, ...] = ()) -> Iterator[str]:
    """A table of a dataclass's fields, then those of the dataclasses in it, each once.

    Args:
        prefix: where its keys stand, e.g. "data.order".
        config: the dataclass.
        known: dataclasses that have a table already, and where; those met here are added.
        skip: fields that get no row.
    """
    documented, hints = field_documentation(config), typing.get_type_hints(config)
    rows, nested = [], []
    for field in dataclasses.fields(config):
        if field.name in skip:
            continue
        key = f"{prefix}.{field.name}" if prefix else field.name
        inner = dataclass_in(hints[field.name])
        text = " ".join(documented.get(field.name, "").split())
        if inner is not None:
            place = known.get(inner)
            text = f"{text} A section, see below." if place is None else f"{text} A section, as `{place}`."
            if place is None:
                known[inner] = key
                nested.append((key, inner))
        bounds = bounds_of(field)
        kind = type_name(hints[field.name]) + (f", {bounds}" if bounds is not None else "")
        rows.append(f"| `{key}` | {cell(kind)} | {cell(default_of(field))} | {cell(text.strip())} |")
    if rows:
        yield "\n| key | type | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
    else:
        yield "\nIt has no keys.\n"
    for key, inner in nested:
        summary = inspect.getdoc(inner) or ""
        yield f"\n#### `{key}`\n\n{summary.split(chr(10) + chr(10))[0]}\n"
        yield from tables(key, inner, known)


def field_documentation(config: type) -> dict[str, str]:
    """The string below each field of a dataclass, those that it inherits included."""
    found: dict[str, str] = {}
    for cls in reversed(config.__mro__):
        if not dataclasses.is_dataclass(cls):
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
        body = typing.cast(ast.ClassDef, tree.body[0]).body
        for statement, below in itertools.pairwise(body):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                found.pop(statement.target.id, None)
                if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                    found[statement.target.id] = str(below.value.value)
    return found


def dataclass_in(hint: Any) -> type | None:
    """The dataclass of a field's type: itself, or what an Optional, a list or a dict of it holds."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return hint
    inner = (dataclass_in(one) for one in typing.get_args(hint))
    return next((one for one in inner if one is not None), None)


def type_name(hint: Any) -> str:
    """A type, as a person would write it."""
    if hint is type(None):
        return "null"
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return "section"
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return ", ".join(f"`{one}`" for one in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(one) for one in arguments)
    if origin is not None:
        inner = ", ".join("..." if one is ... else type_name(one) for one in arguments)
        return f"{origin.__name__}[{inner}]"
    return "any" if hint is Any else str(hint.__name__)


def default_of(field: dataclasses.Field[Any]) -> str:
    """A field's default as YAML would have it; empty: none, or a section's own."""
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
        if dataclasses.is_dataclass(default):
            return ""
    if default is dataclasses.MISSING or default == "???":
        return "(to be given)"
    if default is None or isinstance(default, bool):
        return {None: "`null`", True: "`true`", False: "`false`"}[default]
    return f"`{list(default) if isinstance(default, tuple) else default}`"


def cell(text: str) -> str:
    """Text within a table's cell."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    main()
