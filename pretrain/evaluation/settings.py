"""Settings of a task as an instance of their dataclass, with an error that names the nearest known key."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pretrain.config import nearest

T = TypeVar("T")


def typed_settings(schema: type[T], settings: Mapping[str, Any], where: str) -> T:
    """`settings` as an instance of the dataclass `schema`.

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
