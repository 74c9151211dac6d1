"""The loop beside its strategies: its journal, validation, and what it does with a gradient that is not finite."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from data_pipes.batch import BatchPlan
from data_pipes.loader import open_loader
from data_pipes.sequential.pictures import SequentialImages
from data_pipes.transforms.image import EvalTransform
from pretrain.checkpoint.open_folder import open_folder
from pretrain.checkpoint.read import newest_complete
from pretrain.config import load_config
from pretrain.optim import parameter_groups, scheduled_lr
from pretrain.optim_config import OptimConfig
from pretrain.parallel.config import ParallelConfig
from pretrain.parallel.native import NativeStrategy
from pretrain.parallel.world import World
from pretrain.tracking.journal import read_journal, read_metrics
from pretrain.validation import Validator
from pretrain.weights.starting import initialize
from tests.pretrain.runs import CONFIG, final_weights, losses, overrides_of, run_here, run_several
from tests.process_server import ProcessServer

WORLD = World(0, 1, 0, torch.device("cpu"), None, None)


def test_a_run_leaves_a_journal_pictures_and_the_whole_story(tiny_dataset: Path, tmp_path: Path) -> None:
    summary = run_here(overrides_of(tiny_dataset, tmp_path, "run", "train.steps=6", "train.val_every=3"))
    run_dir = tmp_path / "run"
    curves = read_metrics(run_dir)
    assert [point.step for point in curves["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert [point.step for point in curves["val/loss"]] == [3, 6]
    for name in ("train/lr", "train/grad_norm", "throughput/samples_per_s", "throughput/mfu", "data/wait_fraction"):
        assert all(point.value >= 0 for point in curves[name]), name
    assert sorted(path.name for path in (run_dir / "pictures").iterdir()) == ["step-00000003.png", "step-00000006.png"]
    identity = json.loads((run_dir / "run.json").read_text())
    assert identity["resume_command"].startswith("tessera train ")
    assert load_config(run_dir / "config.yaml").name == "run"
    assert summary["samples"] == 48
    assert [r["status"] for r in read_journal(run_dir) if r["type"] == "status"] == ["RUNNING", "FINISHED"]


def test_validation_counts_each_sample_once(tiny_dataset: Path, tmp_path: Path) -> None:
    """61 samples in batches of 8 (the last has 5) and one by one: the same mean."""
    config = load_config(CONFIG, overrides_of(tiny_dataset, tmp_path, "run", "train.steps=1"))
    strategy = NativeStrategy(config.parallel, config.optim, WORLD)
    objective = strategy.prepare(config.build_objective, lambda whole: initialize(whole, config.seed, None))
    samples = SequentialImages(tiny_dataset, EvalTransform(objective.image_size), channels=1)
    means = [
        Validator(samples, len(samples), size, 2, WORLD).run(objective, strategy, 0)["val/loss"] for size in (8, 1, 61)
    ]
    assert means == pytest.approx([means[0]] * 3, rel=1e-5)
    assert Validator(samples, 10, 4, 2, WORLD).num_samples == 10
    assert objective.players["model"].training


@pytest.mark.distributed
def test_two_processes_validate_as_one(tiny_dataset: Path, tmp_path: Path, process_server: ProcessServer) -> None:
    """13 samples over 2 ranks: 8 are split, 5 are run by both and counted once; under FSDP2 no rank waits forever."""
    more = ["train.steps=2", "train.val_samples=13", "train.micro_batch=4"]
    run_here(overrides_of(tiny_dataset, tmp_path, "one", *more))
    run_several(process_server, 2, [overrides_of(tiny_dataset, tmp_path, "two", *more, "parallel.strategy=fsdp2")])
    one, two = (read_metrics(tmp_path / name)["val/loss"][-1].value for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-5)


class _Explodes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))


def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing() -> None:
    strategy = NativeStrategy(ParallelConfig(), OptimConfig(base_lr=None, lr=1.0, ema_decay=0.5), WORLD)

    class Fake:
        def __init__(self) -> None:
            self.players: dict[str, nn.Module] = {"model": _Explodes()}

        def blocks(self, player: str) -> list[nn.Module]:
            return []

    objective = strategy.prepare(Fake, lambda whole: None)  # type: ignore[arg-type]
    weight = objective.players["model"].weight
    for factor, moves in ((1.0, True), (float("nan"), False), (float("inf"), False), (1.0, True)):
        before = {name: {k: v.clone() for k, v in group.items()} for name, group in strategy.state().items()}
        strategy.backward((weight * factor).sum(), "model")
        norm = strategy.step("model", 0.1)
        assert (norm < float("inf")) == moves
        after = strategy.state()
        kept = [group for group in before if not group.startswith("ema.")]  # the average moves on
        same = all(torch.equal(before[g][n], after[g][n]) for g in kept for n in before[g])
        assert same != moves
        assert weight.grad is None


def test_looking_at_the_state_is_no_step(tiny_dataset: Path, tmp_path: Path) -> None:
    """DCP makes missing optimizer state by a step with zero gradients, which would count."""
    overrides = overrides_of(tiny_dataset, tmp_path, "run", "train.steps=1")
    config = load_config(CONFIG, overrides)
    world = World(0, 1, 0, torch.device("cpu"), None, None)
    strategy = NativeStrategy(config.parallel, config.optim, world)
    strategy.prepare(config.build_objective, lambda whole: whole.start(0))
    steps = {name: float(t) for name, t in strategy.state()["optimizer.model"].items() if name.endswith(".step")}
    assert steps
    assert set(steps.values()) == {0.0}


def test_the_loop_is_plain_adamw(tiny_dataset: Path, tmp_path: Path) -> None:
    """The same batches through torch's own optimizer in ten lines."""
    more = ("train.steps=6", "optim.clip_norm=null", "optim.warmup_steps=2", "train.micro_batch=4")
    overrides = overrides_of(tiny_dataset, tmp_path, "run", *more)
    run_here(overrides)
    config, plan = load_config(CONFIG, overrides), BatchPlan(8, 8)
    objective = config.build_objective()
    objective.start(config.seed)
    groups = parameter_groups(objective.players["model"].named_parameters(), config.optim.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=config.optim.betas, eps=config.optim.eps)
    batches = open_loader(config.data, plan, image_size=(8, 8), channels=1, state=None).batches(0)
    found = []
    for step in range(6):
        (turn,) = objective.turns(next(batches).to(torch.device("cpu")), step)
        turn.loss.backward()
        found.append(turn.loss.item())
        for group in optimizer.param_groups:
            group["lr"] = scheduled_lr(
                8 * step, peak=config.optim.peak_lr(8), total=48, warmup=16, minimum=0.0, schedule="cosine"
            )
        optimizer.step()
        optimizer.zero_grad()
    assert list(losses(tmp_path / "run").values()) == pytest.approx(found, rel=1e-5)


def test_a_run_whose_gradients_stay_broken_stops_and_keeps_its_checkpoint(tiny_dataset: Path, tmp_path: Path) -> None:
    overrides = overrides_of(tiny_dataset, tmp_path, "run", "train.steps=60", "checkpoint.every_steps=2")
    broken = [*overrides, "optim.lr=1e18", "optim.clip_norm=null", "guard.nonfinite_steps=2", "optim.warmup_steps=3"]
    with pytest.raises(FloatingPointError, match=r"cannot go back.*Checkpoints are untouched"):
        run_here(broken)
    assert newest_complete(open_folder(tmp_path / "run")) is not None
    assert [r["status"] for r in read_journal(tmp_path / "run") if r["type"] == "status"][-1] == "FAILED"


def test_a_run_starts_from_somebody_elses_encoder(tiny_dataset: Path, tmp_path: Path) -> None:
    """A file in timm's layout: the encoder is taken over, the decoder it lacks starts fresh."""
    run_here(overrides_of(tiny_dataset, tmp_path, "first", "train.steps=2"))
    weights = final_weights(tmp_path / "first")
    encoder = {name.removeprefix("encoder."): t for name, t in weights.items() if name.startswith("encoder.")}
    save_file(encoder, tmp_path / "encoder.safetensors")
    start = f"objective.init_from={tmp_path / 'encoder.safetensors'}"
    still = [start, "train.steps=1", "optim.lr=0.0", "optim.ema_decay=null"]
    run_here(overrides_of(tiny_dataset, tmp_path, "second", *still))
    second = final_weights(tmp_path / "second")
    assert all(torch.equal(second[f"encoder.{name}"], tensor) for name, tensor in encoder.items())
    assert not torch.equal(second["decoder.pred.weight"], weights["decoder.pred.weight"])
    with pytest.raises(ValueError, match=r"init_from is /gone\.pt"):
        run_here(overrides_of(tiny_dataset, tmp_path, "third", "train.steps=1", "objective.init_from=/gone.pt"))


def test_bf16_stays_close_to_fp32(tiny_dataset: Path, tmp_path: Path) -> None:
    run_here(overrides_of(tiny_dataset, tmp_path, "fp32", "train.steps=10"))
    run_here(overrides_of(tiny_dataset, tmp_path, "bf16", "train.steps=10", "parallel.precision=bf16"))
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "fp32"), rel=2e-2)
    assert losses(tmp_path / "bf16") != losses(tmp_path / "fp32")
    assert {tensor.dtype for tensor in final_weights(tmp_path / "bf16").values()} == {torch.float32}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_run_compiles_and_learns(tiny_dataset: Path, tmp_path: Path) -> None:
    overrides = overrides_of(tiny_dataset, tmp_path, "run", "train.steps=30", "device=cuda", "parallel.compile=blocks")
    run_here(overrides)
    curve = losses(tmp_path / "run")
    assert curve[30] < curve[1]
