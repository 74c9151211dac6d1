"""Collections happen at the chosen steps and nowhere else, and everything is as before afterwards."""

from __future__ import annotations

import gc
import weakref

import pytest

from pretrain.garbage import ScheduledGC


@pytest.fixture(autouse=True)
def _thawed() -> None:
    """The suite freezes what it has imported."""
    gc.unfreeze()


class _Cycle:
    def __init__(self) -> None:
        self.self = self


def _dropped_cycle() -> weakref.ref[_Cycle]:
    return weakref.ref(_Cycle())


def test_cycles_live_until_the_chosen_step() -> None:
    assert gc.isenabled()
    with ScheduledGC(every_steps=4) as garbage:
        assert not gc.isenabled()
        garbage.after_step(1)
        frozen = gc.get_freeze_count()
        assert frozen > 0
        later = [[number] for number in range(10_000)]
        cycle = _dropped_cycle()
        for step in (2, 3):
            garbage.after_step(step)
            assert cycle() is not None
        garbage.after_step(4)
        assert cycle() is None
        # What came after the first step is looked at. Frozen objects may be let go of in between: the count may fall.
        assert gc.get_freeze_count() < frozen + len(later) / 2
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_a_resumed_run_collects_at_the_same_steps() -> None:
    with ScheduledGC(every_steps=4) as garbage:
        garbage.after_step(7)  # the first of this start
        cycle = _dropped_cycle()
        garbage.after_step(8)
        assert cycle() is None


def test_restored_after_an_error_and_when_it_was_off() -> None:
    with pytest.raises(AttributeError), ScheduledGC(every_steps=2) as garbage:
        garbage.every_steps.missing()  # type: ignore[attr-defined]
    assert gc.isenabled()
    gc.disable()
    try:
        with ScheduledGC(every_steps=2):
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_zero_leaves_python_alone() -> None:
    with ScheduledGC(every_steps=0) as garbage:
        garbage.after_step(1)
        assert gc.isenabled()
        assert gc.get_freeze_count() == 0
    with pytest.raises(ValueError, match="expected 0"):
        ScheduledGC(every_steps=-1)
