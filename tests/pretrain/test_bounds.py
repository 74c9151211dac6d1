"""Every number of a configuration has a range, declared with its field, and nonsense is refused by the key's name."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipes.bounds import Bounds, bounded, bounds_of, check_bounds
from pretrain.config import ConfigError, RunConfig, load_config, load_typed
from pretrain.evaluation.encoder import protocols as encoder_protocols
from pretrain.evaluation.encoder.suite import SuiteConfig
from pretrain.evaluation.settings import typed_settings
from pretrain.evaluation.tokenizer import protocols as tokenizer_protocols
from pretrain.evaluation.tokenizer.suite import TokenizerSuiteConfig
from pretrain.objectives.table import OBJECTIVES
from pretrain.parallel.launch import Launch
from pretrain.preflight import check
from tests.pretrain.runs import CONFIG, overrides_of

PROTOCOLS = {**encoder_protocols.PROTOCOLS, **tokenizer_protocols.PROTOCOLS}
SCHEMAS = {
    "run": RunConfig,
    **{f"objective {name}": config for name, (config, _) in OBJECTIVES.items()},
    "suite": SuiteConfig,
    "tokenizer suite": TokenizerSuiteConfig,
    **{f"protocol {name}": protocol.config for name, protocol in PROTOCOLS.items()},
}


def arms(hint: Any) -> Iterator[Any]:
    """A type, those that it is a union of, and those in it."""
    yield hint
    for inner in typing.get_args(hint):
        if not isinstance(inner, str) and inner is not Ellipsis:
            yield from arms(inner)


def fields_of(schema: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Each field of a dataclass and of those in it, by its key."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        key = f"{prefix}.{field.name}" if prefix else field.name
        yield key, field, hints[field.name]
        for inner in arms(hints[field.name]):
            if dataclasses.is_dataclass(inner) and typing.get_origin(hints[field.name]) is not list:
                yield from fields_of(typing.cast(type, inner), key)


def is_number(hint: Any) -> bool:
    return any(arm in (int, float) for arm in arms(hint)) and typing.get_origin(hint) is not dict


NUMBERS = [
    (name, key, field, hint) for name, s in SCHEMAS.items() for key, field, hint in fields_of(s) if is_number(hint)
]


def test_every_number_has_a_range() -> None:
    assert [f"{name}: {key}" for name, key, field, _ in NUMBERS if bounds_of(field) is None] == []
    assert len(NUMBERS) > 250


def test_defaults_are_within() -> None:
    for name, key, field, _ in NUMBERS:
        bounds, values = bounds_of(field), field.default
        assert bounds is not None
        for value in values if isinstance(values, tuple) else (values,):
            if isinstance(value, (int, float)):
                assert bounds.allow(value), f"{name}: {key}"


def nonsense(bounds: Bounds, hint: Any) -> Iterator[float]:
    """Numbers outside of a range."""
    if float in arms(hint):
        yield from (math.nan, math.inf)
    low = bounds.least if bounds.least is not None else bounds.above
    high = bounds.most if bounds.most is not None else bounds.below
    if low is not None:
        yield from (low - 1, -12345)
    if bounds.above is not None:
        yield bounds.above
    if high is not None and high < 2**40:
        yield from (high + 1, 12345)


def filled(hint: Any, value: float) -> Any:
    """The number as a field of this type has it: alone, or in each place of a list."""
    value = value if float in arms(hint) or not math.isfinite(value) else int(value)
    for arm in arms(hint):
        if typing.get_origin(arm) in (tuple, list):
            count = len([kind for kind in typing.get_args(arm) if kind is not Ellipsis])
            return [value] * (count if Ellipsis not in typing.get_args(arm) else 3)
    return value


@pytest.mark.parametrize(
    ("name", "key", "field", "hint"), NUMBERS, ids=[f"{name}-{key}" for name, key, _, _ in NUMBERS]
)
def test_nonsense_is_refused_by_its_name(name: str, key: str, field: dataclasses.Field[Any], hint: Any) -> None:
    bounds = bounds_of(field)
    assert bounds is not None
    for number in nonsense(bounds, hint):
        value = filled(hint, number)
        with pytest.raises(ValueError) as caught:  # noqa: PT011  (which message is asserted below)
            given(name, key, value)
        assert key.rpartition(".")[2] in str(caught.value), (value, str(caught.value))


def given(name: str, key: str, value: Any) -> object:
    """Reads a configuration that has `value` at `key`."""
    kind, _, which = name.partition(" ")
    if kind == "protocol":
        return typed_settings(PROTOCOLS[which].config, nested(key, value), "tasks.x.settings")
    if name in ("suite", "tokenizer suite"):
        return load_typed(SCHEMAS[name], {}, {key.replace("tasks.", "tasks.one."): value})
    content: dict[str, Any] = {
        "name": "x",
        "train": {"global_batch": 8, "steps": 2},
        "objective": {"name": "image_mae"},
    }
    if kind == "objective":
        content["objective"] = {"name": which}
        return load_config(content, {f"objective.{key}": value})
    if key == "optim.lr":
        content["optim"] = {"base_lr": None}
    return load_config(content, {key: value})


def nested(key: str, value: Any) -> dict[str, Any]:
    first, _, rest = key.partition(".")
    return {first: nested(rest, value) if rest else value}


def test_a_player_of_its_own_is_looked_at_too() -> None:
    overrides = ["objective.name=tokenizer", "optim.players.discriminator.lr=-1"]
    with pytest.raises(ConfigError, match=r"optim.players.discriminator.lr is -1; expected at least 0"):
        load_config({"name": "x", "train": {"global_batch": 8, "steps": 2}, "objective": {}}, overrides)
    config = load_config(
        {"name": "x", "train": {"global_batch": 8, "steps": 2}, "objective": {}},
        [*overrides[:1], "optim.players.discriminator={lr: 1e-4, betas: [0.5, 0.9]}"],
    )
    assert (config.optim.of("discriminator").lr, config.optim.of("discriminator").betas) == (1e-4, (0.5, 0.9))


@pytest.mark.parametrize("warmup", ["optim.warmup_steps=7", "optim.warmup_epochs=1"])
def test_a_warm_up_longer_than_the_run_is_refused(tiny_dataset: Path, tmp_path: Path, warmup: str) -> None:
    overrides = overrides_of(tiny_dataset, tmp_path, "run", "train.steps=6", warmup)
    with pytest.raises(ConfigError, match=r"optim.warmup_steps=\d and optim.warmup_epochs=\d make a warm-up of"):
        check(load_config(CONFIG, overrides), Launch())
    check(load_config(CONFIG, [*overrides, "train.steps=8"]), Launch())


def test_messages_say_what_was_expected() -> None:
    @dataclasses.dataclass
    class Inner:
        share: tuple[float, ...] = bounded((0.5,), least=0, below=1)

    @dataclasses.dataclass
    class Outer:
        inner: list[Inner] = dataclasses.field(default_factory=list)
        on: bool = bounded(True, least=5)  # True is no number

    check_bounds(Outer([Inner((0.0, 0.99))]))
    with pytest.raises(ValueError, match=r"x.inner\[1\].share\[1\] is 1.0; expected at least 0 and less than 1"):
        check_bounds(Outer([Inner(), Inner((0.1, 1.0))]), "x")
    assert str(Bounds()) == "a finite number"
    assert not Bounds().allow(math.nan)
