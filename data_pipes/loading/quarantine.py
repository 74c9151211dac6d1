"""Bad samples: counted, written down, and a reason to stop when there are too many.

Enters: the bad samples that came with each batch the trainer consumed. Leaves: counters, one JSON line per newly seen
bad sample, and BadDataError. Why it exists: nothing is skipped silently, and a broken data set does not train.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from data_pipes.errors import BadDataError, Cause

_MIN_JUDGED_SAMPLES = 1000
"""The limit counts bad samples among at least so many (or one epoch): at a limit of 1%, data with 0.5% bad samples
would stop by chance in 9% of the runs if 100 samples were enough, in 1.4% with 1,000."""


@dataclass(frozen=True)
class BadSample:
    """One sample that could not be used."""

    shard: str
    """Its url in the manifest."""
    key: str
    cause: Cause
    error: str
    """What was found, for people."""
    position: int
    """Global sample position where it was met."""
    is_substitute: bool = False
    """Whether it was met while another bad sample was being replaced."""


class Quarantine:
    """The bad samples of one rank. `num_seen` and `num_bad` count positions; `by_cause` counts every failed sample."""

    def __init__(self, path: Path | None, max_bad_fraction: float, num_samples: int) -> None:
        """
        Args:
            path: the JSON lines file, appended to; None: bad samples are only counted.
            max_bad_fraction: of the samples consumed, 0 to 1; more bad ones stop the run.
            num_samples: of the data set.
        Raises:
            ValueError: the fraction is none.
        """
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"data.max_bad_fraction is {max_bad_fraction}; expected a fraction, 0 to 1")
        self.path, self._max_bad_fraction, self._judged = path, max_bad_fraction, min(_MIN_JUDGED_SAMPLES, num_samples)
        self.num_seen = self.num_bad = 0
        self.by_cause: Counter[Cause] = Counter()
        self._known = _read_known(path)

    def record(self, num_samples: int, bad: Sequence[BadSample]) -> None:
        """Counts one batch, and writes down the bad samples that are new.

        Args:
            num_samples: positions of the batch.
            bad: the bad samples that were met for it.
        Raises:
            BadDataError: there are more than the limit allows.
        """
        self.num_seen += num_samples
        self.num_bad += sum(not sample.is_substitute for sample in bad)
        self.by_cause.update(sample.cause for sample in bad)
        new = {(sample.shard, sample.key): sample for sample in bad if (sample.shard, sample.key) not in self._known}
        if new:
            self._write(list(new.values()))
            self._known.update(new)
        if self.num_bad > self._max_bad_fraction * max(self.num_seen, self._judged):
            last = bad[-1]
            listed = f"All are listed in {self.path}. " if self.path else ""
            raise BadDataError(
                f"{self.num_bad} of the first {max(self.num_seen, self.num_bad)} samples of this run are bad "
                f"({self.describe()}), more than data.max_bad_fraction = {self._max_bad_fraction} allows. The last: "
                f"{last.key} in {last.shard}: {last.error}. {listed}Repair the data set, or raise the limit"
            )

    def describe(self) -> str:
        """The counts by cause, for people."""
        return ", ".join(f"{cause}: {count}" for cause, count in sorted(self.by_cause.items())) or "none"

    def _write(self, bad: Sequence[BadSample]) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(asdict(sample)) + "\n" for sample in bad))


def _read_known(path: Path | None) -> set[tuple[str, str]]:
    """(shard, key) of the lines that an earlier run wrote; a half line from a crash is passed over."""
    known = set()
    if path is not None and path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
                known.add((entry["shard"], entry["key"]))
            except (ValueError, KeyError, TypeError):
                continue
    return known
