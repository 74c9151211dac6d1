"""Run configuration: YAML plus dotted overrides in, one frozen `RunConfig` of typed dataclasses out.

Each part's dataclass lives beside the code that reads it; this module composes them, and turns a mistake into an error
that names the key, the file and the nearest known key, before anything expensive starts.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from data_pipes.bounds import bounded, check_bounds, check_given
from data_pipes.config import DataConfig
from pretrain.checkpoint.config import CheckpointConfig
from pretrain.checkpoint.folder import Folder
from pretrain.extensions import ExtensionError
from pretrain.guard.guard import GuardConfig
from pretrain.objectives.named import find_objective, known_objectives
from pretrain.optim_config import OptimConfig
from pretrain.parallel.config import ParallelConfig
from pretrain.recipes import find_recipe, no_such_recipe
from pretrain.tracking.tracker import TrackingConfig
from pretrain.watchdog.config import WatchdogConfig
from pretrain.yaml_values import ValueTextError, copied, parse_override, parse_yaml, set_value, typed_values

if TYPE_CHECKING:
    from pretrain.objectives.base import Objective

T = TypeVar("T")
Given = Mapping[str, Any]
"""A configuration's content, as a YAML file would hold it."""
Overrides = Sequence[str] | Mapping[str, Any]
"""Changes to a configuration: `key.path=value` each, or values by `key.path`."""


class ConfigError(ValueError):
    """A configuration that cannot be run; the message says what was found, what was expected and what to do."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long to train and how often to look. The loop in `pretrain/train.py` reads it."""

    global_batch: int = bounded(MISSING, least=1)
    """Samples per optimizer step, over all ranks and micro-batches."""
    micro_batch: int | None = bounded(None, least=1)
    """Samples per rank and forward pass; null = global_batch / world size. The rest is gradient accumulation."""
    epochs: float | None = bounded(None, above=0)
    """Passes over the training samples. Give this or `steps`."""
    steps: int | None = bounded(None, least=1)
    """Optimizer steps at this `global_batch`. Give this or `epochs`."""
    log_every: int = bounded(10, least=1)
    """Steps between points in the journal; a point is the mean over those steps."""
    val_every: int | None = bounded(None, least=1)
    """Steps between validations; null = at every checkpoint and at the end."""
    val_samples: int = bounded(1024, least=0)
    """Validation samples per validation, from the start of `data.val`; 0 = all."""
    num_pictures: int = bounded(8, least=0)
    """Validation samples shown as input, masked, prediction and oracle view."""
    gc_every: int = bounded(500, least=0)
    """Steps between Python's garbage collections, the same on all ranks; 0 = whenever Python likes."""

    def __post_init__(self) -> None:
        for name, least in (("log_every", 1), ("gc_every", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"train.{name} is {getattr(self, name)}; it must be at least {least}")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One complete run."""

    name: str = MISSING
    """The run's name; its folder is `<output_dir>/<name>`."""
    output_dir: str = "runs"
    """Folder of all runs."""
    seed: int = bounded(0, least=0, most=2**53)
    """Seeds weights, data order, augmentation and masks."""
    device: str = "auto"
    """auto, cpu or cuda."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    objective: Any = None
    """`name` selects the class: one of `pretrain/objectives/table.py`, an entry point, or an import path; the other
    keys are that class's own."""
    objective_name: str = dataclasses.field(default="", metadata={"omegaconf_ignore": True})
    """The YAML's `objective.name`; no key of its own."""
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    guard: GuardConfig = dataclasses.field(default_factory=GuardConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = dataclasses.field(default_factory=TrackingConfig)
    watchdog: WatchdogConfig = dataclasses.field(default_factory=WatchdogConfig)

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir) / self.name

    @property
    def init_from(self) -> str | None:
        """The weights to start from, where the objective has this key."""
        where: str | None = getattr(self.objective, "init_from", None)
        return where

    def build_objective(self) -> Objective:
        """The objective on the current default device; `objective.start` gives it its first weights."""
        return find_objective(self.objective_name)[1](self.objective, self.seed)

    def as_dict(self) -> dict[str, Any]:
        """Plain containers, with `objective.name` put back; what `load_config` reads."""
        plain: dict[str, Any] = _plain(dataclasses.asdict(self))
        plain["objective"] = {"name": plain.pop("objective_name"), **plain["objective"]}
        return plain

    def to_yaml(self) -> str:
        """What `load_config` reads, as text."""
        return OmegaConf.to_yaml(OmegaConf.create(self.as_dict()))

    def digest(self) -> str:
        """sha256 of the resolved configuration, in hex."""
        return hashlib.sha256(self.to_yaml().encode()).hexdigest()


def load_config(path: Path | str | Given, overrides: Overrides = ()) -> RunConfig:
    """Reads a run's YAML file and applies `key.path=value` overrides.

    Args:
        path: the file, or its content.
        overrides: `key.path=value` each, or values by `key.path`.

    Raises:
        ConfigError: an unknown key (the message has the nearest known one), a value of another type, a missing one.
    """
    given = _read(path, overrides)
    if not isinstance(path, Mapping):
        path = Path(path)
        if path.name == "config.yaml" and (path.parent / "run.json").is_file():
            _name_after_folder(given, path.parent, overrides)
    return _run_config(given, _place(path))


def _name_after_folder(given: dict[str, Any], folder: Path, overrides: Overrides) -> None:
    """A run's own config.yaml means the run that it lies with, also when that folder was moved or copied."""
    keys = overrides if isinstance(overrides, Mapping) else [override.split("=")[0] for override in overrides]
    if not {"name", "output_dir"} & set(keys):
        given |= {"name": folder.resolve().name, "output_dir": str(folder.parent)}


def load_run_config(folder: Folder) -> RunConfig:
    """The resolved configuration that lies in a run's or a checkpoint's folder.

    Raises:
        ConfigError: there is none, or it is not valid here.
    """
    where = f"{folder}/config.yaml"
    try:
        content = folder.read("config.yaml")
    except FileNotFoundError as error:
        raise ConfigError(f"no configuration file at {where}: that is no folder of a run or a checkpoint") from error
    return _run_config(_parse_yaml(content, where), where, apart_from=_whole_run(folder))


def read_saved_config(text: str, where: Path | str) -> RunConfig:
    """A run's resolved configuration as an earlier version may have saved it: what it lacks has its default.

    Args:
        text: the YAML.
        where: its file, for messages.

    Raises:
        ConfigError: it has keys or values that this version does not know.
    """
    try:
        return _run_config(_parse_yaml(text.encode(), where), where)
    except ConfigError as error:
        raise ConfigError(
            f"{error}. The run was begun by another version of Tessera (run.json: environment); continue it with that "
            "one, or choose another name"
        ) from error


def _whole_run(folder: Folder) -> Path | None:
    """What came together with a run's or a checkpoint's folder on this machine: the whole run."""
    path = folder.local_path
    if path is None or not path.name.startswith("step-"):
        return path
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent


def _run_config(given: dict[str, Any], path: Path | str, apart_from: Path | None = None) -> RunConfig:
    """The run that a YAML describes; no objective's code from within the folder `apart_from` is run."""
    settings = given.get("objective")
    name = str(settings.get("name")) if isinstance(settings, Mapping) else "None"
    try:
        config_class = find_objective(name, apart_from=apart_from)[0]
        objective = OmegaConf.structured(config_class)
    except KeyError as error:
        known = known_objectives()
        raise ConfigError(
            f"{path}: objective.name is {name!r}; known objectives: {', '.join(known)}{nearest(name, known)}, or "
            "an import path such as my_package.my_module:MyObjective"
        ) from error
    except ExtensionError as error:
        raise ConfigError(f"{path}: {error}") from error
    except OmegaConfBaseException as error:  # a type that no YAML can give
        raise ConfigError(f"{path}: objective.name is {name!r}, whose config_class cannot be read: {error}") from error
    assert isinstance(settings, Mapping)
    own = {key: value for key, value in settings.items() if key != "name"}
    own = _typed(own, config_class, "objective", path)
    _check_given(config_class, own, "objective", path)
    given = {**given, "objective": own}
    order = given.get("data", {}).get("order") if isinstance(given.get("data"), Mapping) else None
    if not isinstance(order, Mapping) or order.get("seed") is None:
        set_value(given, "data.order.seed", "${seed}")  # one seed for everything, unless the data's is given
    schema = OmegaConf.structured(RunConfig)
    OmegaConf.set_readonly(schema, False)
    schema.objective = objective
    return dataclasses.replace(_merge_typed(RunConfig, schema, given, path), objective_name=name)


def load_typed(schema: type[T], path: Path | str | Given, overrides: Overrides = ()) -> T:
    """Reads a YAML file into the dataclass `schema` and applies `key.path=value` overrides; arguments as `load_config`.

    Raises:
        ConfigError: as `load_config`.
    """
    given = _read(path, overrides)
    return _merge_typed(schema, OmegaConf.structured(schema), given, _place(path))


def _read(path: Path | str | Given, overrides: Overrides) -> dict[str, Any]:
    content = copied(path if isinstance(path, Mapping) else _read_yaml(Path(path)))
    assert isinstance(content, dict)
    _apply(overrides, content)
    return content


def _place(path: Path | str | Given) -> Path | str:
    """Where a configuration is from, for messages."""
    return "the configuration" if isinstance(path, Mapping) else Path(path)


def _read_yaml(path: Path) -> dict[str, Any]:
    path = find_recipe(path)
    if not path.is_file():
        raise ConfigError(no_such_recipe(path))
    return _parse_yaml(path.read_bytes(), path)


def _parse_yaml(content: bytes, path: Path | str) -> dict[str, Any]:
    try:
        loaded = parse_yaml(content.decode())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} holds {type(loaded).__name__}; expected a mapping of keys to values")
    return loaded


def _apply(overrides: Overrides, content: dict[str, Any]) -> None:
    """Puts overrides over a configuration's content, in place."""
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            set_value(content, str(key), value)
        return
    for override in overrides:
        key, _, text = override.partition("=")
        if not key or "=" not in override:
            raise ConfigError(f"override {override!r} has no key=value form; write for example train.steps=100")
        try:
            set_value(content, key, parse_override(text))
        except (yaml.YAMLError, ValueTextError) as error:
            raise ConfigError(f"override {override!r}: {' '.join(str(error).split())}") from error


def _check_given(schema: Any, given: Mapping[str, Any], key: str, path: Path | str) -> None:
    try:
        check_given(schema, given, key)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def _typed(given: Any, schema: Any, key: str, path: Path | str) -> Any:
    try:
        return typed_values(given, schema, key)
    except ValueTextError as error:
        raise ConfigError(f"{path}: {error}") from error


def _merge_typed(cls: type[T], schema: DictConfig, given: dict[str, Any], path: Path | str) -> T:
    try:
        typed = _typed(given, cls, "", path)
        _check_given(cls, typed, "", path)
        whole = OmegaConf.merge(schema, typed)
        missing = sorted(str(key) for key in OmegaConf.missing_keys(whole))
        if missing:
            raise ConfigError(f"{path}: required and not given: {', '.join(missing)}")
        result = OmegaConf.to_object(whole)
        check_bounds(result)
    except ConfigKeyError as error:
        full_key = str(getattr(error, "full_key", None) or getattr(error, "key", "?"))
        parent, _, key = full_key.rpartition(".")
        section = OmegaConf.select(schema, parent) if parent else schema
        known = [str(k) for k in section] if isinstance(section, DictConfig) else []
        raise ConfigError(
            f"{path}: unknown key {full_key!r}{nearest(key, known, parent)}; "
            f"known keys{' of ' + parent if parent else ''}: {', '.join(known)}"
        ) from error
    except ValidationError as error:
        found = str(error).splitlines()[0]
        raise ConfigError(f"{path}: key {getattr(error, 'full_key', '?')!r}: {found}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error}") from error
    except ValueError as error:  # of a dataclass that checks itself
        raise error if isinstance(error, ConfigError) else ConfigError(f"{path}: {error}") from error
    assert isinstance(result, cls)
    return result


def nearest(key: str, known: list[str], parent: str = "") -> str:
    """ " (did you mean ...?)" where a known key is close, else nothing."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    prefix = f"{parent}." if parent else ""
    return f" (did you mean {prefix}{close[0]}?)" if close else ""


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value
