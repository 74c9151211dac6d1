"""The estimate against real steps: exact without sharding, an upper bound under FSDP2; and what --dry-run says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from launchers.cli import main
from pretrain.config import load_config
from pretrain.memory.estimate import estimate
from pretrain.parallel.config import DeepSpeedConfig
from pretrain.parallel.world import World, pick_device
from tests.pretrain.memory.memory_run import measured_peak
from tests.pretrain.runs import CONFIG, ROOT
from tests.process_server import ProcessServer

SMALL = [
    "data.train=unused",
    "train.epochs=null",
    "train.steps=5",
    "train.global_batch=16",
    "objective.model.encoder.image_size=[16,16]",
    "objective.model.encoder.patch_size=[2,2]",
    "objective.model.encoder.width=64",
    "objective.model.encoder.depth=4",
    "objective.model.decoder_width=64",
    "objective.model.decoder_depth=4",
    "optim.warmup_epochs=0",
    "optim.ema_decay=0.99",
    "optim.clip_norm=1.0",
    "device=cpu",
]


@pytest.mark.filterwarnings("ignore::UserWarning:torch.profiler")
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["train.micro_batch=4"],
        ["parallel.activation_checkpointing=full", "parallel.precision=bf16"],
        ["parallel.activation_checkpointing=selective"],
    ],
    ids=" ".join,
)
def test_one_process(overrides: list[str]) -> None:
    """Exact but for what kernels allocate inside: nothing in fp32, 2% of a model as small as this one in bf16."""
    config = load_config(CONFIG, [*SMALL, *overrides])
    world = World(0, 1, 0, pick_device("cpu"), None, None)
    found = estimate(config, 1)
    tolerance = 0.03 if "parallel.precision=bf16" in overrides else 0.002
    assert found.peak == pytest.approx(measured_peak(config, world, found), rel=tolerance)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ddp", "fsdp2"),
    [
        ([], ["parallel.reshard_after_forward=always"]),
        pytest.param(["train.micro_batch=4"], ["parallel.precision=bf16"], marks=pytest.mark.slow),
    ],
    ids=["plain", "accumulated-bf16"],
)
def test_two_processes(ddp: list[str], fsdp2: list[str], process_server: ProcessServer) -> None:
    """DDP to the percent; FSDP2 between the truth and 25% above it, as gathered weights are taken at their worst."""
    cases = [[*SMALL, "parallel.strategy=ddp", *ddp], [*SMALL, "parallel.strategy=fsdp2", *fsdp2]]
    found = json.loads(process_server.run_ranks(2, "tests.pretrain.memory.memory_run:main", str(CONFIG), cases))
    ratios = [r["estimate"]["peak"] / r["measured"] for r in found]
    assert len(ratios) == len(cases)
    assert ratios[0] == pytest.approx(1.0, rel=0.01)
    assert 0.97 <= ratios[1] <= 1.25, ratios


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_one_gpu(mode: str) -> None:
    """Within 10%: the allocator rounds up, and kernels have workspaces."""
    from pretrain.parallel.native import NativeStrategy
    from tests.pretrain.memory.memory_run import random_batch, step

    overrides = ["device=cuda", "parallel.compile=off", f"parallel.activation_checkpointing={mode}"]
    large = ["objective.model.encoder.width=384", "objective.model.encoder.depth=12", "train.global_batch=128"]
    config = load_config(CONFIG, [*SMALL, *overrides, *large])
    before = torch.cuda.memory_allocated()
    strategy = NativeStrategy(config.parallel, config.optim, World(0, 1, 0, torch.device("cuda", 0), None, None))
    objective = strategy.prepare(config.build_objective, lambda whole: whole.start(0))
    batch = random_batch(objective, 128).to(torch.device("cuda", 0))
    for _ in range(2):
        step(strategy, objective, batch, 1)
    torch.cuda.reset_peak_memory_stats()
    step(strategy, objective, batch, 1)
    assert estimate(config, 1).peak == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.1)


def _with(overrides: list[str], **parallel: Any) -> Any:
    """Half as deep: where estimates are compared with each other, and not with a real step."""
    shallow = ["objective.model.encoder.depth=2", "objective.model.decoder_depth=2"]
    config = load_config(CONFIG, [*SMALL, *shallow, *overrides])
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, **parallel))


def test_sharding_divides_what_it_shards() -> None:
    whole, sharded = (estimate(_with([], strategy=kind), 8) for kind in ("ddp", "fsdp2"))
    assert sharded.optimizer == pytest.approx(whole.optimizer / 8, rel=0.05)
    assert sharded.gradients == pytest.approx(whole.gradients / 8, rel=0.05)
    assert sharded.activations == whole.activations
    replicated = estimate(_with([], strategy="hsdp", shards=4), 8)
    assert replicated.optimizer == pytest.approx(whole.optimizer / 4, rel=0.05)
    kept, freed = (
        estimate(_with([], strategy="fsdp2", reshard_after_forward=mode), 8).gathered for mode in ("never", "always")
    )
    assert freed < kept


def test_zero_stages_and_offload() -> None:
    ddp, one, two, three = (estimate(_with([], strategy=kind), 4) for kind in ("ddp", "zero1", "zero2", "zero3"))
    number = one.num_parameters
    assert one.optimizer == two.optimizer == three.optimizer == 12 * -(-number // 4)  # masters and two moments
    assert (one.gradients, two.gradients) == (4 * number, 4 * -(-number // 4))
    assert one.weights == two.weights == ddp.weights > three.weights
    offloaded = estimate(
        _with([], strategy="zero3", deepspeed=DeepSpeedConfig(offload_optimizer=True, offload_param=True)), 4
    )
    assert offloaded.optimizer == offloaded.average == 0
    assert offloaded.host_offload == 4 * 6 * -(-number // 4)  # weights, masters, moments, gradients, average


def test_cuda_is_planned_without_one() -> None:
    """bf16 by default, and attention in bf16: less than the CPU keeps, where ours computes it in fp32."""
    config = _with(["device=auto"])
    planned = estimate(config, 1, device="cuda")
    assert (planned.device, planned.precision) == ("cuda", "bf16")
    assert planned.activations < estimate(_with([], precision="bf16"), 1).activations


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_checkpointing_under_sharding_in_bf16(device: str) -> None:
    """Blocks compute the same again: LayerNorm in fp32 on CUDA, from weights that FSDP2 gathers in bf16."""
    found = [
        estimate(_with([], strategy="fsdp2", precision="bf16", activation_checkpointing=mode), 8, device=device)
        for mode in ("none", "selective", "full")
    ]
    kept = [one.activations for one in found]
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == 3


@pytest.mark.parametrize("phase", ["phase1", "phase3"])
def test_tokenizers(phase: str) -> None:
    """Several players, of which phase 3 trains a part, and gradients that are differentiated again."""
    config = load_config(ROOT / f"configs/dcae/tiny/{phase}.yaml", ["device=cpu"])
    one, several = estimate(config, 1), estimate(config, 2)
    assert 0 < several.activations < one.activations < one.peak


def test_the_command(tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [
        *SMALL[1:],
        f"data.train={tiny_dataset}",
        f"data.val={tiny_dataset}",
        f"output_dir={tmp_path}",
        "parallel.strategy=fsdp2",
    ]
    command = ["train", str(CONFIG), "--dry-run", "--processes", "4"]
    assert main([*command, "--json", *overrides]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["processes"], result["steps"], result["memory"]["micro_batch"]) == (4, 5, 4)
    assert result["memory"]["peak"] > result["memory"]["weights"] > 0
    assert main([*command, *overrides]) == 0
    assert "activations" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []  # no run folder


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--dry-run", "--processes", "3"], "cannot be divided over 3"),
        (["--dry-run", "--processes", "0"], "expected 1 or more"),
        (["--processes", "4"], "belongs to --dry-run"),
    ],
)
def test_mistakes(tiny_dataset: Path, given: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [*SMALL[1:], f"data.train={tiny_dataset}", f"data.val={tiny_dataset}"]
    assert main(["train", str(CONFIG), *given, *overrides]) == 2
    assert words in capsys.readouterr().err
