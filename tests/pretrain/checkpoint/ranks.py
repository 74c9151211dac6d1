"""Two ranks save together, and one of them has a fault in the second save: for test_faults."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import pretrain.checkpoint.write as write_module
from pretrain.checkpoint.checkpoints import Checkpoints
from pretrain.checkpoint.config import CheckpointConfig
from pretrain.checkpoint.saver import Saver
from pretrain.parallel.world import World, change_group_timeout


def main(folder: str, fault: str) -> None:
    run_dir = Path(folder)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    control = dist.new_group(backend="gloo")
    saving = dist.new_group(backend="gloo")
    world = World(rank, 2, rank, torch.device("cpu"), control, saving)  # type: ignore[arg-type]
    saver = Saver(Checkpoints(run_dir, CheckpointConfig(busy_wait_s=30), world))
    write_pieces, write_checkpoint = write_module._write_pieces, write_module.write_checkpoint
    gave_up = run_dir / "gave-up"

    def broken(job: write_module.SaveJob, rank: int) -> Any:
        if rank == 1 and job.target.name == "step-00000002":
            if fault == "disk":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            while not gave_up.exists():
                time.sleep(0.01)
        return write_pieces(job, rank)

    def watched(job: write_module.SaveJob, *more: Any) -> int:
        try:
            return write_checkpoint(job, *more)
        except write_module.PeersLostError:
            gave_up.touch()
            raise

    write_module._write_pieces = broken
    write_module.write_checkpoint = watched
    weights = {f"layer{index}.weight": torch.full((1000,), float(index)) for index in range(20)}
    for step in (1, 2, 3):
        if step == 2 and fault == "peer":  # the group that follows the lost one has the long time-out again
            change_group_timeout(saving, 3)  # type: ignore[arg-type]
        saver.save(step, {"model.model": weights}, {"position": step}, "name: run\n")
        saver.settle()
    said = {
        "failed": saver.stats()["checkpoint/failed"],
        "events": saver.checkpoints.take_events(),
        "staged_bytes": saver._buffer.size_bytes,
        "state_bytes": sum(weight.nbytes for weight in weights.values()),
    }
    (run_dir / f"rank{rank}.json").write_text(json.dumps(said))
    dist.barrier()
    os._exit(0)  # the group that timed out cannot be left in order
