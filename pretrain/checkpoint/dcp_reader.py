"""The parts of torch.distributed.checkpoint (DCP) that read a checkpoint, changed so that nothing in it is executed.

Enters: a checkpoint's folder. Leaves: DCP's reader and planner for it, for `pretrain/checkpoint/dcp.py`, which imports
this module when a checkpoint is read: DCP takes half as long to import as torch.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemBase, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.utils import find_tensor_shard

from pretrain.checkpoint.errors import CheckpointError
from pretrain.checkpoint.folder import Folder

_ALLOWED_CLASSES = {
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
"""The names, by module, that a description of tensors refers to; dtypes come on top."""


class _TensorDescriptions(pickle.Unpickler):
    """Unpickles descriptions of tensors and refuses everything else before it is imported."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _ALLOWED_CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise CheckpointError(f"it refers to {module}.{name}, which no description of tensors needs")


class _CheckpointFiles(FileSystemBase):
    """One checkpoint's files for DCP's reader, which only opens them; a path is a file's name."""

    def __init__(self, checkpoint: Folder) -> None:
        self._checkpoint = checkpoint

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Generator[io.IOBase, None, None]:
        with self._checkpoint.open(str(path)) as file:
            yield cast(io.IOBase, file)

    def concat_path(self, path: Any, suffix: str) -> str:
        return suffix

    def init_path(self, path: Any) -> Any:
        return path

    def rename(self, path: Any, new_path: Any) -> None:
        raise NotImplementedError("this reader writes nothing")

    def mkdir(self, path: Any) -> None:
        raise NotImplementedError("this reader writes nothing")

    def rm_file(self, path: Any) -> None:
        raise NotImplementedError("this reader writes nothing")

    def exists(self, path: Any) -> bool:
        return str(path) in self._checkpoint.files()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


class TensorReader(FileSystemReader):
    """A FileSystemReader whose metadata may only describe tensors that lie inside the checkpoint's folder."""

    def __init__(self, checkpoint: Folder) -> None:
        super().__init__(str(checkpoint))
        self._checkpoint = checkpoint
        self.fs = _CheckpointFiles(checkpoint)  # type: ignore[assignment]

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What DCP knows of the checkpoint: each tensor's shape and dtype, and which bytes of which file hold it.

        Args:
            args: not used; DCP's own reader has them.
            kwargs: not used; DCP's own reader has them.
        Raises:
            CheckpointError: there is no `.metadata`, it holds more than descriptions of tensors, or it names files
                outside of the checkpoint.
        """
        where = f"{self._checkpoint}/.metadata"
        try:
            metadata = _TensorDescriptions(io.BytesIO(self._checkpoint.read(".metadata"))).load()
        except FileNotFoundError as error:
            raise CheckpointError(f"{self._checkpoint} is no checkpoint: it has no .metadata file") from error
        except Exception as error:  # a corrupt pickle can raise nearly anything
            raise CheckpointError(
                f"{where} was not read: {error}. Only tensors are loaded from a checkpoint, and nothing was executed; "
                "use another checkpoint, or one that Tessera wrote"
            ) from error
        if not isinstance(metadata, Metadata):
            raise CheckpointError(f"{where} holds {type(metadata).__name__}; expected DCP metadata")
        for info in metadata.storage_data.values():
            relative = Path(str(info.relative_path))
            if relative.is_absolute() or ".." in relative.parts:
                raise CheckpointError(f"{where} points to {relative}, outside the checkpoint; it was not read")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class LoadPlanner(DefaultLoadPlanner):
    """Finds where what was saved belongs in plain tensors, DTensors and objects of DCP's checkpointable protocol. DCP's
    own turns a value that is no tensor into None, and refuses to look into it.
    """

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict = self.original_state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return find_tensor_shard(self.state_dict[index.fqn], index)
