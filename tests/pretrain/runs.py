"""Starts real runs for the tests, in this process or on several ranks, and reads what they left."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from pretrain.checkpoint.open_folder import open_folder
from pretrain.checkpoint.read import load_weights, newest_complete
from pretrain.config import load_config
from pretrain.tracking.journal import read_metrics
from pretrain.train import train
from tests.process_server import ROOT, ProcessServer

CONFIG = ROOT / "configs" / "demo" / "digits.yaml"
TINY = [
    "objective.model.encoder.image_size=[8,8]",
    "objective.model.encoder.width=32",
    "objective.model.encoder.depth=2",
    "objective.model.decoder_width=16",
    "train.epochs=null",
    "train.global_batch=8",
    "train.log_every=1",
    "train.val_samples=8",
    "train.num_pictures=2",
    "optim.warmup_epochs=0",
    "optim.clip_norm=1.0",
    "optim.ema_decay=0.9",
    "tracking.ship=false",
    "device=cpu",
]


def overrides_of(data: Path, output: Path, name: str, *more: str) -> list[str]:
    """A tiny run called `name` below `output`."""
    return [*TINY, f"data.train={data}", f"data.val={data}", f"output_dir={output}", f"name={name}", *more]


def run_here(overrides: Sequence[str]) -> dict[str, object]:
    """Trains in this process."""
    return train(load_config(CONFIG, overrides), config_path=CONFIG, overrides=list(overrides))


def torchrun(num_processes: int, *arguments: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    return [*launcher, *arguments]


def run_several(server: ProcessServer, num_ranks: int, runs: Sequence[Sequence[str]], *, config: Path = CONFIG) -> None:
    """Trains configurations one after the other on several ranks: one process group for all of them."""
    server.run_ranks(num_ranks, "tests.pretrain.several_runs:main", str(config), [list(run) for run in runs])


def losses(run_dir: Path) -> dict[int, float]:
    """Training loss by step, without points that a resume superseded."""
    return {point.step: point.value for point in read_metrics(run_dir)["train/loss"]}


def final_weights(run_dir: Path, *, ema: bool = False) -> dict[str, torch.Tensor]:
    checkpoint = newest_complete(open_folder(run_dir))
    assert checkpoint is not None
    return load_weights(checkpoint, "model", ema=ema)


def assert_same_weights(one: Path, other: Path, *, to_the_bit: bool = True) -> None:
    for ema in (False, True):
        first, second = final_weights(one, ema=ema), final_weights(other, ema=ema)
        assert first.keys() == second.keys()
        if to_the_bit:
            assert [name for name in first if not torch.equal(first[name], second[name])] == [], f"ema={ema}"
        else:
            one_flat, other_flat = _determined(first), _determined(second)
            assert (one_flat - other_flat).norm() / one_flat.norm() < 1e-4


def _determined(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """All weights in one vector, without the biases of attention's keys: softmax makes their gradient 0, and AdamW
    turns its rounding noise into steps of the full learning rate.
    """
    parts = []
    for name, tensor in sorted(weights.items()):
        query, _, value = tensor.chunk(3) if name.endswith("qkv.bias") else (tensor, None, tensor[:0])
        parts += [query.flatten(), value.flatten()]
    return torch.cat(parts)
