"""What a rank writes of the training state, and the copy that is taken of it while the loop waits.

Enters: the live state: plain tensors, DTensors, or objects of DCP's checkpointable protocol, by flat names. Leaves: a
plan (made once: which pieces this rank writes, so that replicas are spread over ranks and not copied by all of them)
and one buffer with those pieces. Why it exists: the copy is all that blocks training, and it is most of the memory that
a save needs. The buffer is used again by every save; on CUDA it is page-locked and filled on a side stream.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.checkpoint.errors import CheckpointError
from pretrain.parallel.world import World

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata
    from torch.distributed.checkpoint.planner import SavePlan

_ALIGN_BYTES = 64
"""Each piece begins in the buffer at a multiple of this."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankPlan:
    """What one rank writes of a state."""

    structure: tuple[Any, ...]
    """`structure_of` the state that it was made for."""
    plan: SavePlan
    """The pieces that this rank writes, and its file's name."""
    metadata: Metadata | None
    """The description of the whole checkpoint, on rank 0; None on the others."""

    @property
    def size_bytes(self) -> int:
        """Bytes of the pieces that this rank writes."""
        written = [item.tensor_data for item in self.plan.items if item.tensor_data is not None]
        return sum(data.chunk.sizes.numel() * data.properties.dtype.itemsize for data in written)


def flatten(state: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """{group: {name: value}} as {"group.name": value}."""
    return {f"{group}.{name}": value for group, values in state.items() for name, value in values.items()}


def structure_of(values: Mapping[str, Any]) -> tuple[Any, ...]:
    """What has to stay the same for a plan to hold: names, kinds, shapes and dtypes. Takes microseconds per tensor."""
    return tuple((name, type(value), tuple(value.shape), value.dtype) for name, value in values.items())


def make_plan(values: Mapping[str, Any], world: World) -> RankPlan:
    """Divides the writing of a state among the ranks. A collective.

    Args:
        values: the state by flat names, as this rank holds it.
        world: the ranks.
    Raises:
        CheckpointError: on every rank, where DCP cannot plan it.
    """
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(values), is_coordinator=world.is_main)
    own = planner.create_local_plan()
    gathered: list[Any] = [own]
    if world.control is not None:
        gathered = [None] * world.size
        dist.gather_object(own, gathered if world.is_main else None, dst=0, group=world.control)
    plans: list[Any] = [None] * world.size
    metadata = None
    if world.is_main:
        try:
            plans, metadata = planner.create_global_plan(gathered)
            plans = FileSystemWriter("").prepare_global_plan(plans)  # names each rank's file
        except Exception as error:  # the others wait for an answer
            plans = [f"{type(error).__name__}: {error}"] * world.size
    received: list[Any] = [plans[0]]
    if world.control is not None:
        dist.scatter_object_list(received, plans if world.is_main else None, src=0, group=world.control)
    if isinstance(received[0], str):
        raise CheckpointError(f"the training state cannot be saved: {received[0]}")
    return RankPlan(structure_of(values), received[0], metadata)


class StagingBuffer:
    """One copy of the pieces that this rank writes, in memory that is used again by the next save."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._memory: Tensor = torch.empty(0, dtype=torch.uint8)
        self._pinned = False
        self._plan: RankPlan | None = None
        self._pieces: list[Tensor] = []
        self._stream = torch.cuda.Stream(device) if self._cuda else None
        self._copied: Any = None

    @property
    def size_bytes(self) -> int:
        """Bytes of memory held."""
        return self._memory.numel()

    def lay_out(self, plan: RankPlan) -> None:
        """Makes room for a plan's pieces; does nothing where it is the plan of the last time."""
        if self._plan is plan:
            return
        places, total_bytes = [], 0
        for item in plan.plan.items:
            assert item.tensor_data is not None
            shape, dtype = item.tensor_data.chunk.sizes, item.tensor_data.properties.dtype
            places.append((total_bytes, shape, dtype))
            total_bytes += -(-shape.numel() * dtype.itemsize // _ALIGN_BYTES) * _ALIGN_BYTES
        self.close()
        memory = _allocate(total_bytes)
        self._memory = torch.frombuffer(memory, dtype=torch.uint8)
        self._memory.fill_(0)  # the pages are there before the first copy
        if self._cuda:
            self._pin()
        self._pieces = [_piece(memory, begin, shape, dtype) for begin, shape, dtype in places]
        self._plan = plan

    def copy_from(self, values: Mapping[str, Any]) -> None:
        """Copies the pieces of the plan that the buffer was laid out for.

        On the CPU they are copied when this returns. On CUDA the copies are queued, the stream of training waits for
        them on the device, and `wait` waits for them on the host.

        Args:
            values: the live state by flat names.
        Raises:
            CheckpointError: a piece has another shape than in the plan.
        """
        assert self._plan is not None
        if self._stream is None:
            self._copy(values)
            return
        training = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(training)
        with torch.cuda.stream(self._stream):
            self._copy(values)
            self._copied = self._stream.record_event()
        # The next step changes weights, and its forward pass buffers: neither may come before they are copied.
        training.wait_event(self._copied)

    def wait(self) -> list[Tensor]:
        """The pieces, in the order of the plan's items, once they are copied; called by the thread that writes."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._pieces

    def close(self) -> None:
        """Frees the memory. Not while something is copied into it or written from it."""
        self._pieces, self._plan = [], None
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())
            self._pinned = False
        self._memory = torch.empty(0, dtype=torch.uint8)

    def _copy(self, values: Mapping[str, Any]) -> None:
        from torch.distributed.checkpoint.utils import find_tensor_shard

        assert self._plan is not None
        with torch.no_grad():
            for item, piece in zip(self._plan.plan.items, self._pieces, strict=True):
                live = find_tensor_shard(values[item.index.fqn], item.index).detach()
                if live.shape != piece.shape:  # copy_ would broadcast
                    raise CheckpointError(
                        f"{item.index.fqn} has a piece of {tuple(live.shape)} now and had one of "
                        f"{tuple(piece.shape)} at the first save; a run's sharding must not change"
                    )
                piece.copy_(live, non_blocking=self._cuda)

    def _pin(self) -> None:
        """Page-locks the memory as it is: torch's own pinned allocator rounds up to a power of two."""
        result = int(torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), self._memory.numel(), 0))
        self._pinned = result == 0
        if not self._pinned:
            logger.warning(
                "%.1f GB for checkpoints could not be page-locked (CUDA error %d): copies block training for longer",
                self._memory.numel() / 1e9,
                result,
            )


def _allocate(num_bytes: int) -> mmap.mmap:
    """Anonymous memory in huge pages where the system has them: fewer page-table misses while it is filled."""
    memory = mmap.mmap(-1, max(1, num_bytes))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _piece(memory: mmap.mmap, begin: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A tensor over a part of the memory, with a storage of its own: torch.save writes whole storages."""
    if shape.numel() == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=shape.numel(), offset=begin).view(shape)
