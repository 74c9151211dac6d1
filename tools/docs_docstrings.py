"""Docstrings as the site's tools expect them, where the sources write them more briefly.

An extension of griffe, which reads the sources for the reference. Brackets are shapes and placeholders here, and no
Markdown: `in [-1, 1] [B, C, H, W]` would be a link, and `<run>/config.yaml` an HTML tag that a browser swallows, so a
zero-width space goes where Markdown would see either (what stands in backticks is left alone). Arguments that share a
line in `Args:` (`train, test: data set folders.`) get one each. What griffe then warns of is a mistake in a docstring.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_CODE_OR_BRACKETS = re.compile(r"(?P<code>`+[^`]*`+)|\](?= ?\[)|<(?=[A-Za-z/])")
_SHARED = re.compile(r"^( +)(\w+(?:, \w+)+): (.*(?:\n\1 +.*)*)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Called for every module, class, function and attribute that griffe has read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrites the docstring, before it is parsed."""
        if obj.docstring is not None:
            text = plain_brackets(obj.docstring.value)
            if isinstance(obj, griffe.Function):
                text = one_argument_each(text, {parameter.name for parameter in obj.parameters})
            obj.docstring.value = text


def plain_brackets(text: str) -> str:
    """Keeps Markdown from reading brackets outside of code."""
    return _CODE_OR_BRACKETS.sub(lambda found: found[0] if found["code"] else f"{found[0]}\u200b", text)


def one_argument_each(text: str, parameters: set[str]) -> str:
    """`a, b: what` becomes `a: what` and `b: what`, where a and b are parameters."""

    def split(found: re.Match[str]) -> str:
        names = found[2].split(", ")
        if not parameters.issuperset(names):
            return found[0]
        return "\n".join(f"{found[1]}{name}: {found[3]}" for name in names)

    return _SHARED.sub(split, text)
