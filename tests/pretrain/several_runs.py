"""Run by torchrun in the tests: trains several configurations one after the other, to pay for one start of Python.

usage: torchrun ... several_runs.py CONFIG OVERRIDES.json      (a JSON list of lists of key=value overrides)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from pretrain.config import load_config
from pretrain.parallel.world import join_world, leave_world
from pretrain.train import train


def main() -> None:
    config_path, overrides_path = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    world = join_world("cpu", timeout_s=1800)
    for overrides in json.loads(overrides_path.read_text()):
        train(load_config(config_path, overrides), config_path=config_path, overrides=overrides, world=world)
    leave_world()


if __name__ == "__main__":
    main()
