"""The same run under single, DDP, FSDP2 and HSDP: the same losses, moving averages and weights to fp tolerance."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.parallel.choose import make_strategy
from pretrain.parallel.config import ParallelConfig
from pretrain.parallel.world import World, pick_device
from tests.pretrain.runs import assert_same_weights, losses, overrides_of, run_here, run_several
from tests.process_server import ProcessServer

STEPS = "train.steps=20"
GROUPS: dict[str, tuple[int, dict[str, list[str]]]] = {
    "one": (
        1,
        {"accumulated": ["train.micro_batch=2"], "recomputed": ["parallel.activation_checkpointing=full"]},
    ),
    "two": (2, {"ddp": ["parallel.strategy=ddp"], "fsdp2": ["parallel.strategy=fsdp2"]}),
    "two_more": (
        2,
        {
            "ddp_accumulated": ["parallel.strategy=ddp", "train.micro_batch=2"],
            "fsdp2_accumulated": ["parallel.strategy=fsdp2", "train.micro_batch=2"],
            "fsdp2_recomputed": ["parallel.strategy=fsdp2", "parallel.activation_checkpointing=selective"],
        },
    ),
    "four": (4, {"hsdp": ["parallel.strategy=hsdp", "parallel.shards=2"]}),
}
"""Number of processes, and the runs that share them, with what differs from the run on one process."""
SLOW = ("two_more", "four")


@pytest.fixture(scope="module")
def single(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on one process."""
    folder = tmp_path_factory.mktemp("strategies")
    run_here(overrides_of(tiny_dataset, folder, "single", STEPS))
    return folder / "single"


@pytest.fixture(scope="module")
def train_group(tiny_dataset: Path, single: Path, process_server: ProcessServer) -> Callable[[str], Path]:
    """Trains a group when its first case comes; where its runs are."""

    @functools.cache
    def train(group: str) -> Path:
        num_ranks, runs = GROUPS[group]
        given = [overrides_of(tiny_dataset, single.parent, name, STEPS, *more) for name, more in runs.items()]
        if num_ranks == 1:
            for overrides in given:
                run_here(overrides)
        else:
            run_several(process_server, num_ranks, given)
        return single.parent

    return train


def test_one_process_learns(single: Path) -> None:
    found = losses(single)
    assert len(found) == 20
    assert found[20] < found[1]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("group", "name"),
    [
        pytest.param(group, name, id=name, marks=[pytest.mark.slow] if group in SLOW else [])
        for group, (_, runs) in GROUPS.items()
        for name in runs
    ],
)
def test_losses_agree_over_20_steps(single: Path, train_group: Callable[[str], Path], group: str, name: str) -> None:
    found = train_group(group) / name
    assert losses(found) == pytest.approx(losses(single), rel=2e-5)
    assert_same_weights(single, found, to_the_bit=False)


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
