"""What a rank does in the tests of DeepSpeed: several short trainings under any strategy, in one process group.

Each job writes `FOLDER/<name>.pt` (losses, norms, weights and average of every player) and, if told so, a checkpoint.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipes.batch import Batch
from pretrain.checkpoint.checkpoints import Checkpoints
from pretrain.checkpoint.config import CheckpointConfig
from pretrain.checkpoint.saver import Saver
from pretrain.models.config import MAEConfig, ViTConfig
from pretrain.models.vit import ViT
from pretrain.objectives.base import Objective, Turn
from pretrain.objectives.image_mae import ImageMAEObjective
from pretrain.objectives.mae_config import ImageMAEConfig
from pretrain.optim_config import OptimConfig
from pretrain.parallel.choose import make_strategy
from pretrain.parallel.config import DeepSpeedConfig, ParallelConfig
from pretrain.parallel.world import World, join_world, leave_world
from pretrain.train import each_turn
from pretrain.watchdog.config import WatchdogConfig
from pretrain.watchdog.watchdog import Watchdog

GLOBAL_BATCH = 8


@dataclasses.dataclass(frozen=True)
class Job:
    """One training."""

    name: str
    strategy: str
    steps: int = 10
    """Up to this step, from that of `resume`."""
    objective: str = "mae"
    micro_batch: int | None = None
    deepspeed: dict[str, Any] = dataclasses.field(default_factory=dict)
    parallel: dict[str, Any] = dataclasses.field(default_factory=dict)
    optim: dict[str, Any] = dataclasses.field(default_factory=dict)
    save_at: int | None = None
    """Step after which a checkpoint is written into `FOLDER/<name>/`."""
    resume: str | None = None
    """Name of the job whose checkpoint this one continues from."""
    poison: int | None = None
    """Step whose loss is not a number, on the last rank only."""


class Pair(Objective):
    """Two players with sizes that divide by nothing, a frozen part, and buffers: what a tokenizer with a critic has."""

    backbone_player = "generator"
    backbone_prefix = ""

    def __init__(self) -> None:
        self.generator = Generator()
        self.critic = nn.Sequential(nn.Linear(13, 9), nn.GELU(), nn.Linear(9, 1))
        self.players: dict[str, nn.Module] = {"generator": self.generator, "critic": self.critic}

    def turns(self, batch: Batch, step: int) -> Iterator[Turn]:
        generator, critic = self.players["generator"], self.players["critic"]
        x = batch.images.flatten(1)[:, :13].float() / 255
        critic.requires_grad_(False)
        reconstruction = generator(x)
        loss = F.mse_loss(reconstruction, x) - 0.1 * critic(reconstruction).mean()
        critic.requires_grad_(True)
        yield Turn(loss, "generator")
        with torch.no_grad():
            fake = reconstruction.detach()
        yield Turn(F.relu(1 - critic(x)).mean() + F.relu(1 + critic(fake)).mean(), "critic")

    def blocks(self, player: str) -> list[nn.Module]:
        return list(self.generator.layers) if player == "generator" else []

    def init_weights(self, player: str) -> None:
        for parameter in self.players[player].parameters():
            nn.init.normal_(parameter, std=0.2)

    def validate(self, batch: Batch, step: int) -> dict[str, Tensor]:
        raise NotImplementedError

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        raise NotImplementedError

    def flops_per_sample(self) -> float:
        return 0.0

    def build_backbone(self) -> ViT:
        raise NotImplementedError

    image_size = (8, 8)
    in_channels = 1
    mean = (0.5,)
    std = (0.5,)


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("scratch", torch.ones(2), persistent=False)
        self.frozen = nn.Linear(13, 7).requires_grad_(False)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(7, 11), nn.GELU(), nn.Linear(11, 7)) for _ in range(2))
        self.shift = nn.Parameter(torch.zeros(1, 7))
        self.out = nn.Linear(7, 13)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.calls += 1
            self.scale += 0.5
        hidden = self.frozen(x) + self.shift
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        out: Tensor = self.out(hidden)
        return out


def build(name: str) -> Objective:
    if name == "pair":
        return Pair()
    encoder = ViTConfig(image_size=(8, 8), patch_size=(2, 2), in_channels=1, width=32, depth=2, heads=2)
    return ImageMAEObjective(
        ImageMAEConfig(MAEConfig(encoder, decoder_width=16, decoder_depth=1, decoder_heads=2)), seed=0
    )


def batch_at(position: int, size: int) -> Batch:
    """Pictures that depend on their positions alone, with something to learn."""
    positions = torch.arange(position, position + size)
    rows = torch.linspace(0, 1, 8).outer(torch.linspace(0, 1, 8))
    pictures = [
        (rows * (torch.rand(1, generator=torch.Generator().manual_seed(int(p))) * 200 + 55)).to(torch.uint8)
        for p in positions
    ]
    return Batch(torch.stack(pictures)[:, None], torch.full((size,), -1), positions, [str(int(p)) for p in positions])


def run(job: Job, world: World, folder: Path) -> None:
    optim = OptimConfig(**{"base_lr": None, "lr": 1e-2, "clip_norm": 0.5, "ema_decay": 0.9, **job.optim})
    parallel = ParallelConfig(
        strategy=job.strategy,  # type: ignore[arg-type]
        deepspeed=DeepSpeedConfig(**job.deepspeed),
        **job.parallel,
    )
    strategy = make_strategy(parallel, optim, world)
    objective = strategy.prepare(lambda: build(job.objective), lambda whole: whole.start(seed=0))
    saver = Saver(Checkpoints(folder / job.name, CheckpointConfig(), world))
    watchdog = Watchdog(folder, world, WatchdogConfig(enabled=False))
    begin = 0
    if job.resume is not None:
        state = strategy.state()
        source = Checkpoints(folder / job.resume, CheckpointConfig(), world)
        found = source.find()
        assert found is not None
        begin = source.load(found, state)["step"]
        strategy.load_state(state)
    micro_batch = job.micro_batch or GLOBAL_BATCH // world.size
    accumulate = GLOBAL_BATCH // (micro_batch * world.size)
    losses: dict[str, list[float]] = {}
    norms: dict[str, list[float]] = {}
    for step in range(begin, job.steps):
        if job.poison == step:
            before = {group: {k: v.clone() for k, v in tensors.items()} for group, tensors in strategy.state().items()}
        for micro in range(accumulate):
            batch = batch_at(step * GLOBAL_BATCH + (micro * world.size + world.rank) * micro_batch, micro_batch)
            strategy.accumulate(micro == accumulate - 1)
            for turn in each_turn(objective, strategy, batch.to(world.device), step, watchdog):
                loss = turn.loss
                if job.poison == step and world.rank == world.size - 1 and turn.player == objective.backbone_player:
                    loss = loss * float("nan")
                strategy.backward(loss / accumulate, turn.player)
                losses.setdefault(turn.player, []).append(float(turn.loss.detach()))
                if micro == accumulate - 1:
                    norm = strategy.step(turn.player, lr=1e-2 * (1 - step / 100))
                    assert norm.shape == (), norm
                    norms.setdefault(turn.player, []).append(float(norm))
        if job.poison == step:
            assert_untouched(before, strategy.state(), objective.backbone_player)
        if step == 3 and job.objective == "mae":  # a look in between disturbs nothing
            with strategy.autocast():
                assert objective.validate(batch_at(0, 2).to(world.device), step)["loss"].isfinite()
        if job.save_at == step + 1:
            saver.save(step + 1, strategy.state(), {"step": step + 1, "position": 0}, "name: test\n")
            saver.wait()
    saver.close()
    means = {
        player: (world.sum(torch.tensor(values, dtype=torch.float64)) / world.size)
        .view(-1, accumulate)
        .mean(1)
        .tolist()
        for player, values in losses.items()
    }
    found_weights = {
        f"{player}{'.ema' if ema else ''}": strategy.export(player, ema=ema)
        for player in objective.players
        for ema in ([False, True] if optim.ema_decay is not None else [False])
    }
    if world.is_main:
        torch.save({"losses": means, "norms": norms, "weights": found_weights}, folder / f"{job.name}.pt")


def assert_untouched(before: dict[str, dict[str, Tensor]], after: dict[str, dict[str, Tensor]], player: str) -> None:
    """A skipped step changes no trained weight and nothing of the optimizer."""
    buffers = ("calls", "scale")
    for group in (f"model.{player}", f"optimizer.{player}"):
        for name, old in before[group].items():
            new = after[group][name]
            same = torch.equal(getattr(old, "piece", old), getattr(new, "piece", new))
            assert same or name in buffers, f"{group}.{name}"


def main(jobs: list[dict[str, Any]], folder: str) -> None:
    """jobs: the fields of `Job`."""
    torch.set_num_threads(1)
    world = join_world("cpu", timeout_s=1800)
    for job in jobs:
        run(Job(**job), world, Path(folder))
    leave_world()


def import_deepspeed() -> None:
    """As the engine imports it for a run on the CPU, for all processes that are forked afterwards."""
    from pretrain.parallel.deepspeed import _without_mlflow

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with _without_mlflow():
        import deepspeed  # noqa: F401
