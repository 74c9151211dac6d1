"""Texts of configurations to values, by the types of the fields that they are for.

Enters: YAML, or `key.path=value`. Leaves: plain containers that fit a dataclass. Why it exists: YAML 1.1 gives a text a
type before anybody knows which is wanted, so that `name=0010` becomes 8, `12:30:45` 45045 and `off` False. Here a text
without quotes stays a text until its field says what it is.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union

import yaml

_NULL = ("null", "Null", "NULL", "~", "")
_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_INTEGER = re.compile(r"[-+]?[0-9]+(_[0-9]+)*")
_FLOAT = re.compile(r"[-+]?([0-9]+(_[0-9]+)*\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.?inf|\.?nan", re.IGNORECASE)


class ValueTextError(ValueError):
    """A text that its field's type does not allow; the message names the key."""


class Plain(str):
    """A scalar without quotes: what it means depends on what it is for."""

    __slots__ = ()


class _Loader(yaml.SafeLoader):
    """YAML whose scalars keep their text."""

    yaml_implicit_resolvers: dict[str, Any] = {  # noqa: RUF012  (as PyYAML declares it)
        "<": [("tag:yaml.org,2002:merge", re.compile(r"<<"))],
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        "while reading a mapping", node.start_mark, f"found the key {key.value!r} twice", key.start_mark
                    )
                seen.add(key.value)
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


def _scalar(loader: _Loader, node: Any) -> str:
    text = loader.construct_scalar(node)
    return Plain(text) if node.style is None else text


_Loader.add_constructor("tag:yaml.org,2002:str", _scalar)


def parse_yaml(text: str) -> Any:
    """The containers that a YAML text describes; scalars are `Plain`, or str where they had quotes.

    Raises:
        yaml.YAMLError: it is not valid.
    """
    return yaml.load(text, _Loader)


def parse_override(text: str) -> Any:
    """The value of `key=value`: a list or mapping in YAML's brackets, a text in quotes, or the text as it is.

    Raises:
        yaml.YAMLError: brackets or quotes are not closed.
    """
    if text[:1] in ("[", "{") or (len(text) > 1 and text[0] in "'\"" and text[-1] == text[0]):
        return parse_yaml(text)
    return Plain(text)


def set_value(content: dict[str, Any], key: str, value: Any) -> None:
    """Puts a value at a dotted key, in place; mappings are merged, everything else is replaced.

    Args:
        content: nested containers.
        key: for example `optim.betas[0]` or `train.steps`.
        value: what to put there.

    Raises:
        ValueTextError: the key leads into a list at a place that it does not have.
    """
    *parents, last = re.sub(r"\[(\w+)\]", r".\1", key).split(".")
    where: Any = content
    for part in parents:
        if isinstance(where, list):
            where = where[_index(where, part, key)]
        else:
            if not isinstance(where.get(part), (dict, list)):
                where[part] = {}
            where = where[part]
    if isinstance(where, list):
        where[_index(where, last, key)] = value
    else:
        where[last] = merged(where.get(last), value)


def copied(value: Any) -> Any:
    """New containers with the same values; what YAML's anchors share is apart afterwards."""
    if isinstance(value, Mapping):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, list) else value


def merged(one: Any, other: Any) -> Any:
    """`other` over `one`: mappings are merged, everything else is replaced."""
    if not isinstance(one, Mapping) or not isinstance(other, Mapping):
        return other
    return {**one, **{key: merged(one.get(key), value) for key, value in other.items()}}


def _index(where: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(where):
        raise ValueTextError(f"{key}: {part} is no place of a list of {len(where)}")
    return int(part)


def plain_values(value: Any, *, lossless: bool = True) -> Any:
    """Containers whose texts have the types that YAML 1.2 gives them.

    Args:
        value: of `parse_yaml`.
        lossless: keep a text that its value would not give back (0010, 1e5), for whoever knows its type later.
    """
    if isinstance(value, Mapping):
        return {str(key): plain_values(item, lossless=lossless) for key, item in value.items()}
    if isinstance(value, list):
        return [plain_values(item, lossless=lossless) for item in value]
    if not isinstance(value, Plain):
        return value
    if value in _NULL:
        return None
    resolved: Any = str(value)
    if value in ("true", "false"):
        resolved = _BOOLEANS[value]
    elif _INTEGER.fullmatch(value):
        resolved = int(value)
    elif _FLOAT.fullmatch(value):
        resolved = _float(value)
    return str(value) if lossless and str(resolved).lower() != value else resolved


def _float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def typed_values(value: Any, hint: Any, key: str = "") -> Any:
    """`value` as its type wants it. What does not belong to the type is left for whoever checks the keys.

    Args:
        value: of `parse_yaml` or of Python.
        hint: a dataclass, or the type of a field.
        key: of the field, for messages.

    Raises:
        ValueTextError: a text that the type does not allow.
    """
    if isinstance(value, str) and "${" in value:  # a reference to another key
        return str(value)
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        hints = typing.get_type_hints(hint)
        return {str(name): typed_values(item, hints.get(name, Any), _join(key, name)) for name, item in value.items()}
    if origin in (Union, types.UnionType):
        return _one_of(value, typing.get_args(hint), key)
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        kind = (typing.get_args(hint) or (Any, Any))[1]
        return {str(name): typed_values(item, kind, _join(key, name)) for name, item in value.items()}
    if origin in (list, tuple, Sequence) and isinstance(value, list):
        return [typed_values(item, kind, f"{key}[{n}]") for n, (item, kind) in enumerate(_kinds(value, hint))]
    return _typed_text(value, hint, key) if isinstance(value, str) else plain_values(value)


def _kinds(values: list[Any], hint: Any) -> list[tuple[Any, Any]]:
    """Each value of a list with its type."""
    kinds = [kind for kind in typing.get_args(hint) if kind is not Ellipsis] or [Any]
    return [(value, kinds[min(n, len(kinds) - 1)]) for n, value in enumerate(values)]


def _one_of(value: Any, kinds: Sequence[Any], key: str) -> Any:
    """`value` as the first of several types that allows it; text comes last."""
    if value is None or (isinstance(value, Plain) and value in _NULL and types.NoneType in kinds):
        return None
    others = [kind for kind in kinds if kind is not types.NoneType]
    if not isinstance(value, str):
        fitting = [kind for kind in others if _is_container(kind) == isinstance(value, (Mapping, list))]
        return typed_values(value, fitting[0] if fitting else Any, key)
    refused = []
    for kind in sorted(others, key=lambda kind: kind is str):
        try:
            return typed_values(value, kind, key)
        except ValueTextError as error:
            refused.append(str(error))
    raise ValueTextError(refused[-1] + (" or null" if types.NoneType in kinds else ""))


def _is_container(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) or typing.get_origin(kind) in (dict, list, tuple, Mapping, Sequence)


def _typed_text(text: str, hint: Any, key: str) -> Any:
    lowered = text.lower()
    if hint is bool:
        if lowered not in _BOOLEANS:
            raise _wrong(key, text, "true or false")
        return _BOOLEANS[lowered]
    if hint is int:
        if not _INTEGER.fullmatch(text):
            raise _wrong(key, text, "an integer")
        return int(text)
    if hint is float:
        if not _FLOAT.fullmatch(text):
            raise _wrong(key, text, "a number")
        return _float(text)
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        for choice in choices:
            if str(choice) == text or (isinstance(choice, bool) and _BOOLEANS.get(lowered) is choice):
                return choice
        raise _wrong(key, text, f"one of {', '.join(_shown(choice) for choice in choices)}")
    if hint is str:
        return str(text)
    if typing.get_origin(hint) in (list, tuple, Sequence):
        raise _wrong(key, text, "a list, such as [1, 2]")
    if _is_container(hint):
        raise _wrong(key, text, "a mapping of keys to values")
    return plain_values(text)


def _shown(choice: object) -> str:
    return str(choice).lower() if isinstance(choice, bool) else str(choice)


def _wrong(key: str, text: str, expected: str) -> ValueTextError:
    return ValueTextError(f"key {key!r} is {str(text)!r}; expected {expected}")


def _join(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)
