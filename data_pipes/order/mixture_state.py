"""The state of a mixture in a checkpoint, and what keeps a run from going on from one.

Enters: a mixture's parameters, or two states. Leaves: JSON, or sentences for the user. Why it exists: weights of the
future may change in a resumed run, those of the past may not; the comparison is longer than that of plain orders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from data_pipes.order.order import Order, OrderConfig
from data_pipes.order.weighted_interleave import TOTAL

_KIND, _VERSION = "mixture", 1


class Segment(NamedTuple):
    """A time of equal weights, up to the next segment."""

    from_sample: int
    weights: tuple[int, ...]  # [D], with the sum TOTAL


def describe_mixture(
    config: OrderConfig,
    columns: int,
    sources: Sequence[tuple[str, Order]],
    segments: Sequence[Segment],
    position: int,
) -> dict[str, Any]:
    """The state at `position`, as JSON."""
    return {
        "version": _VERSION,
        "kind": _KIND,
        "position": position,
        "seed": config.seed,
        "run": config.run,
        "window": config.window,
        "chunk_bytes": config.chunk_bytes,
        "columns": columns,
        "sources": [
            {"name": name, "fingerprint": order.fingerprint, "streams": order.config.streams} for name, order in sources
        ],
        "segments": [{"from_sample": segment.from_sample, "weights": list(segment.weights)} for segment in segments],
    }


def differences(state: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What keeps a run described by `now` from going on at the position of `state`; empty: nothing."""
    if state.get("kind") != _KIND:
        return ["it is of one data set (data.train), and data.mixture names sources now"]
    fields = ("version", "seed", "run", "window", "chunk_bytes", "columns")
    wrong = [_differs(name, state.get(name), now[name]) for name in fields if state.get(name) != now[name]]
    position = state.get("position")
    try:
        sources = [
            {"name": s["name"], "fingerprint": s["fingerprint"], "streams": s["streams"]} for s in state["sources"]
        ]
        segments = [Segment(int(s["from_sample"]), tuple(map(int, s["weights"]))) for s in state["segments"]]
    except (KeyError, TypeError, ValueError):
        return [*wrong, "its sources or segments are malformed, so it is damaged"]
    wrong += _source_differences(sources, now["sources"])
    if type(position) is not int or position < 0:
        return [*wrong, f"position is {position!r}, expected an integer >= 0"]
    segments_now = [Segment(s["from_sample"], tuple(s["weights"])) for s in now["segments"]]
    names = [source["name"] for source in max(sources, now["sources"], key=len)]
    return wrong + _weight_differences(_past(segments, position), _past(segments_now, position), names, len(sources))


def _source_differences(sources: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[str]:
    wrong = []
    for number, source in enumerate(sources):
        if number >= len(now):
            wrong.append(f"source {number} ({source['name']}) is missing now: keep it, with weight 0")
            continue
        wrong += [
            _differs(f"{field} of source {number} ({source['name']})", source[field], now[number][field])
            for field in source
            if source[field] != now[number][field]
        ]
    return wrong


def _weight_differences(past: list[Segment], past_now: list[Segment], names: list[str], num_sources: int) -> list[str]:
    """past, past_now: the segments that had begun. num_sources: of the checkpoint."""
    added = {
        name
        for s in past_now
        for name, weight in zip(names[num_sources:], s.weights[num_sources:], strict=False)
        if weight
    }
    wrong = [
        f"source {name} is new, but its weight before the checkpoint's position is not 0: raise it by a change in "
        "data.mixture.schedule"
        for name in names[num_sources:]
        if name in added
    ]
    past_now = [Segment(s.from_sample, s.weights[:num_sources]) for s in past_now]
    if added or past == past_now:
        return wrong
    starts = sorted({segment.from_sample for segment in (*past, *past_now)})
    for start in starts:
        before, now = _at(past, start), _at(past_now, start)
        if before != now:
            wrong.append(
                f"the weights from sample {start:,} are {_weights_in_words(before, names)} in the checkpoint and "
                f"{_weights_in_words(now, names)} now"
            )
    return wrong


def _past(segments: list[Segment], position: int) -> list[Segment]:
    """The segments that had begun to be dealt out."""
    return [segment for segment in segments if segment.from_sample < position]


def _at(segments: list[Segment], start: int) -> Segment | None:
    return next((segment for segment in segments if segment.from_sample == start), None)


def _weights_in_words(segment: Segment | None, names: list[str]) -> str:
    if segment is None:
        return "unchanged"
    return ", ".join(f"{name} {weight / TOTAL:.6g}" for name, weight in zip(names, segment.weights, strict=False))


def _differs(name: str, before: object, now: object) -> str:
    return f"{name} is {before!r} in the checkpoint and {now!r} now"
