"""Fixtures of the fault suite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.harness import Run, why_not
from tests.pretrain.runs import TINY
from tests.process_server import ProcessServer

STEPS, SAVE_EVERY = 36, 4
LENGTH = [f"train.steps={STEPS}", f"checkpoint.every_steps={SAVE_EVERY}", "train.val_every=1000"]
QUICK_WATCH = ["watchdog.interval_s=0.1"]


@pytest.fixture(scope="session")
def server_for(request: pytest.FixtureRequest) -> Callable[[str], ProcessServer]:
    """By strategy: the server that has imported what its ranks need."""
    return lambda strategy: request.getfixturevalue(
        "deepspeed_server" if strategy.startswith("zero") else "process_server"
    )


@pytest.fixture
def make_run(server_for: Callable[[str], ProcessServer], tiny_dataset: Path, tmp_path: Path) -> Callable[..., Run]:
    """Makes a tiny run by name, strategy and further overrides; skips where the strategy cannot be had."""

    def make(name: str, strategy: str, *more: str) -> Run:
        if reason := why_not(strategy):
            pytest.skip(reason)
        return Run(server_for(strategy), tmp_path, name, overrides(tiny_dataset, tmp_path, name, strategy, *more))

    return make


@pytest.fixture(scope="session")
def reference(
    server_for: Callable[[str], ProcessServer], tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int], Run]:
    """The uninterrupted run of a strategy on a number of ranks; trained once per session."""
    known: dict[tuple[str, int], Run] = {}

    def train(strategy: str, num_ranks: int) -> Run:
        if reason := why_not(strategy):
            pytest.skip(reason)
        if (strategy, num_ranks) not in known:
            folder = tmp_path_factory.mktemp("reference")
            given = overrides(tiny_dataset, folder, strategy, strategy, *LENGTH)
            run = Run(server_for(strategy), folder, strategy, given)
            run.finish(num_ranks)
            known[strategy, num_ranks] = run
        return known[strategy, num_ranks]

    return train


def overrides(data: Path, folder: Path, name: str, strategy: str, *more: str) -> list[str]:
    places = [f"data.train={data}", f"data.val={data}", f"output_dir={folder}", f"name={name}"]
    return [*TINY, *places, f"parallel.strategy={strategy}", *QUICK_WATCH, *more]
