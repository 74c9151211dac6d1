"""The guard's decisions, on losses made up for it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.guard.guard import Guard, GuardConfig, Observation, Rollback, worst_micro_batches
from pretrain.run_state import SkippedSamples

BATCH = 8


def watch(guard: Guard, losses: Sequence[float], first_step: int = 1) -> Rollback | None:
    """The first rollback; a loss that is not finite stands for a skipped step."""
    for step, loss in enumerate(losses, first_step):
        found = guard.observe(Observation(step, (step - 1) * BATCH, loss, math.isfinite(loss)))
        if found is not None:
            return found
    return None


def calm(num_steps: int) -> list[float]:
    return [1.0 + 0.1 * math.sin(step) for step in range(num_steps)]


def test_steps_without_a_gradient() -> None:
    guard = Guard(GuardConfig(nonfinite_steps=3))
    assert watch(guard, [1.0, math.nan, math.inf, 1.0, math.nan, math.nan]) is None  # never three in a row
    assert not guard.is_suspicious  # skipped steps leave the weights alone
    found = guard.observe(Observation(7, 48, math.nan, False))
    assert found is not None
    assert (found.suspect.step, found.last_bad.step, found.newest_good_step) == (5, 7, 4)
    assert found.skipped(BATCH) == (32, 56)  # no weight was changed, so the step before is not suspected
    assert "steps 5 to 7 was not finite" in found.reason


def test_a_spike_blames_the_update_before_it() -> None:
    guard = Guard(GuardConfig(spike_factor=4.0, spike_steps=2, window=10))
    found = watch(guard, [*calm(20), 5.0, 3.0, 5.0, 6.0])
    assert found is not None
    assert (found.suspect.step, found.last_bad.step) == (22, 24)  # 3.0 is no more than 4 times the median
    assert found.newest_good_step == 21
    assert found.skipped(BATCH) == (21 * BATCH, 24 * BATCH)
    assert "usually" in found.reason


def test_nothing_is_a_spike_before_the_median_is_known() -> None:
    assert watch(Guard(GuardConfig(spike_steps=1, window=10)), [1.0, 1.0, 1.0, 1.0, 100.0]) is None
    assert watch(Guard(GuardConfig(spike_steps=1, window=10)), [1.0, 1.0, 1.0, 1.0, 1.0, 100.0]) is not None
    assert watch(Guard(GuardConfig(spike_factor=None, spike_steps=1)), [*calm(200), 1e9]) is None


def test_spikes_do_not_move_the_median_and_calm_ends_the_suspicion() -> None:
    guard = Guard(GuardConfig(spike_steps=3, window=10))
    assert watch(guard, [*calm(10), *[9.0, 9.0, 1.0] * 20]) is None
    assert not guard.is_suspicious
    guard.restart()
    assert watch(guard, [1e6] * 5) is None


def test_the_end_of_a_run_decides_on_a_suspicion() -> None:
    guard = Guard(GuardConfig(spike_steps=3, window=10))
    assert watch(guard, [*calm(10), 9.0]) is None
    found = guard.give_up()
    assert found is not None
    assert found.newest_good_step == 9
    skipped = Guard(GuardConfig())
    assert watch(skipped, [1.0, math.nan]) is None
    assert skipped.give_up() is None  # the weights are those of the step before


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20)), max_size=6), st.integers(0, 80))
def test_skipped_samples(ranges: list[tuple[int, int]], position: int) -> None:
    skipped, left_out = SkippedSamples(), set[int]()
    for begin, length in ranges:
        skipped = skipped.with_range(begin, begin + length)
        left_out |= set(range(begin, begin + length))
    expected = position
    while expected in left_out:
        expected += 1
    assert skipped.next_position(position) == expected
    assert skipped.count_from(position) == len([one for one in left_out if one >= position])


def test_worst_micro_batches() -> None:
    assert worst_micro_batches([1.0, math.nan, 2.0, math.inf]) == [1, 3]
    assert worst_micro_batches([1.0, 3.0, 2.0]) == [1]
    assert worst_micro_batches([]) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("nonfinite_steps", 0), ("spike_steps", 0), ("window", 3), ("max_rollbacks", -1), ("spike_factor", 1.0)],
)
def test_bad_settings(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"guard.{name} is {value}"):
        GuardConfig(**{name: value})  # type: ignore[arg-type]
