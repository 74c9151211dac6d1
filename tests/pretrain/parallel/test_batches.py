"""A run continues at the same global batch on any number of processes that divides it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipes.batch import BatchPlan
from pretrain.parallel.batches import fit_micro_batch


@pytest.mark.parametrize(
    ("global_batch", "world_size", "wanted", "fits"),
    [(64, 8, None, 8), (64, 8, 8, 8), (64, 4, 8, 8), (64, 8, 3, 2), (96, 8, 8, 6), (7, 1, 3, 1), (8, 2, 100, 4)],
)
def test_known_cases(global_batch: int, world_size: int, wanted: int | None, fits: int) -> None:
    assert fit_micro_batch(global_batch, world_size, wanted) == fits


@given(st.integers(1, 64), st.integers(1, 500), st.none() | st.integers(1, 600))
def test_it_always_makes_a_plan_and_never_takes_more_memory(world_size: int, share: int, wanted: int | None) -> None:
    micro_batch = fit_micro_batch(share * world_size, world_size, wanted)
    plan = BatchPlan(share * world_size, micro_batch, rank=world_size - 1, world_size=world_size)
    assert plan.accumulate * micro_batch == share
    most = share if wanted is None else wanted
    assert micro_batch <= most
    assert not [size for size in range(micro_batch + 1, min(most, share) + 1) if share % size == 0]


@pytest.mark.parametrize(
    ("global_batch", "world_size", "words"), [(64, 7, "4 or 8"), (8, 9, "can: 8\\."), (7, 2, "1 or 7")]
)
def test_what_cannot_be_divided_is_refused_with_numbers_that_can(
    global_batch: int, world_size: int, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        fit_micro_batch(global_batch, world_size, 4)


@pytest.mark.parametrize("arguments", [(0, 1, 1), (8, 0, 1), (8, 1, 0)])
def test_nonsense_is_refused(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="expected 1 or more"):
        fit_micro_batch(*arguments)
