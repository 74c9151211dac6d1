"""The type of a field decides how its text is read, on the command line and in files."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from pretrain.config import ConfigError, load_config, load_typed
from pretrain.evaluation.settings import typed_settings
from pretrain.yaml_values import parse_override, parse_yaml, plain_values, set_value

NAMES = (
    "0010",
    "1e5",
    "67217e15",
    "12:30:45",
    "off",
    "1_000",
    "2026-11-29",
    "null_",
    "0x1f",
    "#1",
    "a: b",
    "010.",
    "true",
)


@dataclasses.dataclass
class Inner:
    rates: tuple[float, ...] = (0.1,)
    names: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Settings:
    name: str = "x"
    where: str | None = None
    count: int = 1
    most: int | None = None
    share: float | None = None
    on: bool = False
    kind: Literal["auto", "off", "on"] = "auto"
    inner: Inner = dataclasses.field(default_factory=Inner)
    free: dict[str, Any] = dataclasses.field(default_factory=dict)
    weights: dict[str, float] = dataclasses.field(default_factory=dict)


def read(tmp_path: Path, text: str = "{}", *overrides: str) -> Settings:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return load_typed(Settings, path, overrides)


@pytest.mark.parametrize("text", NAMES)
def test_a_text_stays_itself(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, "{}", f"name={text}", f"where={text}").name == text
    assert read(tmp_path, "{}", f"where={text}").where == text
    if "#" not in text and ": " not in text:
        assert read(tmp_path, f"name: {text}\ninner: {{names: [{text}]}}").inner.names == [text]
    assert read(tmp_path, f"name: '{text}'").name == text
    assert read(tmp_path, "{}", f"inner.names=['{text}']").inner.names == [text]


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("count=0010", 10),
        ("count=1_000", 1000),
        ("count=-3", -3),
        ("most=null", None),
        ("most=7", 7),
        ("share=1e-5", 1e-5),
        ("share=.5", 0.5),
        ("share=3", 3.0),
        ("share=", None),
        ("share=.inf", math.inf),
        ("on=off", False),
        ("on=yes", True),
        ("on=True", True),
        ("kind=off", "off"),
        ("kind=on", "on"),
        ("where=null", None),
        ("where='null'", "null"),
        ("where=None", "None"),
        ("name=null", "null"),
    ],
)
def test_the_field_decides(tmp_path: Path, override: str, value: object) -> None:
    found = getattr(read(tmp_path, "{}", override), override.partition("=")[0])
    assert found == value
    assert type(found) is type(value)


def test_in_lists_and_mappings_too(tmp_path: Path) -> None:
    found = read(
        tmp_path, "inner: {rates: [1e-4, 2], names: [0010, off]}\nweights: {a: 1e-3, 010: 2}", "inner.rates[1]=.5"
    )
    assert list(found.inner.rates) == [1e-4, 0.5]
    assert found.inner.names == ["0010", "off"]
    assert found.weights == {"a": 1e-3, "010": 2.0}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("count=1.5", "key 'count' is '1.5'; expected an integer"),
        ("count=off", "key 'count' is 'off'; expected an integer"),
        ("count=", "key 'count' is ''; expected an integer"),
        ("most=many", "key 'most' is 'many'; expected an integer or null"),
        ("share=12:30", "key 'share' is '12:30'; expected a number or null"),
        ("on=maybe", "key 'on' is 'maybe'; expected true or false"),
        ("kind=maybe", "key 'kind' is 'maybe'; expected one of auto, off, on"),
        ("inner=x", "key 'inner' is 'x'; expected a mapping"),
        ("inner.rates=3", r"key 'inner.rates' is '3'; expected a list, such as \[1, 2\]"),
        ("inner.rates=[1, x]", r"key 'inner.rates\[1\]' is 'x'; expected a number"),
        ("inner.rates=[1,", "override 'inner.rates=\\[1,': while parsing"),
        ("inner.names[3]=x", "inner.names.*3 is no place of a list"),
    ],
)
def test_a_wrong_type_is_named(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        read(tmp_path, "inner: {names: [a]}", override)
    if "[" not in override and override != "count=":
        key, _, text = override.rpartition("=")
        nested = "{" * key.count(".") + key.replace(".", ": {") + f": {text}" + "}" * 2 * key.count(".")
        with pytest.raises(ConfigError, match=r"c.yaml: key"):
            read(tmp_path, nested.replace("{inner", "inner").replace("}}", "}"))


def test_keys_given_twice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found the key 'count' twice"):
        read(tmp_path, "count: 1\ncount: 2\n")


def test_anchors_and_merges(tmp_path: Path) -> None:
    found = read(tmp_path, "free: {a: &a {x: 1, y: 2}, b: {<<: *a, y: 3}}")
    assert found.free["b"] == {"x": 1, "y": 3}


def test_what_has_no_type_keeps_what_would_be_lost() -> None:
    parsed = parse_yaml("{a: 10, b: 0010, c: 1.5, d: 1.50, e: true, f: off, g: null, h: '7', i: [x, 2]}")
    kept = {"a": 10, "b": "0010", "c": 1.5, "d": "1.50", "e": True, "f": "off", "g": None, "h": "7", "i": ["x", 2]}
    assert plain_values(parsed) == kept
    assert plain_values(parsed, lossless=False) == kept | {"b": 10, "d": 1.5}
    typed = typed_settings(Settings, {"name": "0010", "share": "1.50", "on": "off", "count": 3}, "here")
    assert (typed.name, typed.share, typed.on, typed.count) == ("0010", 1.5, False, 3)


def test_overrides_reach_into_what_is_there() -> None:
    content: dict[str, Any] = {"a": {"b": [1, {"c": 2}]}, "d": None}
    set_value(content, "a.b[1].c", 3)
    set_value(content, "d.e", 4)
    set_value(content, "a", {"f": 5})
    assert content == {"a": {"b": [1, {"c": 3}], "f": 5}, "d": {"e": 4}}
    with pytest.raises(yaml.YAMLError):
        parse_override("[1")


def test_runs_keep_their_names(tmp_path: Path) -> None:
    config = load_config(
        Path(__file__).parents[2] / "configs" / "demo" / "digits.yaml",
        ["name=0010", "output_dir=1e5", "tracking.experiment=12:30:45", "data.train=off", "parallel.compile=off"],
    )
    assert (config.name, config.output_dir, config.tracking.experiment) == ("0010", "1e5", "12:30:45")
    assert (config.data.train, config.parallel.compile) == ("off", "off")
    saved = tmp_path / "saved.yaml"
    saved.write_text(config.to_yaml())
    assert load_config(saved) == config
