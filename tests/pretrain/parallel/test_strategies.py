"""The same run under single, DDP, FSDP2 and HSDP: the same losses, moving averages and weights to fp tolerance."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.parallel.choose import make_strategy
from pretrain.parallel.config import ParallelConfig
from pretrain.parallel.world import World, pick_device
from tests.pretrain.runs import assert_same_weights, losses, overrides_of, run_here, run_several
from tests.process_server import ProcessServer

STEPS = "train.steps=20"
RUNS = {
    "accumulated": (1, "train.micro_batch=2"),
    "recomputed": (1, "parallel.activation_checkpointing=full"),
    "ddp": (2, "parallel.strategy=ddp"),
    "ddp_accumulated": (2, "parallel.strategy=ddp", "train.micro_batch=2"),
    "fsdp2": (2, "parallel.strategy=fsdp2"),
    "fsdp2_accumulated": (2, "parallel.strategy=fsdp2", "train.micro_batch=2"),
    "fsdp2_recomputed": (2, "parallel.strategy=fsdp2", "parallel.activation_checkpointing=selective"),
    "hsdp": (4, "parallel.strategy=hsdp", "parallel.shards=2"),
}
"""Number of processes, and what differs from the run on one process."""


@pytest.fixture(scope="module")
def trained(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory, process_server: ProcessServer) -> Path:
    """All runs, those on several ranks in one process group for each number of ranks."""
    folder = tmp_path_factory.mktemp("strategies")
    run_here(overrides_of(tiny_dataset, folder, "single", STEPS))
    for size in (1, 2, 4):
        given = [
            overrides_of(tiny_dataset, folder, name, STEPS, *more)
            for name, (num_ranks, *more) in RUNS.items()
            if num_ranks == size
        ]
        if size == 1:
            for overrides in given:
                run_here(overrides)
        else:
            run_several(process_server, size, given)
    return folder


def test_one_process_learns(trained: Path) -> None:
    found = losses(trained / "single")
    assert len(found) == 20
    assert found[20] < found[1]


@pytest.mark.distributed
@pytest.mark.parametrize("name", RUNS)
def test_losses_agree_over_20_steps(trained: Path, name: str) -> None:
    assert losses(trained / name) == pytest.approx(losses(trained / "single"), rel=2e-5)
    assert_same_weights(trained / "single", trained / name, to_the_bit=False)


def _world(size: int) -> World:
    return World(0, size, 0, pick_device("cpu"), None, None)


@pytest.mark.parametrize(
    ("strategy", "size", "words"),
    [("single", 2, "2 processes were started"), ("ddp", 1, "torchrun"), ("fsdp2", 1, "torchrun")],
)
def test_what_cannot_be_done_is_said(strategy: str, size: int, words: str) -> None:
    from pretrain.optim import OptimConfig

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
