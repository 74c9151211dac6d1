"""The part of a run's configuration that names the sources of a mixture and their weights over the run."""

from __future__ import annotations

from dataclasses import dataclass, field

from data_pipes.bounds import bounded
from data_pipes.order.weighted_interleave import integer_weights


@dataclass(frozen=True)
class SourceConfig:
    """One data set of a mixture."""

    path: str = "???"
    """Folder or URL of the data set: the one with manifest.json."""
    weight: float = bounded(1.0, least=0)
    """Share of the samples, relative to the other sources' weights; 0 means none until the schedule says so."""
    name: str | None = None
    """Name in metrics, messages and checkpoints; null takes the last part of the path."""


@dataclass(frozen=True)
class WeightChange:
    """New weights in the middle of a run."""

    at_sample: int = bounded(0, least=0)
    """When they begin: samples consumed over all ranks; put off to the next multiple of the global batch of the run's
    start."""
    weights: list[float] = bounded(factory=list, least=0)
    """One weight for each source, in the order of the sources."""


@dataclass(frozen=True)
class MixtureConfig:
    """Several sources, each with a weight that may change during the run."""

    sources: list[SourceConfig] = field(default_factory=list)
    """The data sets; empty means no mixture. New ones go behind the others, so that a resumed run can go on."""
    schedule: list[WeightChange] = field(default_factory=list)
    """Later weights, in the order of `at_sample`; empty keeps the sources' own weights all along."""

    def __post_init__(self) -> None:
        if not self.sources and self.schedule:
            raise ValueError(
                "data.mixture.schedule changes weights, but data.mixture.sources is empty; name them there"
            )
        if self.sources:
            self._check_names()
            self._check_weights()

    def names(self) -> list[str]:
        """The names of the sources, in their order."""
        return [source.name or source.path.rstrip("/").rsplit("/", 1)[-1] for source in self.sources]

    def _check_names(self) -> None:
        for number, source in enumerate(self.sources):
            if source.path in ("", "???"):
                raise ValueError(
                    f"data.mixture.sources[{number}].path is missing: name the folder or URL of a data set, made with "
                    "`tessera pack SRC OUT`"
                )
        names = self.names()
        for number, name in enumerate(names):
            if name in names[:number]:
                raise ValueError(
                    f"data.mixture.sources[{names.index(name)}] and [{number}] are both called {name!r}; give one of "
                    "them another `name` (a data set counts more by a larger weight, not by naming it twice)"
                )

    def _check_weights(self) -> None:
        _check("data.mixture.sources (their `weight`)", [source.weight for source in self.sources])
        before = 0
        for number, change in enumerate(self.schedule):
            place = f"data.mixture.schedule[{number}]"
            if change.at_sample <= before:
                raise ValueError(
                    f"{place}.at_sample is {change.at_sample}; expected more than {before}"
                    + (", the one before: list the changes in their order" if before else ": weights from the start "
                    "are the sources' own `weight`")
                )  # fmt: skip
            if len(change.weights) != len(self.sources):
                raise ValueError(
                    f"{place}.weights has {len(change.weights)} weights for {len(self.sources)} sources; give one for "
                    f"each of {', '.join(self.names())}"
                )
            _check(f"{place}.weights", change.weights)
            before = change.at_sample


def _check(place: str, weights: list[float]) -> None:
    try:
        integer_weights(weights)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
