"""Processes: starts and stops torch.distributed, and holds what a rank knows of the others.

Enters: torchrun's environment (or none: one process). Leaves: a `World`. Training collectives use the default group
(gloo on CPU, NCCL on CUDA); decisions (stop flags, which checkpoint) use a gloo group of their own, and so do
checkpoint saves, because collectives of two threads in one group would interleave.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from pretrain.parallel.launch import Launch, LaunchError


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    """Number of this process over all nodes, from 0."""
    size: int
    """Number of processes over all nodes."""
    local_rank: int
    """Number of this process on its node, from 0."""
    device: torch.device
    """Where it computes."""
    control: dist.ProcessGroup | None
    """gloo group for decisions, main thread only; None with one process."""
    saving: dist.ProcessGroup | None
    """gloo group of the checkpoint thread; None with one process."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone tracks, prints and exports."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """True on every rank if `flag` is true on one. A collective."""
        if self.control is None:
            return flag
        value = torch.tensor([int(flag)], dtype=torch.int32)
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.control)
        return bool(value.item())

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank. A collective."""
        if self.control is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a float64 vector over ranks, on the CPU. A collective."""
        total = values.detach().to("cpu", torch.float64, copy=True)
        if self.control is not None:
            dist.all_reduce(total, group=self.control)
        return total

    def max(self, values: torch.Tensor) -> torch.Tensor:
        """The element-wise maximum of a float64 vector over ranks, on the CPU. A collective."""
        highest = values.detach().to("cpu", torch.float64, copy=True)
        if self.control is not None:
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=self.control)
        return highest

    def barrier(self) -> None:
        """Waits until every rank has come here. A collective."""
        if self.control is not None:
            dist.barrier(group=self.control)


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of a rank.

    Args:
        name: "auto" (CUDA where it is there), "cpu" or "cuda".
        local_rank: index of the GPU.

    Raises:
        ValueError: the name is another one, or the device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if name != "cuda":
        raise ValueError(f"device is {name!r}; expected auto, cpu or cuda")
    if not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch sees no CUDA device; set device=cpu or check the driver")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {local_rank} has no GPU: this node has {torch.cuda.device_count()}; lower --nproc-per-node"
        )
    return torch.device("cuda", local_rank)


def join_world(device: str, timeout_s: float) -> World:
    """Joins the process group that torchrun describes in the environment; alone when it describes none.

    Args:
        device: see `pick_device`.
        timeout_s: seconds that a collective may take, in each group.

    Raises:
        ValueError: the device is not there, the launcher's variables do not fit together, or the port where the
            processes should meet belongs to another program.
    """
    launch = Launch.from_environment()
    picked = pick_device(device, launch.local_rank)
    if picked.type == "cuda":
        torch.cuda.set_device(picked)
    if not launch.by_torchrun:
        return World(0, 1, 0, picked, None, None)
    timeout = datetime.timedelta(seconds=timeout_s)
    backend = "cpu:gloo,cuda:nccl" if picked.type == "cuda" else "cpu:gloo"
    try:
        dist.init_process_group(backend, timeout=timeout)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise LaunchError(_no_meeting(str(error))) from error
    if launch.size == 1:
        return World(0, 1, launch.local_rank, picked, None, None)
    control = dist.new_group(backend="gloo", timeout=timeout)
    saving = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(control, dist.ProcessGroup)
    assert isinstance(saving, dist.ProcessGroup)
    return World(launch.rank, launch.size, launch.local_rank, picked, control, saving)


def _no_meeting(reason: str) -> str:
    """Why the processes did not meet, for people; `reason` is torch's."""
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} (MASTER_ADDR:MASTER_PORT)"
    if "EADDRINUSE" in reason or "address already in use" in reason.lower():
        return f"{where} is in use by another program; set another --master-port (torchrun) or MASTER_PORT"
    return f"the processes did not meet at {where}: {reason.splitlines()[0]}. Check that rank 0 runs there"


def change_timeout(world: World, timeout_s: float) -> None:
    """Sets how long a collective of training (default group) or deciding (`world.control`) may take from now on.

    The limit is long until the first step is done, because ranks load, compile and resume at different speeds, and
    short later. It is the backstop of the watchdog, so it should be longer than each of its limits after the start.
    `world.saving` keeps its own: a slow disk is no reason to end a run. Every rank calls it at the same point of the
    run.

    Args:
        world: this process among its peers.
        timeout_s: seconds.
    """
    if world.control is None:
        return
    default = dist.group.WORLD
    assert default is not None
    for group in (default, world.control):
        change_group_timeout(group, timeout_s)


def change_group_timeout(group: dist.ProcessGroup, timeout_s: float) -> None:
    """Sets how long a collective of one group may take from now on."""
    timeout = datetime.timedelta(seconds=timeout_s)
    if hasattr(dist, "set_timeout"):
        dist.set_timeout(timeout, group)
    else:  # torch 2.11 has it under its first name
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def leave_world() -> None:
    """Leaves the process group, after every rank arrived (an early leaver makes its peers abort)."""
    if dist.is_initialized():
        if dist.get_world_size() > 1:
            dist.barrier()
        dist.destroy_process_group()
