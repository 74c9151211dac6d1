"""The range of a number in a configuration, declared with its field.

Enters: `field: int = bounded(1, least=0)`. Leaves: the same dataclass field, and `check_bounds`, which refuses a
configuration whose numbers are outside, by the key's name.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_KEY = "bounds"


@dataclass(frozen=True)
class Bounds:
    """Which numbers a field takes; of a tuple or list, each of its values."""

    least: float | None = None
    """The smallest."""
    above: float | None = None
    """All are larger than this."""
    most: float | None = None
    """The largest."""
    below: float | None = None
    """All are smaller than this."""

    def allow(self, value: float) -> bool:
        """Whether the field takes this number. What is not finite is no number."""
        return (
            math.isfinite(value)
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        low = (f"at least {self.least:g}" if self.least is not None else "") or (
            f"more than {self.above:g}" if self.above is not None else ""
        )
        high = (f"at most {self.most:g}" if self.most is not None else "") or (
            f"less than {self.below:g}" if self.below is not None else ""
        )
        return " and ".join(part for part in (low, high) if part) or "a finite number"


def bounded(
    default: Any = dataclasses.MISSING,
    *,
    factory: Callable[[], Any] | None = None,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field for a number, or for several, with its range.

    Args:
        default: the field's default.
        factory: makes the default, in place of `default`.
        least: see `Bounds`.
        above: see `Bounds`.
        most: see `Bounds`.
        below: see `Bounds`.
    """
    metadata = {_KEY: Bounds(least, above, most, below)}
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def bounds_of(field: dataclasses.Field[Any]) -> Bounds | None:
    """The range that a field was declared with; None: it has none."""
    found: Bounds | None = field.metadata.get(_KEY)
    return found


def check_bounds(config: Any, key: str = "") -> None:
    """Looks at all numbers of a configuration, and of those in it.

    Args:
        config: an instance of a dataclass.
        key: where it lies in the whole, for messages.

    Raises:
        ValueError: a number is outside of its field's range.
    """
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), _join(key, field.name)
        _check_value(field, value, name)
        for place, inner in _configs(value, name):
            check_bounds(inner, place)


def check_given(schema: Any, given: Mapping[str, Any], key: str = "") -> None:
    """`check_bounds` of what is about to become a configuration; what does not fit the schema is left to others.

    Args:
        schema: the dataclass.
        given: its fields' values, nested as they are.
        key: where they lie in the whole, for messages.

    Raises:
        ValueError: a number is outside of its field's range.
    """
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        if field.name not in given:
            continue
        value, name = given[field.name], _join(key, field.name)
        _check_value(field, value, name)
        inner = next((kind for kind in _dataclasses(hints[field.name])), None)
        for place, values in _mappings(value, name) if inner is not None else ():
            check_given(inner, values, place)


def _check_value(field: dataclasses.Field[Any], value: Any, name: str) -> None:
    bounds = bounds_of(field)
    for place, entry in _numbers(value, name) if bounds is not None else ():
        if bounds is not None and not bounds.allow(entry):
            raise ValueError(f"{place} is {entry}; expected {bounds}")


def _join(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)


def _dataclasses(hint: Any) -> Iterator[Any]:
    """The dataclasses that a type is made of."""
    if dataclasses.is_dataclass(hint):
        yield hint
    for inner in typing.get_args(hint):
        yield from _dataclasses(inner)


def _mappings(value: Any, name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What may be a dataclass's values: a mapping, those in a list, and those in a mapping of them."""
    if isinstance(value, Mapping):
        yield name, value
        for key, entry in value.items():
            if isinstance(entry, Mapping):
                yield f"{name}.{key}", entry
    elif isinstance(value, (list, tuple)):
        for n, entry in enumerate(value):
            yield from _mappings(entry, f"{name}[{n}]")


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, (list, tuple)):
        for n, entry in enumerate(value):
            yield from _numbers(entry, f"{name}[{n}]")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield name, value


def _configs(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield name, value
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from _configs(entry, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for n, entry in enumerate(value):
            yield from _configs(entry, f"{name}[{n}]")
