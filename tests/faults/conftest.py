"""Fixtures of the fault suite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.harness import Run, why_not
from tests.faults.zygote import Zygote
from tests.pretrain.runs import TINY

STEPS, SAVE_EVERY = 36, 4
LENGTH = [f"train.steps={STEPS}", f"checkpoint.every_steps={SAVE_EVERY}", "train.val_every=1000"]
QUICK_WATCH = ["watchdog.interval_s=0.1"]


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    with Zygote() as started:
        yield started


@pytest.fixture
def make_run(zygote: Zygote, tiny_dataset: Path, tmp_path: Path) -> Callable[..., Run]:
    """Makes a tiny run by name, strategy and further overrides; skips where the strategy cannot be had."""

    def make(name: str, strategy: str, *more: str) -> Run:
        if reason := why_not(strategy):
            pytest.skip(reason)
        return Run(zygote, tmp_path, name, overrides(tiny_dataset, tmp_path, name, strategy, *more))

    return make


@pytest.fixture(scope="session")
def reference(
    zygote: Zygote, tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int], Run]:
    """The uninterrupted run of a strategy on a number of ranks; trained once per session."""
    known: dict[tuple[str, int], Run] = {}

    def train(strategy: str, num_ranks: int) -> Run:
        if reason := why_not(strategy):
            pytest.skip(reason)
        if (strategy, num_ranks) not in known:
            folder = tmp_path_factory.mktemp("reference")
            run = Run(zygote, folder, strategy, overrides(tiny_dataset, folder, strategy, strategy, *LENGTH))
            run.finish(num_ranks)
            known[strategy, num_ranks] = run
        return known[strategy, num_ranks]

    return train


def overrides(data: Path, folder: Path, name: str, strategy: str, *more: str) -> list[str]:
    places = [f"data.train={data}", f"data.val={data}", f"output_dir={folder}", f"name={name}"]
    return [*TINY, *places, f"parallel.strategy={strategy}", *QUICK_WATCH, *more]
