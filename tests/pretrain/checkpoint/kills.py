"""Kills a save at its first, second, third, ... operation on files, until it gets through: for test_faults.

Prints one line of JSON per point: which checkpoint counts after the kill, and after one more save.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint.checkpoints import Checkpoints
from pretrain.checkpoint.config import CheckpointConfig
from pretrain.checkpoint.hashing_stream import HashingStream
from pretrain.checkpoint.open_folder import open_folder
from pretrain.checkpoint.read import find_damage, list_checkpoints, step_of
from pretrain.checkpoint.saver import Saver
from pretrain.parallel.world import World

WORLD = World(0, 1, 0, torch.device("cpu"), None, None)


def save(saver: Saver, step: int) -> None:
    state = {"model.model": {"weight": torch.full((1000,), float(step)), "bias": torch.zeros(3)}}
    saver.save(step, state, {"position": step}, "name: run\n")
    saver.wait()


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


def main(folder: str) -> None:
    torch.set_num_threads(1)
    killed, point = True, 0
    while killed:
        run_dir = Path(folder) / f"point-{point}"
        child = os.fork()
        if child == 0:
            saver = Saver(Checkpoints(run_dir, CheckpointConfig(), WORLD))
            for step in (-1, 0, 1):  # steps of a run; the oldest is deleted in the save that is killed
                save(saver, 10 + step)
            kill_at(point)
            save(saver, 12)
            os._exit(0)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        complete = (run_dir / "checkpoints" / "step-00000012" / "COMPLETE").exists()
        again = Saver(Checkpoints(run_dir, CheckpointConfig(), WORLD))
        found = again.checkpoints.find()
        good = [step_of(place) - 10 for place in list_checkpoints(open_folder(run_dir)) if find_damage(place) is None]
        assert found is not None
        assert len(good) >= 2, good
        save(again, 13)
        after = Checkpoints(run_dir, CheckpointConfig(), WORLD).find()
        assert after is not None
        record = {"point": point, "killed": killed, "complete": complete, "found": step_of(found) - 10}
        print(json.dumps({**record, "after": step_of(after) - 10}), flush=True)
        shutil.rmtree(run_dir)
        point += 1
