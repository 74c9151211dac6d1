"""Run configuration: YAML plus dotted overrides in, one frozen `RunConfig` of typed dataclasses out.

Each part's dataclass lives beside the code that reads it; this module composes them, and turns a mistake into an error
that names the key, the file and the nearest known key, before anything expensive starts.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from data_pipes.config import DataConfig
from pretrain.checkpoint.config import CheckpointConfig
from pretrain.checkpoint.folder import Folder
from pretrain.guard.guard import GuardConfig
from pretrain.objectives.table import OBJECTIVES
from pretrain.optim_config import OptimConfig
from pretrain.parallel.config import ParallelConfig
from pretrain.tracking.tracker import TrackingConfig
from pretrain.watchdog.config import WatchdogConfig

if TYPE_CHECKING:
    from pretrain.objectives.base import Objective

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be run; the message says what was found, what was expected and what to do."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long to train and how often to look. The loop in `pretrain/train.py` reads it."""

    global_batch: int = MISSING
    """Samples per optimizer step, over all ranks and micro-batches."""
    micro_batch: int | None = None
    """Samples per rank and forward pass; null = global_batch / world size. The rest is gradient accumulation."""
    epochs: float | None = None
    """Passes over the training samples. Give this or `steps`."""
    steps: int | None = None
    """Optimizer steps at this `global_batch`. Give this or `epochs`."""
    log_every: int = 10
    """Steps between points in the journal; a point is the mean over those steps."""
    val_every: int | None = None
    """Steps between validations; null = at every checkpoint and at the end."""
    val_samples: int = 1024
    """Validation samples per validation, from the start of `data.val`; 0 = all."""
    num_pictures: int = 8
    """Validation samples shown as input, masked, prediction and oracle view."""
    gc_every: int = 500
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
    seed: int = 0
    """Seeds weights, data order, augmentation and masks."""
    device: str = "auto"
    """auto, cpu or cuda."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    objective: Any = None
    """`name` selects the class in `pretrain/objectives/table.py`; the other keys are that class's own."""
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
    def objective_name(self) -> str:
        for name, (config_class, _) in OBJECTIVES.items():
            if type(self.objective) is config_class:
                return name
        raise AssertionError(f"no objective has the configuration {type(self.objective).__name__}")

    def build_objective(self) -> Objective:
        """The objective on the current default device; `objective.start` gives it its first weights."""
        return OBJECTIVES[self.objective_name][1](self.objective, self.seed)

    def as_dict(self) -> dict[str, Any]:
        """Plain containers, with `objective.name` put back; what `load_config` reads."""
        plain: dict[str, Any] = _plain(dataclasses.asdict(self))
        plain["objective"] = {"name": self.objective_name, **plain["objective"]}
        return plain

    def to_yaml(self) -> str:
        """What `load_config` reads, as text."""
        return OmegaConf.to_yaml(OmegaConf.create(self.as_dict()))

    def digest(self) -> str:
        """sha256 of the resolved configuration, in hex."""
        return hashlib.sha256(self.to_yaml().encode()).hexdigest()


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run's YAML file and applies `key.path=value` overrides.

    Raises:
        ConfigError: an unknown key (the message has the nearest known one), a value of another type, a missing one.
    """
    path = Path(path)
    given = _read(path, overrides)
    if path.name == "config.yaml" and (path.parent / "run.json").is_file():
        _name_after_folder(given, path.parent, overrides)
    return _run_config(given, path)


def _name_after_folder(given: DictConfig, folder: Path, overrides: Sequence[str]) -> None:
    """A run's own config.yaml means the run that it lies with, also when that folder was moved or copied."""
    if not any(override.split("=")[0] in ("name", "output_dir") for override in overrides):
        OmegaConf.update(given, "name", folder.resolve().name)
        OmegaConf.update(given, "output_dir", str(folder.parent))


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
    return _run_config(_parse_yaml(content, where), where)


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


def _run_config(given: DictConfig, path: Path | str) -> RunConfig:
    name = OmegaConf.select(given, "objective.name")
    if name not in OBJECTIVES:
        raise ConfigError(
            f"{path}: objective.name is {name!r}; known objectives: {', '.join(OBJECTIVES)}"
            + nearest(str(name), list(OBJECTIVES))
        )
    del given.objective["name"]
    if OmegaConf.select(given, "data.order.seed") is None:
        OmegaConf.update(given, "data.order.seed", "${seed}")  # one seed for everything, unless the data's is given
    schema = OmegaConf.structured(RunConfig)
    OmegaConf.set_readonly(schema, False)
    schema.objective = OmegaConf.structured(OBJECTIVES[name][0])
    return _merge_typed(RunConfig, schema, given, path)


def load_typed(schema: type[T], path: Path | str, overrides: Sequence[str] = ()) -> T:
    """Reads a YAML file into the dataclass `schema` and applies `key.path=value` overrides.

    Raises:
        ConfigError: as `load_config`.
    """
    path = Path(path)
    given = _read(path, overrides)
    return _merge_typed(schema, OmegaConf.structured(schema), given, path)


def _read(path: Path, overrides: Sequence[str]) -> DictConfig:
    given = OmegaConf.merge(_read_yaml(path), _parse_overrides(overrides))
    assert isinstance(given, DictConfig)
    return given


def _read_yaml(path: Path) -> DictConfig:
    if not path.is_file():
        raise ConfigError(f"no configuration file at {path}; the shipped ones are under configs/")
    return _parse_yaml(path.read_bytes(), path)


def _parse_yaml(content: bytes, path: Path | str) -> DictConfig:
    try:
        loaded = OmegaConf.load(io.StringIO(content.decode()))
    except Exception as error:  # the YAML library has many error classes; each is the user's mistake in this file
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path} holds {type(loaded).__name__}; expected a mapping of keys to values")
    return loaded


def _parse_overrides(overrides: Sequence[str]) -> DictConfig:
    for override in overrides:
        if "=" not in override or override.startswith("="):
            raise ConfigError(f"override {override!r} has no key=value form; write for example train.steps=100")
    return OmegaConf.from_dotlist(list(overrides))


def _merge_typed(cls: type[T], schema: DictConfig, given: DictConfig, path: Path | str) -> T:
    try:
        merged = OmegaConf.merge(schema, given)
        missing = sorted(str(key) for key in OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(f"{path}: required and not given: {', '.join(missing)}")
        result = OmegaConf.to_object(merged)
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
