"""Writing one checkpoint, on the checkpoint thread: every rank its pieces, rank 0 the rest and `COMPLETE`.

Enters: staged pieces and the loop's state. Leaves: a published checkpoint, or on every rank the same error and no
checkpoint. Each phase ends with an exchange between the ranks (`Peers.run`). `COMPLETE` is written when every rank's
files are on disk and rank 0 sees them with the right sizes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
import pickle
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from pretrain.checkpoint.errors import CheckpointError
from pretrain.checkpoint.folder import Folder
from pretrain.checkpoint.peers import Peers, PeersLostError
from pretrain.checkpoint.retention import Retention, set_aside
from pretrain.checkpoint.staging import RankPlan

Fingerprint = tuple[int, str]
"""The bytes and the sha256, in hex, of a file."""
Written = tuple[list[WriteResult], dict[str, Fingerprint]]
"""What a rank wrote: DCP's records of its pieces, and its files by name."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SaveJob:
    """One save."""

    target: Folder
    """The checkpoint to write."""
    plan: RankPlan
    """Which pieces this rank writes."""
    pieces: Callable[[], list[Tensor]]
    """Gives the staged pieces, in the order of the plan's items; waits until they are copied."""
    loop_json: str
    """The loop's state; text, because the loop goes on changing what it is made of."""
    config_yaml: str
    """The run's resolved configuration."""


def write_checkpoint(job: SaveJob, peers: Peers, retention: Retention, damaged: set[str]) -> int:
    """Writes and publishes a checkpoint, then deletes old ones. A collective of the peers.

    Args:
        job: what to write where.
        peers: the ranks that save together.
        retention: which checkpoints stay.
        damaged: names of folders that do not count as kept, on rank 0; the target's is taken out.
    Returns:
        The bytes written: on rank 0 those of all files, elsewhere of the rank's own.
    Raises:
        CheckpointError: it failed on one rank or more; what was written is removed then.
        PeersLostError: the ranks lost each other; what was written stays, because others may still write there.
    """
    is_main = peers.rank == 0
    peers.run(f"preparing {job.target}", lambda: _prepare(job, retention, damaged) if is_main else None)
    try:
        written = peers.run(f"writing {job.target}", lambda: _write_pieces(job, peers.rank))
        sizes = peers.run(f"publishing {job.target}", lambda: _publish(job, written, peers) if is_main else 0)
    except PeersLostError:  # it may even be complete
        raise
    except CheckpointError:
        if is_main:
            _remove_leftovers(job.target)
        raise
    if is_main:
        retention.delete_old(job.target.parent, damaged)
        return int(sizes[0])
    return job.plan.size_bytes


class _StagedPieces(SavePlanner):
    """Gives DCP's writer the staged pieces; the plan was made before."""

    def __init__(self, plan: SavePlan, pieces: list[Tensor]) -> None:
        self._by_index = {item.index: piece for item, piece in zip(plan.items, pieces, strict=True)}

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._by_index[write_item.index]

    def set_up_planner(self, *arguments: Any, **more: Any) -> None:
        raise NotImplementedError("the plan was made before")

    def create_local_plan(self) -> SavePlan:
        raise NotImplementedError("the plan was made before")

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        raise NotImplementedError("the plan was made before")

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        raise NotImplementedError("the plan was made before")


class _FolderWriter(FileSystemWriter):
    """Writes DCP's file format into any folder, and hashes on the way."""

    def __init__(self, target: Folder) -> None:
        super().__init__("", sync_files=False)  # the folder does it
        self._target = target
        self.fs = self  # type: ignore[assignment]
        self.fingerprints: dict[str, Fingerprint] = {}
        """Of the files written, by name."""

    def concat_path(self, path: Any, suffix: str) -> str:
        return suffix

    @contextmanager
    def create_stream(self, path: str, mode: str) -> Generator[io.IOBase, None, None]:
        with self._target.create(path) as stream:
            try:
                yield cast(io.IOBase, stream)
            except RuntimeError as error:
                raise stream.error or error from error
        self.fingerprints[path] = stream.fingerprint


def _prepare(job: SaveJob, retention: Retention, damaged: set[str]) -> None:
    """Makes room, and an empty folder."""
    retention.delete_old(job.target.parent, damaged, before_a_save=True)
    set_aside(job.target, "torn")
    damaged.discard(job.target.name)
    job.target.make()


def _write_pieces(job: SaveJob, rank: int) -> Written:
    """Writes this rank's file; a rank without pieces writes none."""
    pieces = job.pieces()
    if not job.plan.plan.items:
        return [], {}
    writer = _FolderWriter(job.target)
    results = writer.write_data(job.plan.plan, _StagedPieces(job.plan.plan, pieces)).wait()
    return results, writer.fingerprints


def _publish(job: SaveJob, written: list[Written], peers: Peers) -> int:
    """Writes what is not tensors, looks at everybody's files, and writes COMPLETE; on rank 0.

    Returns:
        The bytes of all files.
    """
    assert job.plan.metadata is not None
    target, loop = job.target, json.loads(job.loop_json)
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
        target.write(name, data)
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
    target.write("COMPLETE", json.dumps(complete, indent=1).encode())
    return sum(size for size, _ in files.values())


def _check_sizes(target: Folder, files: dict[str, Fingerprint]) -> None:
    """Checks that rank 0 sees every file as it was written.

    Raises:
        CheckpointError: one is not there, or has another size.
    """
    found = target.files()
    for name, (size, _) in files.items():
        if name not in found:
            raise CheckpointError(
                f"{name} was written, but rank 0 does not see it in {target}: the nodes do not share this folder; set "
                "checkpoint.folder to a folder that they share, or to the URL of an object store"
            )
        if found[name] != size:
            raise CheckpointError(f"{target}/{name} has {found[name]:,} bytes, {size:,} were written")


def _remove_leftovers(target: Folder) -> None:
    try:
        target.remove()
        logger.warning("What was written of %s is removed", target)
    except Exception as error:  # on a broken disk this fails as well; without COMPLETE nobody counts it
        logger.warning(
            "What was written of %s cannot be removed (%s); without COMPLETE it does not count", target, error
        )
