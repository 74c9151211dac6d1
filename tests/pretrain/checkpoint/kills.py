"""Kills a save at its first, second, third, ... operation on files, until it gets through: for test_checkpoint_faults.

Prints one line of JSON per point: which checkpoint counts after the kill, and after one more save.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint.checkpointer import Checkpointer
from pretrain.checkpoint.config import CheckpointConfig
from pretrain.checkpoint.read import find_damage, list_checkpoints, step_of
from pretrain.checkpoint.store import HashingStream
from pretrain.parallel.world import World

WORLD = World(0, 1, 0, torch.device("cpu"), None, None)


def save(checkpointer: Checkpointer, step: int) -> None:
    state = {"model.model": {"weight": torch.full((1000,), float(step)), "bias": torch.zeros(3)}}
    checkpointer.save(step, state, {"position": step}, "name: run\n")
    checkpointer.wait()


def kill_at(point: int) -> None:
    """From now on counts operations on files, and dies before number `point`."""
    calls = [0]

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            calls[0] += 1
            if calls[0] > point:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        return call

    for owner, name in (
        (HashingStream, "write"),
        (os, "fsync"),
        (os, "replace"),
        (os, "mkdir"),
        (os, "unlink"),
        (os, "rmdir"),
    ):
        setattr(owner, name, counted(getattr(owner, name)))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    killed, point = True, 0
    while killed:
        run_dir = folder / f"point-{point}"
        child = os.fork()
        if child == 0:
            checkpointer = Checkpointer(run_dir, CheckpointConfig(), WORLD)
            for step in (-1, 0, 1):  # steps of a run; the oldest is deleted in the save that is killed
                save(checkpointer, 10 + step)
            kill_at(point)
            save(checkpointer, 12)
            os._exit(0)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        complete = (run_dir / "checkpoints" / "step-00000012" / "COMPLETE").exists()
        again = Checkpointer(run_dir, CheckpointConfig(), WORLD)
        found = again.find()
        good = [step_of(place) - 10 for place in list_checkpoints(run_dir) if find_damage(place) is None]
        assert found is not None
        assert len(good) >= 2, good
        save(again, 13)
        after = Checkpointer(run_dir, CheckpointConfig(), WORLD).find()
        assert after is not None
        record = {"point": point, "killed": killed, "complete": complete, "found": step_of(found) - 10}
        print(json.dumps({**record, "after": step_of(after) - 10}), flush=True)
        shutil.rmtree(run_dir)
        point += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
