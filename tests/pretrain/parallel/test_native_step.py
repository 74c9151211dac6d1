"""One optimizer step: nothing is read by the host, a gradient that is not finite changes nothing on any rank, and a
finite one gives what the step gave that looked at the norm first.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.objectives.base import Objective
from pretrain.optim import update_ema
from pretrain.optim_config import OptimConfig
from pretrain.parallel.config import ParallelConfig
from pretrain.parallel.native import NativeStrategy
from pretrain.parallel.world import World, pick_device
from tests.process_server import ProcessServer

OPTIM = OptimConfig(base_lr=None, lr=1e-2, clip_norm=0.5, ema_decay=0.9)


def _build() -> Any:
    players = {"one": nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3)), "two": nn.Linear(3, 2)}
    return SimpleNamespace(players=players, blocks=lambda player: [])


def _start(objective: Any) -> None:
    torch.manual_seed(0)
    for module in objective.players.values():
        for parameter in module.parameters():
            nn.init.normal_(parameter)


def _prepare(optim: OptimConfig = OPTIM) -> tuple[NativeStrategy, Objective]:
    strategy = NativeStrategy(ParallelConfig(), optim, World(0, 1, 0, pick_device("cpu"), None, None))
    return strategy, strategy.prepare(_build, _start)


def _backward(objective: Any, player: str, seed: int, factor: float = 1.0) -> None:
    module = objective.players[player]
    inputs = torch.randn(4, next(module.parameters()).shape[1], generator=torch.Generator().manual_seed(seed))
    (factor * module(inputs).square().sum()).backward()


def _snapshot(strategy: NativeStrategy, player: str) -> dict[str, Tensor]:
    state = strategy.state()
    groups = (f"model.{player}", f"optimizer.{player}")
    return {f"{group}.{name}": tensor.detach().clone() for group in groups for name, tensor in state[group].items()}


def _changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    return [name for name in before if not torch.equal(before[name], after[name])]


def test_equal_to_the_bit_with_a_step_that_looks_first() -> None:
    strategy, objective = _prepare()
    module = copy.deepcopy(objective.players["one"])
    weights = list(module.parameters())
    average = [weight.detach().clone() for weight in weights]
    decayed, free = [w for w in weights if w.ndim > 1], [w for w in weights if w.ndim == 1]
    groups = [{"params": decayed, "weight_decay": OPTIM.weight_decay}, {"params": free, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=0.0, betas=OPTIM.betas, eps=OPTIM.eps, fused=True)
    for step in range(5):
        lr = 1e-2 / (step + 1)
        _backward(objective, "one", step)
        norm = strategy.step("one", lr)
        _backward(SimpleNamespace(players={"one": module}), "one", step)
        want = nn.utils.get_total_norm([w.grad for w in weights if w.grad is not None])
        assert float(want) < float("inf")
        assert OPTIM.clip_norm is not None
        nn.utils.clip_grads_with_norm_(weights, OPTIM.clip_norm, want)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
        reference.zero_grad(set_to_none=True)
        update_ema(average, [weight.detach() for weight in weights], 0.9)
        assert norm.shape == ()
        assert norm.dtype == torch.float32
        assert torch.equal(norm, want)
    found = strategy.export("one"), strategy.export("one", ema=True)
    for (name, weight), mean in zip(module.named_parameters(), average, strict=True):
        assert torch.equal(found[0][name], weight.detach())
        assert torch.equal(found[1][name], mean)


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_a_gradient_that_is_not_finite_changes_nothing(factor: float, clip_norm: float | None) -> None:
    strategy, objective = _prepare(OptimConfig(base_lr=None, lr=1e-2, clip_norm=clip_norm, ema_decay=0.9))
    _backward(objective, "one", 0)
    strategy.step("one", 1e-2)
    before = _snapshot(strategy, "one")
    mean_before = strategy.export("one", ema=True)
    _backward(objective, "one", 1, factor)
    assert not torch.isfinite(strategy.step("one", 1e-2))
    assert _changed(before, _snapshot(strategy, "one")) == []
    mean = strategy.export("one", ema=True)  # moves on, towards weights that stayed
    weights = strategy.export("one")
    assert all(torch.equal(mean[n], mean_before[n].lerp(weights[n], 1.0 - 0.9)) for n in mean)
    _backward(objective, "one", 2)  # and the next step works, with the step count of the second update
    strategy.step("one", 1e-2)
    after = _snapshot(strategy, "one")
    assert len(_changed(before, after)) == len(before)
    assert float(after["optimizer.one.0.weight.step"]) == 2.0


def test_the_first_step_may_be_the_bad_one() -> None:
    strategy, objective = _prepare()
    weights = {name: tensor.clone() for name, tensor in strategy.export("one").items()}
    _backward(objective, "one", 0, float("nan"))
    strategy.step("one", 1e-2)
    assert _changed(weights, strategy.export("one")) == []
    state = strategy.state()["optimizer.one"]
    assert all(float(tensor.abs().sum()) == 0.0 for tensor in state.values())


def test_players_skip_on_their_own() -> None:
    strategy, objective = _prepare()
    for player, factor in (("one", float("nan")), ("two", 1.0)):
        _backward(objective, player, 0, factor)
    before = {player: strategy.export(player) for player in ("one", "two")}
    norms = {player: strategy.step(player, 1e-2) for player in ("one", "two")}
    assert not torch.isfinite(norms["one"])
    assert torch.isfinite(norms["two"])
    assert _changed(before["one"], strategy.export("one")) == []
    assert len(_changed(before["two"], strategy.export("two"))) == 2


class _HostReads(TorchDispatchMode):
    """Collects operations that hand a tensor's value to the host: on CUDA each would wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_host_reads_nothing() -> None:
    strategy, objective = _prepare()
    for step in range(2):
        _backward(objective, "one", step)
        with _HostReads() as reads:
            norm = strategy.step("one", 1e-2)
        assert reads.found == []
    with _HostReads() as reads:  # the mode would have seen it
        float(norm)
    assert reads.found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_host_does_not_wait_for_cuda() -> None:
    world = World(0, 1, 0, torch.device("cuda", 0), None, None)
    strategy = NativeStrategy(ParallelConfig(compile="off"), OPTIM, world)
    objective = strategy.prepare(_build, _start)
    module = objective.players["one"]
    for factor in (1.0, float("nan"), 1.0):
        before = strategy.export("one")
        inputs = torch.randn(4, 5, device="cuda")
        (factor * module(inputs).square().sum()).backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            norm = strategy.step("one", 1e-2)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert (_changed(before, strategy.export("one")) == []) == (not torch.isfinite(norm))


@pytest.fixture(scope="module")
def said_by_ranks(process_server: ProcessServer) -> str:
    """One process group of four ranks for all that needs several."""
    return process_server.run_ranks(4, "tests.pretrain.parallel.native_step_ranks:main")


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "hsdp"])
def test_every_rank_skips_what_one_rank_saw(said_by_ranks: str, kind: str) -> None:
    """A value that is not finite on the last rank alone: no rank moves, and the following step is the reference's."""
    assert f"{kind}: skipped alike, then equal" in said_by_ranks


@pytest.mark.distributed
@pytest.mark.parametrize("settings", ["never/0", "always/0", "auto/1", "always/1", "never/2", "always/3"])
def test_prefetch_and_reshard_change_no_number(said_by_ranks: str, settings: str) -> None:
    assert f"fsdp2 {settings}: equal to the bit" in said_by_ranks


@pytest.mark.distributed
def test_weights_gathered_before_a_step_are_not_used_after_it(said_by_ranks: str) -> None:
    assert "validation after a step sees new weights" in said_by_ranks


def test_blocks_that_reshard() -> None:
    from pretrain.parallel import fsdp2

    blocks = [nn.Linear(4, 4) for _ in range(3)]
    assert fsdp2.blocks_resharding(blocks, ParallelConfig(reshard_after_forward="always"), bf16=False) == [True] * 3
    assert fsdp2.blocks_resharding(blocks, ParallelConfig(reshard_after_forward="never"), bf16=False) == [False] * 3
    assert fsdp2.blocks_resharding(blocks, ParallelConfig(), bf16=False) == [False] * 3
    with torch.device("meta"):  # 3 x 400 MB in fp32, half of that in bf16
        large = [nn.Linear(10_000, 10_000) for _ in range(3)]
    assert fsdp2.blocks_resharding(large, ParallelConfig(), bf16=False) == [True, True, False]
    assert fsdp2.blocks_resharding(large, ParallelConfig(), bf16=True) == [False] * 3


def test_shards_must_divide_the_processes() -> None:
    from pretrain.parallel import fsdp2

    assert fsdp2.num_shards("hsdp", ParallelConfig(shards=2), 8, ranks_per_node=4) == 2
    assert fsdp2.num_shards("hsdp", ParallelConfig(), 8, ranks_per_node=4) == 4
    assert fsdp2.num_shards("fsdp2", ParallelConfig(), 8, ranks_per_node=4) == 8
    with pytest.raises(ValueError, match="does not divide"):
        fsdp2.num_shards("hsdp", ParallelConfig(shards=3), 8, ranks_per_node=4)
    with pytest.raises(ValueError, match=r"parallel.prefetch is -1"):
        ParallelConfig(prefetch=-1)


def test_the_optimizer_is_fused() -> None:
    strategy, _ = _prepare()
    assert all(cast(dict[str, Any], group)["fused"] for group in strategy.optimizers["one"].param_groups)
