"""What a run keeps between its steps, and what falls due after one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from pretrain.config import load_config
from pretrain.run_state import Due, RunState, SkippedSamples
from tests.pretrain.runs import CONFIG


def test_a_checkpoint_keeps_all_of_it() -> None:
    state = RunState(7, 56, SkippedSamples(((16, 24), (40, 48))), 2)
    assert RunState.from_dict(json.loads(json.dumps(state.to_dict()))) == state
    assert state.to_dict().keys() == {field.name for field in dataclasses.fields(state)}


def test_an_early_checkpoint_knew_of_no_rollbacks() -> None:
    assert RunState.from_dict({"step": 3, "position": 24, "order": None}) == RunState(3, 24)


@pytest.mark.parametrize("skipped", [(), ((16, 24),), ((0, 8), (80, 96))])
def test_steps_left_count_what_the_loop_does(skipped: tuple[tuple[int, int], ...]) -> None:
    """Against the loop itself: it passes over what is left out, then does a step, until no whole one is left."""
    state, total, batch = RunState(skipped=SkippedSamples(skipped)), 100, 8
    promised = state.steps_left(total, batch)
    while state.steps_left(total, batch):
        state.position = state.skipped.next_position(state.position)
        state.advance(batch)
        assert state.steps_left(total, batch) == promised - state.step
    assert state.step == promised
    assert state.position <= total


def test_what_falls_due(tmp_path: Path) -> None:
    overrides = ["train.log_every=2", "checkpoint.every_steps=3", "train.val_every=null", "data.train=nowhere"]
    config = load_config(CONFIG, overrides)
    assert Due.after(6, config, end=False) == Due(log=True, save=True, validate=True, end=False)
    assert Due.after(4, config, end=False) == Due(log=True, save=False, validate=False, end=False)
    assert Due.after(5, config, end=True) == Due(log=True, save=True, validate=True, end=True)
    never = load_config(CONFIG, [*overrides, "checkpoint.every_steps=null", "train.val_every=5"])
    assert Due.after(5, never, end=False) == Due(log=False, save=False, validate=True, end=False)
