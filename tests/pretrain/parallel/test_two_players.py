"""A tokenizer and its discriminator under every engine: the same losses and weights, one checkpoint, exact resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretrain.checkpoint.dcp import read_tensors
from pretrain.checkpoint.open_folder import open_folder
from pretrain.checkpoint.read import load_weights, newest_complete
from pretrain.config import load_config
from pretrain.tracking.journal import read_metrics
from pretrain.train import train
from tests.pretrain.runs import ROOT, losses, run_several
from tests.process_server import ProcessServer

CONFIG = ROOT / "configs" / "dcae" / "tiny" / "phase3.yaml"
STEPS = 8
GAME = "train/discriminator_loss"


def overrides_of(data: Path, output: Path, name: str, *more: str) -> list[str]:
    """The whole autoencoder and the discriminator play from step 2 on; all of a sample's losses are its own."""
    return [
        f"name={name}",
        f"output_dir={output}",
        f"data.train={data}",
        "data.val=null",
        f"train.steps={STEPS}",
        "train.global_batch=8",
        "train.log_every=1",
        "train.num_pictures=2",
        "objective.init_from=null",
        "objective.trained=[all]",
        "objective.image_size=[12,12]",
        "objective.model.widths=[8,16,32]",
        "objective.model.decoder_norms=[rms,rms,rms]",
        "objective.adversarial.warmup_steps=2",
        "objective.adversarial.ramp_steps=2",
        "objective.adversarial.r1_every=3",
        "checkpoint.every_steps=4",
        "tracking.ship=false",
        "device=cpu",
        *more,
    ]


def run_here(overrides: list[str]) -> dict[str, object]:
    return train(load_config(CONFIG, overrides), config_path=CONFIG, overrides=overrides)


def game(run_dir: Path) -> list[float]:
    return [point.value for point in read_metrics(run_dir)[GAME]]


def weights(run_dir: Path, player: str) -> dict[str, torch.Tensor]:
    checkpoint = newest_complete(open_folder(run_dir))
    assert checkpoint is not None
    return load_weights(checkpoint, player)


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    first, second = (torch.cat([w[name].flatten().double() for name in sorted(one)]) for w in (one, other))
    return float((first - second).norm() / first.norm())


@pytest.mark.distributed
def test_ddp_and_fsdp2_play_the_same_game_and_resume_it_to_the_bit(
    tiny_dataset: Path, tmp_path: Path, process_server: ProcessServer
) -> None:
    def run(name: str, *more: str) -> list[str]:
        return overrides_of(tiny_dataset, tmp_path, name, *more)

    run_here(run("single"))
    engines = ("ddp", "fsdp2")
    run_several(process_server, 2, [run(name, f"parallel.strategy={name}") for name in engines], config=CONFIG)
    wanted = losses(tmp_path / "single")
    assert list(wanted) == list(range(1, STEPS + 1))
    for name in engines:
        assert losses(tmp_path / name) == pytest.approx(wanted, rel=1e-4), name
        assert game(tmp_path / name) == pytest.approx(game(tmp_path / "single"), rel=1e-3), name
        for player in ("autoencoder", "discriminator"):
            assert distance(weights(tmp_path / "single", player), weights(tmp_path / name, player)) < 1e-3, name

    # The whole game is in the checkpoint: what the last save left is thrown away, and the run goes on from step 4.
    newest = newest_complete(open_folder(tmp_path / "single"))
    assert newest is not None
    for group in (
        "model.discriminator.lecam.",
        "optimizer.discriminator.",
        "optimizer.autoencoder.",
        "ema.autoencoder.",
    ):
        assert read_tensors(newest, group), group
    before = {
        name: [weights(tmp_path / name, player) for player in ("autoencoder", "discriminator")] for name in engines
    }
    for name in engines:
        (tmp_path / name / "checkpoints" / f"step-{STEPS:08d}" / "COMPLETE").unlink()
    run_several(process_server, 2, [run(name, f"parallel.strategy={name}") for name in engines], config=CONFIG)
    for name in engines:
        for old, player in zip(before[name], ("autoencoder", "discriminator"), strict=True):
            new = weights(tmp_path / name, player)
            assert [key for key in old if not torch.equal(old[key], new[key])] == [], (name, player)


@pytest.mark.distributed
@pytest.mark.slow
def test_the_other_engines(tiny_dataset: Path, tmp_path: Path, deepspeed_server: ProcessServer) -> None:
    run_here(overrides_of(tiny_dataset, tmp_path, "single"))
    hsdp = overrides_of(tiny_dataset, tmp_path, "hsdp", "parallel.strategy=hsdp", "parallel.shards=2")
    run_several(deepspeed_server, 4, [hsdp], config=CONFIG)
    zeros = ("zero1", "zero2", "zero3")
    runs = [overrides_of(tiny_dataset, tmp_path, name, f"parallel.strategy={name}") for name in zeros]
    run_several(deepspeed_server, 2, runs, config=CONFIG)
    for name in ("hsdp", *zeros):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "single"), rel=1e-4), name
        assert game(tmp_path / name) == pytest.approx(game(tmp_path / "single"), rel=1e-3), name


@pytest.mark.distributed
def test_what_is_frozen_is_frozen_under_every_engine(
    tiny_dataset: Path, tmp_path: Path, deepspeed_server: ProcessServer
) -> None:
    """Phase 2's parts, with batch norms: under FSDP2 and ZeRO too, only they move, and only they have an optimizer."""
    options = ["objective.trained=[latent]", "objective.model.decoder_norms=[batch,batch,rms]", "train.steps=3"]
    start = overrides_of(tiny_dataset, tmp_path, "start", *options, "train.steps=1", "optim.lr=1e-30")
    run_here(start)
    names = ("ddp", "fsdp2", "zero2")
    runs = [
        overrides_of(
            tiny_dataset,
            tmp_path,
            name,
            *options,
            f"parallel.strategy={name}",
            f"objective.init_from={tmp_path / 'start'}",
        )
        for name in names
    ]
    run_several(deepspeed_server, 2, runs, config=CONFIG)
    begin = weights(tmp_path / "start", "autoencoder")
    for name in names:
        end = weights(tmp_path / name, "autoencoder")
        moved = {key for key in begin if not torch.equal(begin[key], end[key])}
        assert moved == {
            key
            for key in begin
            if ".project_" in key and not key.startswith(("encoder.project_in", "decoder.project_out"))
        }
        checkpoint = newest_complete(open_folder(tmp_path / name))
        assert checkpoint is not None
        stepped = {key.rpartition(".")[0] for key in read_tensors(checkpoint, "optimizer.autoencoder.")}
        assert stepped == moved, name
