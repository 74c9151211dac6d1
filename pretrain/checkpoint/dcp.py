"""Reading torch.distributed.checkpoint folders without running anything that they hold.

DCP's `.metadata` is a pickle, and its non-tensor entries are unpickled on load. Tessera saves tensors only, so this
reader admits the few classes that describe tensors and refuses everything else by name. It reads local folders and
object stores alike, and into plain tensors, DTensors and objects of DCP's checkpointable protocol. DCP is imported when
something is read.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretrain.checkpoint.errors import CheckpointError
from pretrain.checkpoint.folder import Folder

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata


def tensor_shapes(checkpoint: Folder) -> dict[str, TensorStorageMetadata]:
    """The shapes and dtypes of the tensors in a checkpoint, by their flat names.

    Raises:
        CheckpointError: it is no checkpoint, or holds more than tensors.
    """
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from pretrain.checkpoint.dcp_reader import TensorReader

    entries = TensorReader(checkpoint).read_metadata().state_dict_metadata
    others = sorted(name for name, entry in entries.items() if not isinstance(entry, TensorStorageMetadata))
    if others:
        raise CheckpointError(f"{checkpoint} holds entries that are no tensors: {', '.join(others[:5])}")
    return {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def read_into(checkpoint: Folder, tensors: dict[str, Any], group: ProcessGroup | None) -> None:
    """Reads a checkpoint into tensors, in place.

    Args:
        checkpoint: the checkpoint's folder.
        tensors: what to fill, by flat names: plain tensors, DTensors, or objects of DCP's checkpointable protocol.
        group: of the ranks that read together, for whom this is a collective; None: this process reads alone.
    Raises:
        CheckpointError: a tensor is missing or has another shape. (DCP's own exception is no `Exception` and would pass
            by every handler.)
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    from pretrain.checkpoint.dcp_reader import LoadPlanner, TensorReader

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # that is meant
            load(
                dict(tensors),
                storage_reader=TensorReader(checkpoint),
                planner=LoadPlanner(),
                process_group=group,
                no_dist=group is None,
            )
    except CheckpointException as error:
        causes = "; ".join(f"{type(cause).__name__}: {cause}" for cause, _ in error.failures.values())
        raise CheckpointError(
            f"{checkpoint} was not read: {causes}. Only tensors are loaded; use another checkpoint"
        ) from error


def read_tensors(checkpoint: Folder, prefix: str) -> dict[str, Tensor]:
    """The full tensors whose flat names begin with `prefix`, on the CPU, with the prefix removed.

    Raises:
        CheckpointError: it is no checkpoint, or cannot be read.
    """
    wanted = {name: entry for name, entry in tensor_shapes(checkpoint).items() if name.startswith(prefix)}
    tensors: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in wanted.items()
    }
    if tensors:
        read_into(checkpoint, tensors, None)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
