"""The tasks of a suite: each names a protocol, and settings that become an instance of the protocol's dataclass."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pretrain.config import nearest

T = TypeVar("T")
"""A dataclass of settings."""


def task_settings(
    task: str, protocol: str, settings: Mapping[str, Any], schemas: Mapping[str, type[Any]], kind: str = "protocols"
) -> Any:
    """The settings of one task, checked.

    Args:
        task: its name in the suite.
        protocol: what the suite names as its protocol.
        settings: what the suite sets; other fields keep their defaults.
        schemas: name of a protocol -> dataclass of its settings.
        kind: what a message calls the protocols.

    Returns:
        An instance of the protocol's dataclass.

    Raises:
        ValueError: an unknown protocol or key (the message has the nearest known one), or a value of another type.
    """
    if protocol not in schemas:
        raise ValueError(
            f"tasks.{task}.protocol is {protocol!r}; known {kind}: {', '.join(schemas)}"
            + nearest(protocol, list(schemas))
        )
    return typed_settings(schemas[protocol], settings, f"tasks.{task}.settings")


def typed_settings(schema: type[T], settings: Mapping[str, Any], where: str) -> T:
    """`settings` as an instance of the dataclass `schema`.

    Args:
        schema: a dataclass.
        settings: values of its fields; fields that are missing keep their defaults.
        where: the settings' place in the suite, for messages.

    Raises:
        ValueError: an unknown key (the message has the nearest known one) or a value of another type.
    """
    known = [entry.name for entry in dataclasses.fields(schema)]  # type: ignore[arg-type]
    for key in settings:
        if key not in known:
            raise ValueError(f"unknown key {where}.{key}{nearest(str(key), known)}; known keys: {', '.join(known)}")
    try:
        typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), dict(settings)))
    except OmegaConfBaseException as error:
        raise ValueError(f"{where}: {str(error).splitlines()[0]}") from error
    assert isinstance(typed, schema)
    return typed
