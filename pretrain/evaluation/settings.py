"""The tasks of a suite: each names a protocol, and settings that become an instance of the protocol's dataclass."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_pipes.bounds import check_bounds
from pretrain.config import nearest
from pretrain.extensions import PROTOCOLS_GROUP, extension_names, find_extension

T = TypeVar("T")
"""A dataclass of settings."""
P = TypeVar("P")
"""A kind of protocol."""


def named_protocol(task: str, protocol: str, table: Mapping[str, P], kind: type[P], kinds: str = "protocols") -> P:
    """The protocol that a task names: one of the table, or somebody's own.

    Args:
        task: its name in the suite.
        protocol: a key of the table, an entry point of `tessera.protocols`, or an import path.
        table: the protocols of this package.
        kind: class of the table's entries, and of what an import path must lead to.
        kinds: what a message calls the protocols.

    Raises:
        ValueError: there is none of this name (the message has the nearest known one), or it is something else.
    """
    if protocol in table:
        return table[protocol]
    where = f"tasks.{task}.protocol"
    found = find_extension(protocol, PROTOCOLS_GROUP, where)
    if found is None:
        known = [*table, *extension_names(PROTOCOLS_GROUP)]
        raise ValueError(
            f"{where} is {protocol!r}; known {kinds}: {', '.join(known)}{nearest(protocol, known)}, or an import path "
            "such as my_package.my_module:PROTOCOL"
        )
    if not isinstance(found, kind):
        raise ValueError(
            f"{where} is {protocol!r}, which is a {type(found).__name__}; {kinds} are instances of "
            f"{kind.__module__}.{kind.__name__}"
        )
    return found


def typed_settings(schema: type[T], settings: Mapping[str, Any], where: str) -> T:
    """`settings` as an instance of the dataclass `schema`.

    Args:
        schema: a dataclass.
        settings: values of its fields; fields that are missing keep their defaults.
        where: the settings' place in the suite, for messages.

    Raises:
        ValueError: an unknown key (the message has the nearest known one) or a value of another type.
    """
    if not dataclasses.is_dataclass(schema):
        raise ValueError(f"{where}: the protocol's config is {schema!r}; expected a dataclass")
    known = [entry.name for entry in dataclasses.fields(schema)]
    for key in settings:
        if key not in known:
            raise ValueError(f"unknown key {where}.{key}{nearest(str(key), known)}; known keys: {', '.join(known)}")
    try:
        typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), dict(settings)))
    except OmegaConfBaseException as error:
        raise ValueError(f"{where}: {str(error).splitlines()[0]}") from error
    assert isinstance(typed, schema)
    check_bounds(typed, where)
    return typed
