"""What a rank does in the tests: it trains several configurations one after the other, in one process group."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from pretrain.config import load_config
from pretrain.parallel.world import join_world, leave_world
from pretrain.train import train


def main(config: str, runs: Sequence[Sequence[str]]) -> None:
    """runs: overrides (key=value) of each run."""
    config_path = Path(config)
    torch.set_num_threads(1)
    world = join_world("cpu", timeout_s=1800)
    for overrides in runs:
        train(load_config(config_path, overrides), config_path=config_path, overrides=overrides, world=world)
    leave_world()
