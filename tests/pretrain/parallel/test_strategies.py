"""The same run under single, DDP, FSDP2 and HSDP: the same losses, moving averages and weights to fp tolerance."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.parallel.choose import make_strategy
from pretrain.parallel.config import ParallelConfig
from pretrain.parallel.world import World, pick_device
from tests.pretrain.runs import assert_same_weights, losses, overrides_of, run_here, run_several

STEPS = "train.steps=20"


@pytest.mark.distributed
def test_losses_agree_over_20_steps(tiny_dataset: Path, tmp_path: Path) -> None:
    def run(name: str, *more: str) -> list[str]:
        return overrides_of(tiny_dataset, tmp_path, name, STEPS, *more)

    run_here(run("single"))
    run_here(run("accumulated", "train.micro_batch=2"))
    run_here(run("recomputed", "parallel.activation_checkpointing=full"))
    run_several(
        2,
        [
            run("ddp", "parallel.strategy=ddp"),
            run("ddp_accumulated", "parallel.strategy=ddp", "train.micro_batch=2"),
            run("fsdp2", "parallel.strategy=fsdp2"),
            run("fsdp2_accumulated", "parallel.strategy=fsdp2", "train.micro_batch=2"),
            run("fsdp2_recomputed", "parallel.strategy=fsdp2", "parallel.activation_checkpointing=selective"),
        ],
        tmp_path,
    )
    run_several(4, [run("hsdp", "parallel.strategy=hsdp", "parallel.shards=2")], tmp_path)

    want = losses(tmp_path / "single")
    assert len(want) == 20
    assert want[20] < want[1]
    for name in sorted(path.name for path in tmp_path.iterdir() if path.is_dir() and path.name != "single"):
        assert losses(tmp_path / name) == pytest.approx(want, rel=2e-5), name
        assert_same_weights(tmp_path / "single", tmp_path / name, to_the_bit=False)


def _world(size: int) -> World:
    return World(0, size, 0, pick_device("cpu"), None, None)


@pytest.mark.parametrize(
    ("strategy", "size", "words"),
    [("single", 2, "2 processes were started"), ("ddp", 1, "torchrun"), ("fsdp2", 1, "torchrun")],
)
def test_what_cannot_be_done_is_said(strategy: str, size: int, words: str) -> None:
    from pretrain.optim_config import OptimConfig

    with pytest.raises(ValueError, match=words):
        make_strategy(ParallelConfig(strategy=strategy), OptimConfig(), _world(size))  # type: ignore[arg-type]


def test_unknown_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="expected auto, cpu or cuda"):
        pick_device("tpu")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo looks at every input
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own modules
def test_compiled_blocks_compute_the_same(tiny_dataset: Path, tmp_path: Path) -> None:
    """Needs a C++ compiler; about a minute. Names in the checkpoint stay canonical."""
    run_here(overrides_of(tiny_dataset, tmp_path, "eager", "train.steps=5"))
    run_here(overrides_of(tiny_dataset, tmp_path, "compiled", "train.steps=5", "parallel.compile=blocks"))
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-4)
    assert_same_weights(tmp_path / "eager", tmp_path / "compiled", to_the_bit=False)
