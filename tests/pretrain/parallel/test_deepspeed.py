"""ZeRO-1, 2, 3 and offload train like DDP, FSDP2 and a single process, and their checkpoints travel between them all.

One process group for many short trainings, of ranks that found DeepSpeed imported: that takes longer than they do.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.optim_config import OptimConfig
from pretrain.parallel.choose import make_strategy
from pretrain.parallel.config import ParallelConfig
from pretrain.parallel.world import World, pick_device
from tests.pretrain.parallel.zero_runs import Job, run
from tests.process_server import ProcessServer

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the extra deepspeed"),
]

STAGES = ("zero1", "zero2", "zero3")
ALONE = World(0, 1, 0, pick_device("cpu"), None, None)


def run_jobs(server: ProcessServer, num_ranks: int, jobs: list[Job], folder: Path) -> None:
    fields = [dataclasses.asdict(job) for job in jobs]
    server.run_ranks(num_ranks, "tests.pretrain.parallel.zero_runs:main", fields, str(folder))


def result(folder: Path, name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(folder / f"{name}.pt", weights_only=True)
    return loaded


def assert_close(folder: Path, name: str, wanted: str, *, first: int = 0, rel: float = 5e-5) -> None:
    """Losses and norms of `name`, which began at step `first`, and its weights and averages if it ran to the end."""
    one, other = result(folder, name), result(folder, wanted)
    for player, losses in one["losses"].items():
        steps = slice(first, first + len(losses))
        assert losses == pytest.approx(other["losses"][player][steps], rel=rel), f"{name}: {player}"
        norms, wanted_norms = one["norms"][player], other["norms"][player][steps]
        finite = [norm < float("inf") for norm in norms]
        assert finite == [norm < float("inf") for norm in wanted_norms], f"{name}: {player}"
        pairs = [
            pair for pair, is_finite in zip(zip(norms, wanted_norms, strict=True), finite, strict=True) if is_finite
        ]
        assert [a for a, _ in pairs] == pytest.approx([b for _, b in pairs], rel=20 * rel), f"{name}: {player}"
        if steps.stop < len(other["losses"][player]):
            return
    assert one["weights"].keys() == other["weights"].keys()
    for player, tensors in one["weights"].items():
        assert tensors.keys() == other["weights"][player].keys(), f"{name}: {player}"
        difference = _determined(tensors) - _determined(other["weights"][player])
        assert difference.norm() < 2 * rel * _determined(tensors).norm(), f"{name}: {player}"


def _determined(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """All of them, without the biases of attention's keys: they have no gradient but rounding noise."""
    parts = [tensor.chunk(3)[2] if name.endswith("qkv.bias") else tensor for name, tensor in sorted(weights.items())]
    return torch.cat([part.flatten().double() for part in parts])


def assert_equal(folder: Path, name: str, wanted: str, *, first: int) -> None:
    one, other = result(folder, name), result(folder, wanted)
    for player in one["losses"]:
        assert one["losses"][player] == other["losses"][player][first:], f"{name}: {player}"
        assert one["norms"][player] == other["norms"][player][first:], f"{name}: {player}"
    for player, tensors in one["weights"].items():
        different = [key for key, tensor in tensors.items() if not torch.equal(tensor, other["weights"][player][key])]
        assert different == [], f"{name}: {player}"


@pytest.fixture(scope="module")
def trained(deepspeed_server: ProcessServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All trainings that the tests below look at: on one process here, and on two ranks."""
    folder = tmp_path_factory.mktemp("zero")
    fields = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    (folder / "all_partitioned.json").write_text(json.dumps(fields))
    run(Job("single", "single", save_at=4), ALONE, folder)
    jobs = [Job("ddp", "ddp"), Job("fsdp2", "fsdp2"), Job("pair_ddp", "ddp", objective="pair", micro_batch=2, poison=3)]
    for zero in STAGES:
        # Parameters as small as these would be kept whole by every rank.
        partitioned = {"ds_config": str(folder / "all_partitioned.json")} if zero == "zero3" else {}
        offload = {"offload_optimizer": True, "offload_param": zero == "zero3"}
        jobs += [
            Job(zero, zero, deepspeed=partitioned, save_at=6),
            Job(f"{zero}_resumed", zero, deepspeed=partitioned, resume=zero),
            Job(f"{zero}_offload", zero, deepspeed=offload, micro_batch=2),
            Job(f"{zero}_pair", zero, objective="pair", micro_batch=2, poison=3),
        ]
    jobs += [
        Job("zero3_from_single", "zero3", steps=6, resume="single", save_at=6),
        Job("fsdp2_from_zero3", "fsdp2", steps=8, resume="zero3_from_single", save_at=8),
        Job("zero1_from_fsdp2", "zero1", steps=9, resume="fsdp2_from_zero3", save_at=9),
    ]
    run_jobs(deepspeed_server, 2, jobs, folder)
    run(Job("single_from_zero1", "single", resume="zero1_from_fsdp2"), ALONE, folder)
    return folder


@pytest.mark.parametrize("zero", STAGES)
class TestStage:
    def test_it_learns_what_the_others_learn(self, trained: Path, zero: str) -> None:
        losses = result(trained, zero)["losses"]["model"]
        assert losses[-1] < 0.5 * losses[0]
        for reference in ("single", "ddp", "fsdp2"):
            assert_close(trained, zero, reference)

    def test_offload_and_accumulation_change_nothing(self, trained: Path, zero: str) -> None:
        assert_close(trained, f"{zero}_offload", "single")

    def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(self, trained: Path, zero: str) -> None:
        assert_equal(trained, f"{zero}_resumed", zero, first=6)

    def test_two_players_and_a_step_that_every_rank_skips(self, trained: Path, zero: str) -> None:
        """One rank's loss is not a number in step 3. That a skipped step leaves weights and optimizer as they were is
        asserted in the run itself; here, that all goes on as under DDP: averages, frozen weights and buffers included.
        """
        norms = result(trained, f"{zero}_pair")["norms"]["generator"]
        assert [step for step, norm in enumerate(norms) if not norm < float("inf")] == [3]
        assert_close(trained, f"{zero}_pair", "pair_ddp")


def test_checkpoints_travel_between_engines_and_world_sizes(trained: Path) -> None:
    for first, name in ((4, "zero3_from_single"), (6, "fsdp2_from_zero3"), (8, "zero1_from_fsdp2")):
        assert_close(trained, name, "single", first=first)
    assert_close(trained, "single_from_zero1", "single", first=9)


@pytest.mark.slow
def test_over_50_steps_and_on_other_world_sizes(deepspeed_server: ProcessServer, tmp_path: Path) -> None:
    """About two minutes: 50 steps in fp32, bf16, activation checkpointing, one and four ranks."""
    run(Job("single", "single", steps=50, save_at=20), ALONE, tmp_path)
    jobs = [Job("fsdp2", "fsdp2", steps=50), Job("ddp_bf16", "ddp", parallel={"precision": "bf16"})]
    for zero in STAGES:
        jobs += [
            Job(f"{zero}_{mode}", zero, parallel={"activation_checkpointing": mode}) for mode in ("selective", "full")
        ]
        jobs += [Job(zero, zero, steps=50), Job(f"{zero}_bf16", zero, parallel={"precision": "bf16"})]
    run_jobs(deepspeed_server, 2, jobs, tmp_path)
    run_jobs(deepspeed_server, 4, [Job("four_zero3", "zero3", steps=30, resume="single", save_at=30)], tmp_path)
    run_jobs(deepspeed_server, 1, [Job("one_zero2", "zero2", steps=40, resume="four_zero3", save_at=40)], tmp_path)
    run(Job("ended", "single", steps=50, resume="one_zero2"), ALONE, tmp_path)
    for zero in STAGES:
        assert_close(tmp_path, zero, "fsdp2", rel=2e-4)
        assert_close(tmp_path, zero, "single", rel=2e-4)
        for mode in ("selective", "full"):
            assert_close(tmp_path, f"{zero}_{mode}", "single")
        # Stages 1 and 2 round as DDP does; stage 3 gathers and reduces in bf16 besides.
        assert_close(tmp_path, f"{zero}_bf16", "ddp_bf16", rel=2e-3 if zero != "zero3" else 2e-2)
    assert_close(tmp_path, "four_zero3", "single", first=20, rel=2e-4)
    assert_close(tmp_path, "one_zero2", "single", first=30, rel=2e-4)
    assert_close(tmp_path, "ended", "single", first=40, rel=2e-4)


def test_it_asks_for_torchrun() -> None:
    with pytest.raises(ValueError, match="zero2, but this process was not started by torchrun"):
        make_strategy(ParallelConfig(strategy="zero2"), OptimConfig(), ALONE)
