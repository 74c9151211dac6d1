"""Run by test_native_step.py on four ranks: prints a sentence for everything that holds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.optim_config import OptimConfig
from pretrain.parallel.config import ParallelConfig
from pretrain.parallel.native import NativeStrategy
from pretrain.parallel.world import World, join_world, leave_world

OPTIM = OptimConfig(base_lr=None, lr=1e-2, clip_norm=0.5, ema_decay=0.9)
NUM_BLOCKS = 4


class Net(nn.Module):
    """Blocks between two layers of the root."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(NUM_BLOCKS))
        self.head = nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.embed(inputs)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        result: Tensor = self.head(hidden)
        return result


def build() -> Any:
    net = Net()
    return SimpleNamespace(backbone_player="model", players={"model": net}, blocks=lambda player: list(net.blocks))


def initialize(objective: Any) -> None:
    torch.manual_seed(0)
    for parameter in objective.players["model"].parameters():
        nn.init.normal_(parameter, std=0.5)


def inputs_of(rank: int, step: int) -> Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(100 * step + rank))


def run(config: ParallelConfig, world: World, bad_step: int | None, validate: bool = False) -> dict[str, Tensor]:
    """Four steps; the weights on rank 0, with the norms and the validation's output."""
    strategy = NativeStrategy(config, OPTIM, world)
    objective = strategy.prepare(build, initialize)
    module = objective.players["model"]
    found: dict[str, Tensor] = {}
    for step in range(4):
        factor = float("nan") if step == bad_step and world.rank == world.size - 1 else 1.0
        (factor * module(inputs_of(world.rank, step)).square().mean()).backward()
        before = strategy.export("model")
        if validate:
            # Gathers weights and, without a backward pass, leaves them gathered where blocks do not reshard.
            with torch.no_grad():
                module(inputs_of(0, 99))
        norm = strategy.step("model", 1e-2)
        assert torch.isfinite(norm).item() == (step != bad_step), norm
        after = strategy.export("model")
        moved = [name for name in before if not torch.equal(before[name], after[name])]
        assert world.any(bool(moved)) == (step != bad_step), (step, moved)
        found[f"norm{step}"] = norm
    if validate:
        with torch.no_grad():
            found["output"] = module(inputs_of(0, 99)).float()
    return found | strategy.export("model") | {f"ema.{n}": t for n, t in strategy.export("model", ema=True).items()}


def differences(one: dict[str, Tensor], other: dict[str, Tensor], exact: bool) -> list[str]:
    assert one.keys() == other.keys()
    same = torch.equal if exact else lambda a, b: torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)
    return [name for name in one if not same(one[name], other[name])]


def main() -> None:
    torch.set_num_threads(1)
    world = join_world("cpu", timeout_s=1800)
    bad = {
        kind: run(ParallelConfig(strategy=kind, shards=2 if kind == "hsdp" else None), world, bad_step=2)  # type: ignore[arg-type]
        for kind in ("ddp", "fsdp2", "hsdp")
    }
    for kind, found in bad.items():
        if world.is_main:
            assert differences(bad["ddp"], found, exact=False) == [], kind
            print(f"{kind}: skipped alike, then equal")
    want = run(ParallelConfig(strategy="fsdp2", reshard_after_forward="always", prefetch=0), world, None)
    for reshard, prefetch in (("never", 0), ("always", 0), ("auto", 1), ("always", 1), ("never", 2), ("always", 3)):
        config = ParallelConfig(strategy="fsdp2", reshard_after_forward=reshard, prefetch=prefetch)  # type: ignore[arg-type]
        found = run(config, world, None)
        if world.is_main:
            assert differences(want, found, exact=True) == [], (reshard, prefetch)
            print(f"fsdp2 {reshard}/{prefetch}: equal to the bit")
    outputs = [
        run(ParallelConfig(strategy="fsdp2", reshard_after_forward=reshard), world, None, validate=True)["output"]  # type: ignore[arg-type]
        for reshard in ("always", "never")
    ]
    assert torch.equal(*outputs)
    if world.is_main:
        print("validation after a step sees new weights")
    leave_world()
