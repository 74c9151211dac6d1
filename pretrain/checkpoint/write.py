"""Writing one checkpoint, on the checkpoint thread: every rank its pieces, rank 0 the rest and `COMPLETE`.

Enters: staged pieces and the loop's state. Leaves: a published checkpoint, or on every rank the same error and no
checkpoint. Each phase ends with a vote: what fails on one rank fails on all of them, and nobody waits for a rank that
gave up. `COMPLETE` is written when every rank's files are on disk and rank 0 sees them with the right sizes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
import pickle
import socket
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from pretrain.checkpoint.errors import CheckpointError
from pretrain.checkpoint.read import find_damage, list_folder, step_of
from pretrain.checkpoint.staging import RankPlan
from pretrain.checkpoint.store import Place, store_of

Fingerprint = tuple[int, str]
# bytes and sha256 of a file

logger = logging.getLogger(__name__)


class PeersLostError(CheckpointError):
    """The ranks could not reach each other: their process group cannot be used again."""


@dataclass(frozen=True)
class Peers:
    """The ranks that save together, on their checkpoint threads."""

    rank: int
    size: int
    group: dist.ProcessGroup | None

    def together(self, what: str, work: Callable[[], Any]) -> list[Any]:
        """Does `work` on every rank; returns the ranks' results on rank 0. Raises CheckpointError on every rank, with
        what went wrong where, if it raised on one. A collective.
        """
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
            logger.debug("%s failed", what, exc_info=True)
        if self.group is None:
            everyone, verdict = [(result, failure)], failure
        else:
            everyone, verdict = self._vote(result, failure)
        if verdict is not None:
            raise CheckpointError(f"{what} failed: {verdict}")
        return [value for value, _ in everyone]

    def _vote(self, result: Any, failure: str | None) -> tuple[list[Any], str | None]:
        everyone: list[Any] = [None] * self.size
        if failure is not None:
            failure = f"rank {self.rank} on {socket.gethostname()}: {failure}"
        try:
            dist.gather_object((result, failure), everyone if self.rank == 0 else None, dst=0, group=self.group)
            box: list[str | None] = [None]
            if self.rank == 0:
                failures = [problem for _, problem in everyone if problem is not None]
                more = f" (and {len(failures) - 3} more ranks)" if len(failures) > 3 else ""
                box = ["; ".join(failures[:3]) + more if failures else None]
            dist.broadcast_object_list(box, src=0, group=self.group)
        except RuntimeError as error:
            raise PeersLostError(f"{failure or 'the ranks lost each other while saving'}: {error}") from error
        return (everyone if self.rank == 0 else []), box[0]


@dataclass(frozen=True)
class Job:
    """One save."""

    target: Place
    plan: RankPlan
    pieces: Callable[[], list[Tensor]]
    """Gives the staged pieces, in the order of the plan's items; waits until they are copied."""
    loop_json: str
    """The loop's state; text, because the loop goes on changing what it is made of."""
    config_yaml: str


@dataclass(frozen=True)
class Retention:
    """Which complete checkpoints stay."""

    keep_last: int
    keep_every: int | None
    free_before: bool


def write_checkpoint(job: Job, peers: Peers, retention: Retention, damaged: set[str]) -> int:
    """Writes and publishes a checkpoint; returns its bytes, on rank 0 of all files and elsewhere of the rank's own.

    damaged: names of folders that do not count as kept; rank 0's. Raises CheckpointError on every rank; what was
    written is removed then. A collective of the peers' group.
    """
    is_main = peers.rank == 0
    peers.together(f"preparing {job.target}", lambda: _prepare(job, retention, damaged) if is_main else None)
    try:
        written = peers.together(f"writing {job.target}", lambda: _write_pieces(job, peers.rank))
        sizes = peers.together(f"publishing {job.target}", lambda: _publish(job, written, peers) if is_main else 0)
    except PeersLostError:  # others may still write there, and it may even be complete
        raise
    except CheckpointError:
        if is_main:
            _remove_leftovers(job.target)
        raise
    if is_main:
        retire(job.target.parent, retention.keep_last, retention.keep_every, damaged)
        return int(sizes[0])
    return job.plan.size_bytes


def retire(folder: Place, keep_last: int, keep_every: int | None, damaged: set[str]) -> None:
    """Deletes good checkpoints beyond the newest `keep_last` and the multiples of `keep_every`. Never raises: what
    cannot be deleted stays.
    """
    try:
        listed = [place for place in list_folder(folder) if place.name not in damaged]
        good = [place for place in listed if find_damage(place, hashes=False) is None]
        for place in good[:-keep_last]:
            if keep_every is None or step_of(place) % keep_every:
                store_of(place).remove(place)
    except OSError as error:
        logger.warning("Old checkpoints in %s were not deleted: %s", folder, error)


def set_aside(target: Place, prefix: str) -> None:
    """Gives a folder that is in the way a name that says what it is."""
    if store_of(target).files(target) or target.name in store_of(target).subfolders(target.parent):
        aside = f"{prefix}-{target.name}-{time.time_ns()}"
        logger.warning("%s is %s; it is kept as %s", target, prefix, aside)
        store_of(target).rename(target, aside)


class _Pieces(SavePlanner):
    """Gives DCP's writer the staged pieces."""

    def __init__(self, plan: SavePlan, pieces: list[Tensor]) -> None:
        self._by_index = {_key(item.index): piece for item, piece in zip(plan.items, pieces, strict=True)}

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._by_index[_key(write_item.index)]

    def set_up_planner(self, *arguments: Any, **more: Any) -> None:
        raise NotImplementedError("the plan was made before")

    def create_local_plan(self) -> SavePlan:
        raise NotImplementedError("the plan was made before")

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        raise NotImplementedError("the plan was made before")

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        raise NotImplementedError("the plan was made before")


class _Writer(FileSystemWriter):
    """DCP's file format, into any store, hashed on the way."""

    def __init__(self, target: Place) -> None:
        super().__init__("", sync_files=False)  # the store does it
        self._target = target
        self.fs = self  # type: ignore[assignment]
        self.fingerprints: dict[str, Fingerprint] = {}

    def concat_path(self, path: Any, suffix: str) -> str:
        return suffix

    @contextmanager
    def create_stream(self, path: str, mode: str) -> Generator[io.IOBase, None, None]:
        with store_of(self._target).create(self._target, path) as stream:
            try:
                yield cast(io.IOBase, stream)
            except RuntimeError as error:
                raise stream.error or error from error
        self.fingerprints[path] = stream.fingerprint


def _prepare(job: Job, retention: Retention, damaged: set[str]) -> None:
    if retention.free_before:
        retire(job.target.parent, max(2, retention.keep_last - 1), retention.keep_every, damaged)
    set_aside(job.target, "torn")
    damaged.discard(job.target.name)
    store_of(job.target).make(job.target)


def _write_pieces(job: Job, rank: int) -> tuple[list[WriteResult], dict[str, Fingerprint]]:
    """This rank's file."""
    pieces = job.pieces()
    if not job.plan.plan.items:
        return [], {}
    writer = _Writer(job.target)
    results = writer.write_data(job.plan.plan, _Pieces(job.plan.plan, pieces)).wait()
    return results, writer.fingerprints


def _publish(job: Job, written: list[tuple[list[WriteResult], dict[str, Fingerprint]]], peers: Peers) -> int:
    """Rank 0: what is not tensors, a look at everybody's files, then COMPLETE. Returns the bytes of all files."""
    assert job.plan.metadata is not None
    store, target, loop = store_of(job.target), job.target, json.loads(job.loop_json)
    metadata = dataclasses.replace(job.plan.metadata)
    metadata.storage_data = {result.index: result.storage_data for results, _ in written for result in results}
    metadata.storage_meta, metadata.version = StorageMeta(), CURRENT_DCP_VERSION
    files = {name: fingerprint for _, part in written for name, fingerprint in part.items()}
    texts = {
        ".metadata": pickle.dumps(metadata),
        "config.yaml": job.config_yaml.encode(),
        "state.json": job.loop_json.encode(),
    }
    for name, data in texts.items():
        store.write(target, name, data)
        files[name] = (len(data), hashlib.sha256(data).hexdigest())
    _check_sizes(target, files)
    complete = {
        "format": 1,
        "step": loop["step"],
        "position": loop["position"],
        "time_ms": int(time.time() * 1000),
        "run_uid": loop.get("run_uid"),
        "mlflow_run_id": loop.get("mlflow_run_id"),
        "config_sha256": files["config.yaml"][1],
        "world_size": peers.size,
        "files": files,
        "digest": hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest(),
    }
    store.write(target, "COMPLETE", json.dumps(complete, indent=1).encode())
    return sum(size for size, _ in files.values())


def _check_sizes(target: Place, files: dict[str, Fingerprint]) -> None:
    found = store_of(target).files(target)
    for name, (size, _) in files.items():
        if name not in found:
            raise CheckpointError(
                f"{name} was written, but rank 0 does not see it in {target}: the nodes do not share this folder; set "
                "checkpoint.folder to a folder that they share, or to the URL of an object store"
            )
        if found[name] != size:
            raise CheckpointError(f"{target}/{name} has {found[name]:,} bytes, {size:,} were written")


def _remove_leftovers(target: Place) -> None:
    try:
        store_of(target).remove(target)
        logger.warning("What was written of %s is removed", target)
    except Exception as error:  # on a broken disk this fails as well; without COMPLETE nobody counts it
        logger.warning(
            "What was written of %s cannot be removed (%s); without COMPLETE it does not count", target, error
        )


def _key(index: MetadataIndex) -> tuple[str, Any]:
    return index.fqn, index.offset
