"""Two ranks save a sharded and a replicated tensor and read them back: for test_staging."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from pretrain.checkpoint.checkpoints import Checkpoints, rng_state
from pretrain.checkpoint.config import CheckpointConfig
from pretrain.checkpoint.saver import Saver
from pretrain.parallel.world import join_world, leave_world


def main(run_dir: str) -> None:
    torch.set_num_threads(1)
    world = join_world("cpu", 60.0)
    mesh = init_device_mesh("cpu", (2,))
    sharded = distribute_tensor(torch.arange(35.0).view(7, 5), mesh, [Shard(0)])
    replica = torch.arange(100.0)
    checkpoints = Checkpoints(Path(run_dir), CheckpointConfig(), world)
    saver = Saver(checkpoints)
    state = {"model.m": {"sharded": sharded, "replica": replica}, "rng": rng_state(world)}
    saver.save(1, state, {"position": 8}, "name: run\n")
    sharded.to_local().fill_(-1.0)
    replica.fill_(-1.0)
    torch.rand(3)  # the generator moves on
    saver.wait()
    found = checkpoints.find()
    assert found is not None
    state["rng"] = {name: torch.zeros_like(tensor) for name, tensor in state["rng"].items()}
    before = rng_state(world)
    checkpoints.load(found, state)
    assert isinstance(sharded, DTensor)
    assert torch.equal(sharded.full_tensor(), torch.arange(35.0).view(7, 5))
    assert torch.equal(replica, torch.arange(100.0))
    for name, tensor in state["rng"].items():
        assert tensor.any()
        assert not torch.equal(tensor, before[name])
    saver.close()
    dist.barrier()
    leave_world()
