"""The segments of a mixture, its state in a checkpoint, and what keeps a run from going on from one.

Enters: a mixture's parameters, or two states. Leaves: JSON, or sentences for the user. Why it exists: weights of the
future may change in a resumed run, those of the past may not; the comparison is longer than that of plain orders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from data_pipes.order.mixture_config import MixtureConfig
from data_pipes.order.order import Order, OrderConfig
from data_pipes.order.weighted_interleave import TOTAL, integer_weights

_KIND, _VERSION = "mixture", 1


class Segment(NamedTuple):
    """A part of the run in which the weights are constant; it ends where the next segment begins."""

    from_sample: int
    """Its first sample, counted over all ranks from the run's start."""
    weights: tuple[int, ...]
    """The weight of each source, [D], with the sum TOTAL."""


def plan_segments(mixture: MixtureConfig, round_samples: int) -> list[Segment]:
    """The segments of a run, in each of which the weights are constant.

    Args:
        mixture: the sources and their weights over the run.
        round_samples: Q * g; a change of the weights is put off to the next multiple of it.

    Raises:
        ValueError: two changes are put off to the same sample.
    """
    changes = [
        (0, [source.weight for source in mixture.sources]),
        *((change.at_sample, change.weights) for change in mixture.schedule),
    ]
    segments: list[Segment] = []
    for at_sample, weights in changes:
        from_sample = -(-at_sample // round_samples) * round_samples
        if segments and from_sample == segments[-1].from_sample:
            raise ValueError(
                f"the weights change twice before sample {from_sample:,}: they can change every {round_samples:,} "
                "samples (a global batch of the run's start); leave out one of the changes in data.mixture.schedule"
            )
        segments.append(Segment(from_sample, integer_weights(weights)))
    return segments


def describe_mixture(
    config: OrderConfig,
    columns: int,
    sources: Sequence[tuple[str, Order]],
    segments: Sequence[Segment],
    position: int,
) -> dict[str, Any]:
    """The state of a mixture, as JSON.

    Args:
        config: the parameters of the run's order.
        columns: the number of columns, Q.
        sources: the name and the order of each source.
        segments: of the whole run.
        position: samples consumed by the trainer, over all ranks.
    """
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
    """What keeps a run described by `now` from going on at the position of `state`, in words; empty if nothing does."""
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
    """What differs in the weights of the past, and which sources came too early.

    Args:
        past: the segments of the checkpoint that had begun.
        past_now: the segments of the run that had begun.
        names: of all sources.
        num_sources: the number of sources of the checkpoint.
    """
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
