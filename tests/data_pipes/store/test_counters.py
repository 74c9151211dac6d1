"""Counters: sums by declared names, and no others."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from data_pipes.errors import CAUSES, DecodeError, SampleError
from data_pipes.store.counters import COUNTER_NAMES, Counters, UndeclaredCounterError, source_counter


def test_every_declared_name_adds_up() -> None:
    counters, others = Counters(), Counters()
    for name in (*COUNTER_NAMES, source_counter(0), source_counter(12)):
        counters.add(name)
        others.merge({name: 2})
    counters.merge(others.take())
    assert others.peek() == {}
    assert counters.peek() == dict.fromkeys((*COUNTER_NAMES, "source_0", "source_12"), 3)
    assert pickle.loads(pickle.dumps(counters)).peek() == {}
    assert len(counters.take()) == len(COUNTER_NAMES) + 2
    assert counters.take() == {}


@pytest.mark.parametrize("name", ["shard_read", "source_", "source_x", "decode", ""])
def test_an_undeclared_name_is_refused(name: Any) -> None:
    counters = Counters()
    with pytest.raises(UndeclaredCounterError, match="is no counter; declare it in"):
        counters.add(name)
    with pytest.raises(UndeclaredCounterError):
        counters.merge({"requests": 1, name: 1})
    assert counters.take() == {}


def test_causes_of_bad_samples() -> None:
    for cause in CAUSES:
        error = pickle.loads(pickle.dumps(SampleError(cause, "what was found")))
        assert (error.cause, str(error)) == (cause, "what was found")
    unknown: Any = "strange"
    for kind in (SampleError, DecodeError):
        with pytest.raises(ValueError, match="'strange' is no cause of a bad sample; declare it"):
            kind(unknown, "no good")
