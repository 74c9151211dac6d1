"""Checkpoints: `checkpoints/step-00001200/` holds DCP shards, the resolved config, the loop's state, and `COMPLETE`.

`COMPLETE` (step, time, run ids, size and sha256 of every file) is written last, after every rank's bytes are on disk:
a folder without it is torn. Torn ones are never loaded and never counted; a new save moves one out of the way under a
name that says so. Saving runs on a thread over a copy of the tensors, with a process group of its own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from pretrain.parallel.dist import World
from pretrain.safe_dcp import CheckpointError, read_into, read_tensors, tensor_shapes

if TYPE_CHECKING:
    from pretrain.config import RunConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep."""

    every_steps: int | None = None
    """Optimizer steps between saves; null = only at the end and on a signal."""
    keep_last: int = 2
    """Newest complete checkpoints that are kept; at least 2, so that one bad disk block does not end a run."""
    keep_every: int | None = None
    """Additionally keep each checkpoint whose step is a multiple of this; null = none."""
    resume: Literal["auto", "never"] = "auto"
    """auto = continue from the newest complete, verified checkpoint of this run's folder."""
    verify: bool = True
    """Check every file's sha256 before resuming; false = sizes only."""

    def __post_init__(self) -> None:
        if self.keep_last < 2:
            raise ValueError(f"checkpoint.keep_last is {self.keep_last}; it must be at least 2")
        for name in ("every_steps", "keep_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"checkpoint.{name} is {value}; it must be at least 1, or null")


class Checkpointer:
    """Saves in the background and finds what to resume from. Every rank makes one and calls it in the same order."""

    def __init__(self, run_dir: Path, config: CheckpointConfig, world: World) -> None:
        self.folder = run_dir / "checkpoints"
        self.config = config
        self.world = world
        self.blocked_s = 0.0
        """Seconds that the loop spent in `save` and `wait` since the last look; the reader resets it."""
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, Future[None]] | None = None
        self._trusted: set[int] = set()
        """Steps that this start saved or resumed from; a folder of another step that is in the way is set aside."""
        self._damaged: set[str] = set()
        """Names of folders that `find` passed over; they do not count as kept."""
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process saves without it

    def save(
        self, step: int, state: Mapping[str, Mapping[str, Tensor]], loop: dict[str, Any], config_yaml: str
    ) -> None:
        """Starts to save; returns when the tensors are copied. Waits first for a save that still runs.

        `loop` is the JSON-able state of the loop; its `run_uid`, `mlflow_run_id` and `position` are put in `COMPLETE`.
        """
        begin = time.perf_counter()
        self._join()
        target = self.folder / f"step-{step:08d}"
        if step not in self._trusted:
            # DCP's own staging leaves CPU tensors uncopied: the next step would change what is being written.
            staged = {f"{group}": {k: _copy(v) for k, v in tensors.items()} for group, tensors in state.items()}
            saving = self._executor.submit(self._write, target, staged, {**loop, "step": step}, config_yaml)
            self._pending = (step, saving)
            self._trusted.add(step)
        self.blocked_s += time.perf_counter() - begin

    def wait(self) -> None:
        """Waits for the running save, and raises what it raised."""
        begin = time.perf_counter()
        pending, self._pending = self._pending, None
        if pending is not None:
            step, saving = pending
            try:
                saving.result()
            except BaseException:
                self._trusted.discard(step)
                raise
        self.blocked_s += time.perf_counter() - begin

    def close(self) -> None:
        self._executor.shutdown(wait=True)

    def _join(self) -> None:
        """Waits for the running save; a failed one is reported loudly and training goes on."""
        try:
            self.wait()
        except Exception:
            logger.exception("A checkpoint was not saved; the run goes on, the last complete checkpoint is untouched")

    def _write(
        self, target: Path, staged: dict[str, dict[str, Tensor]], loop: dict[str, Any], config_yaml: str
    ) -> None:
        """On the checkpoint thread: shards by every rank, then the rest and COMPLETE by rank 0, then retention."""
        group = self.world.saving
        if self.world.is_main:
            _set_aside(target)
            self._damaged.discard(target.name)
            target.mkdir(parents=True)
        if group is not None:
            dist.barrier(group=group)
        writer = FileSystemWriter(target)
        try:
            save(staged, storage_writer=writer, process_group=group, no_dist=group is None)
        except CheckpointException as error:  # derives from BaseException: no handler of the loop would see it
            raise CheckpointError(f"{target} was not written: {error}") from error
        own = {path.name: _fingerprint(path) for path in sorted(target.glob(f"__{self.world.rank}_*"))}
        everyone: list[Any] = [own]
        if group is not None:
            everyone = [None] * self.world.size
            dist.gather_object(own, everyone if self.world.is_main else None, dst=0, group=group)
        if self.world.is_main:
            _write_text(target / "config.yaml", config_yaml)
            _write_text(target / "state.json", json.dumps(loop, indent=1))
            files = {name: fingerprint for part in everyone for name, fingerprint in part.items()}
            for name in (".metadata", "config.yaml", "state.json"):
                files[name] = _fingerprint(target / name)
            digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
            complete = {
                "format": 1,
                "step": loop["step"],
                "position": loop["position"],
                "time_ms": int(time.time() * 1000),
                "run_uid": loop.get("run_uid"),
                "mlflow_run_id": loop.get("mlflow_run_id"),
                "config_sha256": hashlib.sha256(config_yaml.encode()).hexdigest(),
                "world_size": self.world.size,
                "files": files,
                "digest": digest,
            }
            _write_text(target / "COMPLETE", json.dumps(complete, indent=1))
            self._retire()

    def _retire(self) -> None:
        """Deletes complete checkpoints beyond the newest `keep_last` and the multiples of `keep_every`."""
        listed = list_checkpoints(self.folder.parent)
        complete = [path for path in listed if _is_complete(path) and path.name not in self._damaged]
        for path in complete[: -self.config.keep_last]:
            if self.config.keep_every is None or step_of(path) % self.config.keep_every:
                (path / "COMPLETE").unlink()  # first, so that a half deleted folder does not count
                shutil.rmtree(path)

    def find(self) -> Path | None:
        """The newest complete and verified checkpoint, as rank 0 sees it, on every rank. A collective."""
        found: str | None = None
        if self.world.is_main:
            for path in reversed(list_checkpoints(self.folder.parent)):
                problem = find_damage(path, hashes=self.config.verify)
                if problem is None:
                    found = str(path)
                    break
                self._damaged.add(path.name)
                logger.warning("Checkpoint %s is not used: %s; it stays where it is", path, problem)
        found = self.world.broadcast(found)
        if found is None:
            return None
        self._trusted.add(step_of(Path(found)))
        return Path(found)

    def load(self, checkpoint: Path, state: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
        """Reads the checkpoint into the tensors of `state`, resharding as needed; returns the loop's state.

        Groups named `rng` are read where the checkpoint has them (the same rank of the same world size).
        """
        saved = tensor_shapes(checkpoint)
        wanted = {f"{group}.{name}": tensor for group, tensors in state.items() for name, tensor in tensors.items()}
        optional = {name for name in wanted if name.startswith("rng.") and name not in saved}
        missing = sorted(name for name in wanted if name not in saved and name not in optional)
        if missing:
            raise CheckpointError(
                f"{checkpoint} lacks {len(missing)} tensors that this configuration trains, for example {missing[0]}; "
                "resume with the configuration that wrote it, or start a run under another name"
            )
        for name, tensor in wanted.items():
            if name in saved and tuple(saved[name].size) != tuple(tensor.shape):
                raise CheckpointError(
                    f"{checkpoint}: {name} has shape {tuple(saved[name].size)}, this configuration expects "
                    f"{tuple(tensor.shape)}; resume with the model that wrote it"
                )
        present: dict[str, Any] = {
            group: {name: tensor for name, tensor in tensors.items() if f"{group}.{name}" not in optional}
            for group, tensors in state.items()
        }
        present = {group: tensors for group, tensors in present.items() if tensors}
        read_into(checkpoint, present, self.world.control)
        loop: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
        return loop


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The run's checkpoint folders, complete or not, oldest first."""
    folders = (run_dir / "checkpoints").glob("step-*")
    return sorted((path for path in folders if path.name.removeprefix("step-").isdigit()), key=step_of)


def read_complete(checkpoint: Path) -> dict[str, Any]:
    """What `COMPLETE` says. Raises CheckpointError where it is missing or unreadable: the checkpoint is torn."""
    try:
        complete = json.loads((checkpoint / "COMPLETE").read_text())
        if not isinstance(complete, dict) or complete.get("format") != 1 or not isinstance(complete.get("files"), dict):
            raise CheckpointError(f"{checkpoint}/COMPLETE has another format than 1; it was written by another version")
        return complete
    except FileNotFoundError as error:
        raise CheckpointError(f"{checkpoint} is no complete checkpoint: it has no COMPLETE file") from error
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{checkpoint}/COMPLETE is not readable: {error}") from error


def find_damage(checkpoint: Path, *, hashes: bool = True) -> str | None:
    """Why a checkpoint cannot be trusted, or None: COMPLETE, then every file's size, then (if asked) its sha256."""
    try:
        complete = read_complete(checkpoint)
    except CheckpointError as error:
        return str(error)
    for name, (size, digest) in complete["files"].items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, COMPLETE says {size}"
        if hashes and _sha256(path) != digest:
            return f"{name} has another sha256 than COMPLETE says"
    return None


def newest_complete(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run whose files are all there with the right sizes."""
    for path in reversed(list_checkpoints(run_dir)):
        if find_damage(path, hashes=False) is None:
            return path
    return None


def load_weights(checkpoint: Path, player: str, *, ema: bool = False) -> dict[str, Tensor]:
    """A player's full fp32 weights on the CPU, under canonical names; needs no process group."""
    prefix = f"{'ema' if ema else 'model'}.{player}."
    weights = read_tensors(checkpoint, prefix)
    if not weights:
        kind = "moving average" if ema else "weights"
        raise CheckpointError(f"{checkpoint} holds no {kind} of player {player!r}")
    return weights


def load_run_config(path: Path) -> RunConfig:
    """The resolved configuration of a checkpoint or run folder."""
    from pretrain.config import load_config

    return load_config(path / "config.yaml")


def _is_complete(checkpoint: Path) -> bool:
    return (checkpoint / "COMPLETE").is_file()


def _set_aside(target: Path) -> None:
    if target.exists():
        aside = target.with_name(f"torn-{target.name}-{time.time_ns()}")
        logger.warning("%s is torn or damaged; it is kept as %s", target, aside.name)
        target.rename(aside)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone() if tensor.device.type == "cpu" else tensor.detach().to("cpu")


def _fingerprint(path: Path) -> tuple[int, str]:
    return path.stat().st_size, _sha256(path)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_text(path: Path, text: str) -> None:
    """Writes a whole file or nothing, and has it on disk before it returns."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def rng_state(world: World) -> dict[str, Tensor]:
    """This rank's generator states, under names that only the same rank of the same world size reads."""
    name = f"rank{world.rank}_of_{world.size}"
    states = {f"cpu_{name}": torch.get_rng_state()}
    if world.device.type == "cuda":
        states[f"cuda_{name}"] = torch.cuda.get_rng_state(world.device)
    return states


def set_rng_state(states: Mapping[str, Tensor], world: World) -> None:
    name = f"rank{world.rank}_of_{world.size}"
    torch.set_rng_state(states[f"cpu_{name}"].cpu())
    if world.device.type == "cuda":
        torch.cuda.set_rng_state(states[f"cuda_{name}"].cpu(), world.device)
