"""Runs that are killed at random moments and started again end as if nothing had happened.

Same number of processes: weights, moving averages, losses and samples equal to the bit. Other numbers of processes and
other strategies on the way: the same samples in the same order, losses and weights to fp tolerance.

KILL_SEED=123 repeats a failure; the seed is in the test's name or output. `make test-faults` runs the long form.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest

from tests.faults.conftest import LENGTH, SAVE_EVERY, STEPS
from tests.faults.harness import STRATEGIES, Kill, Run, inflict, random_kills
from tests.pretrain.runs import assert_same_weights, losses

pytestmark = [pytest.mark.distributed]
MakeRun = Callable[..., Run]
Reference = Callable[[str, int], Run]
FIRST, LAST = 2 * SAVE_EVERY + 1, STEPS - 6
"""Steps between which kills begin: not before the second save has begun, so there is something to resume from."""


def _ranks(strategy: str) -> int:
    return 0 if strategy == "single" else 2


def _check_equal(run: Run, whole: Run) -> None:
    assert_same_weights(whole.run_dir, run.run_dir)
    assert losses(run.run_dir) == losses(whole.run_dir)
    assert len(losses(run.run_dir)) == STEPS
    _check_samples(run, whole)


def _check_samples(run: Run, whole: Run) -> None:
    found, want = run.samples(), whole.samples()
    trained = range(STEPS * 8)  # loaders read ahead of the last step
    assert [found.get(position) for position in trained] == [want[position] for position in trained]


def _kill_and_finish(run: Run, num_ranks: int, kills: list[Kill]) -> int:
    hits = sum(inflict(run, num_ranks, kill) for kill in kills)
    run.finish(num_ranks)
    return hits


IN_THE_DEFAULT_SUITE = ("single", "ddp", "fsdp2", "zero2")  # test_resume.py has the first three under torchrun


@pytest.mark.parametrize(
    "strategy",
    [pytest.param(one, marks=[] if one in IN_THE_DEFAULT_SUITE else [pytest.mark.slow]) for one in STRATEGIES],
)
def test_a_killed_run_ends_as_the_uninterrupted_one(strategy: str, make_run: MakeRun, reference: Reference) -> None:
    seed = int(os.environ.get("KILL_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 30)
    print(f"KILL_SEED={seed}")
    whole = reference(strategy, _ranks(strategy))
    run = make_run("killed", strategy, *LENGTH)
    kills = random_kills(random.Random(seed), 1, _ranks(strategy), FIRST, LAST)
    assert _kill_and_finish(run, _ranks(strategy), kills) == 1
    _check_equal(run, whole)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_many_kills(strategy: str, seed: int, make_run: MakeRun, reference: Reference) -> None:
    """5 kills per run, 4 runs per strategy: 20 kills for each strategy that is there."""
    whole = reference(strategy, _ranks(strategy))
    run = make_run("killed", strategy, *LENGTH)
    chance = random.Random(f"{strategy}-{seed}-{os.environ.get('KILL_SEED', '0')}")
    kills = random_kills(chance, 5, _ranks(strategy), 0, LAST)
    print(kills)
    hits = _kill_and_finish(run, _ranks(strategy), kills)
    assert hits == 5, "a run ended before it was killed"
    _check_equal(run, whole)


CHAINS = {
    "ddp-2-1-4-2": [("ddp", 2), ("ddp", 1), ("ddp", 4), ("ddp", 2)],
    "fsdp2-2-1-4-2": [("fsdp2", 2), ("fsdp2", 1), ("fsdp2", 4), ("fsdp2", 2)],
    "fsdp2-single-ddp": [("fsdp2", 2), ("single", 0), ("ddp", 4)],
    "fsdp2-zero3-ddp": [("fsdp2", 2), ("zero3", 2), ("ddp", 2)],
    "zero1-zero2-zero3-fsdp2": [("zero1", 2), ("zero2", 4), ("zero3", 2), ("fsdp2", 4)],
}


def _run_chain(stages: list[tuple[str, int]], chance: random.Random, make_run: MakeRun) -> Run:
    """Kills the run in each stage but the last, which finishes it."""
    for strategy, _ in stages:
        make_run("probe", strategy)  # skips where one of them cannot be had
    run = make_run("chain", "single", *LENGTH, "train.micro_batch=4")
    room = (LAST - FIRST) // len(stages)
    for number, (strategy, num_ranks) in enumerate(stages[:-1]):
        step = FIRST + number * room + chance.randrange(room)
        kill = Kill(chance.randrange(max(num_ranks, 1)), step, while_saving=False, delay_s=chance.random() * 0.02)
        assert inflict(run, num_ranks, kill, f"parallel.strategy={strategy}")
    strategy, num_ranks = stages[-1]
    run.finish(num_ranks, f"parallel.strategy={strategy}")
    return run


def test_a_run_moves_between_numbers_of_processes_and_strategies(make_run: MakeRun, reference: Reference) -> None:
    """2 -> 1 -> 4 processes; the micro-batch of the configuration fits them all by accumulation."""
    stages = [("fsdp2", 2), ("ddp", 1), ("ddp", 4)]
    run, whole = _run_chain(stages, random.Random(0), make_run), reference("single", 0)
    _check_samples(run, whole)
    assert losses(run.run_dir) == pytest.approx(losses(whole.run_dir), rel=5e-5)
    assert_same_weights(whole.run_dir, run.run_dir, to_the_bit=False)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("chain", CHAINS)
def test_elastic_chains(chain: str, make_run: MakeRun, reference: Reference) -> None:
    run, whole = _run_chain(CHAINS[chain], random.Random(chain), make_run), reference("single", 0)
    _check_samples(run, whole)
    assert losses(run.run_dir) == pytest.approx(losses(whole.run_dir), rel=5e-5)
    assert_same_weights(whole.run_dir, run.run_dir, to_the_bit=False)
