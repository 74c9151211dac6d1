"""Reading torch.distributed.checkpoint folders without running anything that they hold.

DCP's `.metadata` is a pickle, and its non-tensor entries are unpickled on load. Tessera saves tensors only, so this
reader admits the few classes that describe tensors and refuses everything else by name.
"""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names it, what was found and what to do."""


_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
}


class _TensorsOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise CheckpointError(f"it refers to {module}.{name}, which no description of tensors needs")


class TensorReader(FileSystemReader):
    """A FileSystemReader whose metadata may only describe tensors that lie inside the checkpoint's folder."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with open(path, "rb") as file:
                metadata = _TensorsOnly(file).load()
        except FileNotFoundError as error:
            raise CheckpointError(f"{path.parent} is no checkpoint: it has no .metadata file") from error
        except Exception as error:  # a corrupt pickle can raise nearly anything
            raise CheckpointError(
                f"{path} was not read: {error}. Only tensors are loaded from a checkpoint, and nothing was executed; "
                "use another checkpoint, or one that Tessera wrote"
            ) from error
        if not isinstance(metadata, Metadata):
            raise CheckpointError(f"{path} holds {type(metadata).__name__}; expected DCP metadata")
        for info in metadata.storage_data.values():
            relative = Path(str(info.relative_path))
            if relative.is_absolute() or ".." in relative.parts:
                raise CheckpointError(f"{path} points to {relative}, outside the checkpoint; it was not read")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def tensor_shapes(checkpoint: Path) -> dict[str, TensorStorageMetadata]:
    """The flat names of the tensors in a checkpoint, with their shapes and dtypes. Raises CheckpointError."""
    entries = TensorReader(checkpoint).read_metadata().state_dict_metadata
    others = sorted(name for name, entry in entries.items() if not isinstance(entry, TensorStorageMetadata))
    if others:
        raise CheckpointError(f"{checkpoint} holds entries that are no tensors: {', '.join(others[:5])}")
    return {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def read_into(checkpoint: Path, tensors: dict[str, Any], group: ProcessGroup | None) -> None:
    """Reads a checkpoint into (nested dictionaries of) tensors, in place. A collective of `group`, if there is one.

    Raises CheckpointError; DCP's own exception is no `Exception` and would pass by every handler.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # that is meant
            load(tensors, storage_reader=TensorReader(checkpoint), process_group=group, no_dist=group is None)
    except CheckpointException as error:
        causes = "; ".join(f"{type(cause).__name__}: {cause}" for cause, _ in error.failures.values())
        raise CheckpointError(
            f"{checkpoint} was not read: {causes}. Only tensors are loaded; use another checkpoint"
        ) from error


def read_tensors(checkpoint: Path, prefix: str) -> dict[str, Tensor]:
    """The full tensors below `prefix`, on the CPU, with the prefix removed; needs no process group."""
    wanted = {name: entry for name, entry in tensor_shapes(checkpoint).items() if name.startswith(prefix)}
    tensors: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in wanted.items()
    }
    if tensors:
        read_into(checkpoint, tensors, None)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
