"""One or several data sets read as one: their shards are numbered in turn, their classes share one list.

Enters: manifests. Leaves: where any shard lies, and labels that mean the same in every source. Why it exists: a mixture
reads from several data sets, and nothing behind the order should have to know.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

from data_pipes.shards.manifest import Manifest, ShardEntry


class Place(NamedTuple):
    """Where a sample lies, and in which chunk: that is what is read and cached together."""

    shard: int
    """Number of the shard, counted over all data sets."""
    sample: int
    """Number of the sample in the shard."""
    first: int = 0
    """Number of the chunk's first sample in the shard."""
    size: int = 0
    """Number of samples of the chunk; 0 where the chunk is not known."""


@dataclass(frozen=True)
class Collection:
    """Data sets in order. Shard numbers run over all of them."""

    manifests: tuple[Manifest, ...]
    names: tuple[str, ...]
    """Names of the data sets, for reports."""

    @classmethod
    def of(cls, source: Manifest | Collection) -> Collection:
        """A single data set as a collection."""
        return source if isinstance(source, Collection) else cls((source,), ("train",))

    @cached_property
    def _first_shards(self) -> list[int]:
        return [0, *accumulate(len(manifest.shards) for manifest in self.manifests)]

    @cached_property
    def num_samples(self) -> int:
        """Samples of all data sets."""
        return sum(manifest.num_samples for manifest in self.manifests)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The names of all sources' classes, each once, in the order of the sources."""
        return tuple(dict.fromkeys(name for manifest in self.manifests for name in manifest.classes))

    @cached_property
    def is_remote(self) -> bool:
        """Whether any of it lies in a store."""
        return any(manifest.is_remote for manifest in self.manifests)

    def source(self, shard: int) -> int:
        """The number of the data set that a shard belongs to."""
        return bisect_right(self._first_shards, shard) - 1

    def _local(self, shard: int) -> tuple[Manifest, int]:
        """The manifest that lists a shard, and the shard's number there."""
        source = self.source(shard)
        return self.manifests[source], shard - self._first_shards[source]

    def entry(self, shard: int) -> ShardEntry:
        """What the manifest says of a shard."""
        manifest, local = self._local(shard)
        return manifest.shards[local]

    def shard_url(self, shard: int) -> str:
        """Path or URL of a shard."""
        manifest, local = self._local(shard)
        return manifest.shard_url(local)

    def index_url(self, shard: int) -> str:
        """Path or URL of a shard's index."""
        manifest, local = self._local(shard)
        return manifest.index_url(local)

    def common_label(self, shard: int, label: int) -> int:
        """A source's own label as a number of the common list of classes.

        Args:
            shard: a shard of the source.
            label: the label in that source, -1 for none.

        Returns:
            The number in the list; -1 for no label, and for a source that numbers its classes without naming them. The
            labels of a single source stay as they are.
        """
        if label < 0 or len(self.manifests) == 1:
            return label
        source = self.source(shard)
        if not self.manifests[source].classes:  # numbers without names: nobody can say which class they are
            return -1
        return self._label_maps[source][label]

    @cached_property
    def _label_maps(self) -> Sequence[tuple[int, ...]]:
        """The common number of each label, for each source."""
        number = {name: label for label, name in enumerate(self.classes)}
        return [tuple(number[name] for name in manifest.classes) for manifest in self.manifests]
