"""The three phases of a tokenizer in one command: chained, killed in each, resumed to the bit."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint.open_folder import open_folder
from pretrain.checkpoint.read import find_damage, load_weights, newest_complete
from pretrain.config import ConfigError
from pretrain.phases import is_pipeline, load_pipeline
from pretrain.pipeline import run_pipeline
from tests.faults.harness import JournalTail
from tests.pretrain.runs import ROOT, losses
from tests.process_server import ProcessServer
from tests.processes import PATIENCE_S, wait_until

PIPELINE = ROOT / "configs" / "dcae" / "tiny" / "pipeline.yaml"
STEPS = 16
PHASES = ("phase1", "phase2", "phase3")


def overrides_of(data: Path, output: Path, name: str, *more: str) -> list[str]:
    size = [f"{phase}.objective.image_size=[{side},{side}]" for phase, side in zip(PHASES, (8, 16, 16), strict=True)]
    return [
        f"name={name}",
        f"output_dir={output}",
        f"data.train={data}",
        f"data.val={data}",
        f"train.steps={STEPS}",
        "train.global_batch=4",
        "optim.warmup_steps=4",
        "train.log_every=1",
        "train.val_every=1000",
        "train.val_samples=4",
        "train.num_pictures=2",
        "objective.model.widths=[8,16,32]",
        "checkpoint.every_steps=2",
        "tracking.ship=false",
        "device=cpu",
        *size,
        "phase3.objective.adversarial.warmup_steps=4",
        "phase3.objective.adversarial.r1_every=3",
        *more,
    ]


def weights(run_dir: Path, player: str, *, ema: bool = False) -> dict[str, torch.Tensor]:
    checkpoint = newest_complete(open_folder(run_dir))
    assert checkpoint is not None
    return load_weights(checkpoint, player, ema=ema)


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_three_phases_killed_in_each_end_as_uninterrupted_ones(
    tiny_dataset: Path, tmp_path: Path, process_server: ProcessServer
) -> None:
    seed = int(os.environ.get("KILL_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 30)
    print(f"KILL_SEED={seed}")
    chance = random.Random(seed)

    def start(name: str, *pauses: float) -> int:
        """pauses: how many seconds to wait before the last step, in each phase that this start trains in."""
        arguments = [str(PIPELINE), *overrides_of(tiny_dataset, tmp_path, name)]
        environment = {
            "TESSERA_TEST_RECORD": str(tmp_path / f"{name}-record"),
            "TESSERA_TEST_PAUSE": ",".join(f"data:{STEPS - 1}:0:{seconds}" for seconds in pauses),
        }
        return process_server.start("tests.faults.worker:main", [arguments], environment, tmp_path / f"{name}.log")

    whole = start("whole")
    for number, phase in enumerate(PHASES):
        journal, due = JournalTail(tmp_path / f"killed-{phase}"), chance.randrange(4, STEPS)
        killed = start("killed", *([0.0] if number else []), PATIENCE_S)  # first the end of the phase before

        def has_come(journal: JournalTail = journal, due: int = due, killed: int = killed) -> bool:
            assert process_server.code(killed) is None, (tmp_path / "killed.log").read_text()[-3000:]
            return journal.look() >= due

        wait_until(has_come, f"step {due} of {phase}")
        os.kill(killed, signal.SIGKILL)
        assert process_server.wait([killed]) == [-signal.SIGKILL]
        assert journal.look() < STEPS, "killed too late to prove anything"
    killed = start("killed")
    assert process_server.wait([whole, killed]) == [0, 0], (tmp_path / "killed.log").read_text()[-3000:]

    for phase in PHASES:
        one, other = tmp_path / f"whole-{phase}", tmp_path / f"killed-{phase}"
        assert list(losses(one)) == list(range(1, STEPS + 1))
        assert losses(other) == losses(one), phase
        for ema in (False, True):
            assert_equal(weights(one, "autoencoder", ema=ema), weights(other, "autoencoder", ema=ema))
    assert_equal(weights(one, "discriminator"), weights(other, "discriminator"))
    # Each phase started from the moving average of the one before, and left what it does not train as it was.
    first, second, third = (weights(tmp_path / f"whole-{phase}", "autoencoder", ema=True) for phase in PHASES)
    middle = {name for name in first if name.startswith(("encoder.project_out.", "decoder.project_in."))}
    head = {name for name in first if name.startswith("decoder.project_out.")}
    assert {name for name in first if not torch.equal(first[name], second[name])} == middle
    assert {name for name in first if not torch.equal(second[name], third[name])} <= head
    assert not torch.equal(second["decoder.project_out.conv.weight"], third["decoder.project_out.conv.weight"])

    # Once more: everything is done, even without what the phases started from.
    shutil.rmtree(tmp_path / "killed-phase2")
    shutil.copytree(tmp_path / "whole-phase2", tmp_path / "killed-phase2")
    again = run_pipeline(load_pipeline(PIPELINE, overrides_of(tiny_dataset, tmp_path, "killed")))
    assert [phase["steps_this_start"] for phase in again["phases"]] == [0, 0, 0]
    assert again["status"] == "finished"


def test_a_signal_ends_the_pipeline_inside_its_phase(
    tiny_dataset: Path, tmp_path: Path, process_server: ProcessServer
) -> None:
    arguments = [str(PIPELINE), *overrides_of(tiny_dataset, tmp_path, "run", "phase1.train.steps=5000")]
    pid = process_server.start("pretrain.__main__:main", [arguments], {}, tmp_path / "log")
    journal = JournalTail(tmp_path / "run-phase1")
    while journal.look() < 3:
        assert process_server.code(pid) is None, (tmp_path / "log").read_text()[-3000:]
        time.sleep(0.005)
    os.kill(pid, signal.SIGTERM)
    assert process_server.wait([pid]) == [0]
    checkpoint = newest_complete(open_folder(tmp_path / "run-phase1"))
    assert checkpoint is not None
    assert find_damage(checkpoint) is None
    assert not (tmp_path / "run-phase2").exists()


def test_overrides_reach_one_phase_or_all(tmp_path: Path) -> None:
    given = [
        "name=mine",
        f"output_dir={tmp_path}",
        "seed=7",
        "phase2.train.steps=9",
        "data.train=here",
        "data.val=there",
    ]
    one, two, three = load_pipeline(PIPELINE, given)
    assert [phase.config.name for phase in (one, two, three)] == ["mine-phase1", "mine-phase2", "mine-phase3"]
    assert [phase.config.seed for phase in (one, two, three)] == [7, 7, 7]
    assert (one.config.train.steps, two.config.train.steps) == (300, 9)
    assert one.config.objective.init_from is None
    assert two.config.objective.init_from == str(tmp_path / "mine-phase1")
    assert three.config.objective.init_from == str(tmp_path / "mine-phase2")
    assert is_pipeline(PIPELINE)
    assert not is_pipeline(PIPELINE.with_name("phase1.yaml"))


def test_every_phase_is_checked_before_the_first_begins(tiny_dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names 'generator'"):
        run_pipeline(
            load_pipeline(
                PIPELINE, overrides_of(tiny_dataset, tmp_path, "run", "phase3.optim.players.generator.lr=1e-3")
            )
        )
    with pytest.raises(ValueError, match="'trainde'"):
        run_pipeline(
            load_pipeline(PIPELINE, overrides_of(tiny_dataset, tmp_path, "run", "phase2.objective.trained=[trainde]"))
        )
    assert not list(tmp_path.glob("run-*"))


@pytest.mark.parametrize("preset", ["f32c32", "f64c128", "f128c512"])
def test_the_published_sizes(preset: str) -> None:
    from pretrain.models.tokenizers.dc_ae_config import DCAE_PRESETS

    phases = load_pipeline(ROOT / "configs" / "dcae" / preset / "pipeline.yaml", ["data.train=a", "data.val=b"])
    for phase in phases:
        model = phase.config.objective.model
        assert {**vars(model), "scaling_factor": None} == {**vars(DCAE_PRESETS[preset]), "scaling_factor": None}
    assert [list(phase.config.objective.trained) for phase in phases] == [["all"], ["latent"], ["head"]]
    assert [phase.config.optim.lr for phase in phases] == [6.4e-5, 1.6e-5, 5.4e-5]
    assert phases[2].config.optim.of("discriminator").betas == (0.5, 0.9)
    assert phases[2].config.optim.of("discriminator").ema_decay is None
