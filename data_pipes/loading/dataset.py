"""From a global sample position to a transformed sample, its label and its key.

Enters: requests (positions and where their samples lie). Leaves: batches of one tensor, with the bad samples met on the
way. Why it exists: here, and only here, is decided what a position yields, so that ranks, threads and processes cannot
differ. Legend: B samples of a batch, C channels, H/W pixels, T frames, R clips of one video.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_pipes.batch import Batch
from data_pipes.cache.cache import ChunkCache
from data_pipes.errors import BadDataError, SampleError, ShardError
from data_pipes.loading.quarantine import BadSample
from data_pipes.order.hashing import Int64s, hash_uniform
from data_pipes.order.mixture import MixtureOrder
from data_pipes.order.order import Order
from data_pipes.shards.collection import Collection, Place
from data_pipes.shards.manifest import Manifest
from data_pipes.shards.members import caption_of, label_of, metadata_of
from data_pipes.shards.reader import RawSample, ShardReader
from data_pipes.store.counters import CounterName
from data_pipes.store.storage import Storage
from data_pipes.transforms.recipe import Recipe

_MAX_SUBSTITUTES = 16
"""Bad samples in the place of one that stop the run."""
_AUGMENTATION = 0
"""Tells the uniform numbers of the augmentation from others that the same seed and position give."""


class Request(NamedTuple):
    """What a worker is asked for. The places come along, so that workers plan an epoch only to replace a bad sample."""

    positions: Int64s
    """[B], global sample positions."""
    places: list[Place]
    """[B], where these samples lie."""


@dataclass(frozen=True)
class Loaded:
    """What a worker answers: a batch, or the error that the trainer shall see."""

    batch: Batch | None
    """None: there is an error instead."""
    bad: tuple[BadSample, ...] = ()
    """The bad samples that were met, replaced or not."""
    sums: dict[CounterName, float] = field(default_factory=dict)
    """What the worker counted meanwhile."""
    error: BadDataError | ShardError | None = None

    def pin_memory(self) -> Loaded:
        """The same with the batch in page-locked memory."""
        return self if self.batch is None else replace(self, batch=self.batch.pin_memory())


@dataclass(frozen=True)
class Extras:
    """What a batch holds beside its tensors."""

    label_key: str | None = None
    """Name of the label in the json member, where a sample has no cls; None: only cls counts."""
    captions: bool = False
    """Whether the captions belong to it."""
    metadata: bool = False
    """Whether the json members belong to it."""

    @property
    def extensions(self) -> tuple[str, ...]:
        """The members that are read for it."""
        json = ("json",) if self.label_key is not None or self.metadata or self.captions else ()
        return ("cls", *json, *(("txt", "caption") if self.captions else ()))


class SampleDataset:
    """Samples in the order of training, endless. Safe for threads; cheap to pickle."""

    def __init__(
        self,
        source: Manifest | Collection,
        order: Order | MixtureOrder,
        recipe: Recipe,
        *,
        extras: Extras | None = None,
        storage: Storage | None = None,
        cache: ChunkCache | None = None,
    ) -> None:
        """
        Args:
            source: one or several data sets.
            order: which sample is at which position.
            recipe: what a sample becomes.
            extras: what else of a sample comes along; None: its label in cls.
            storage: for shards in a store; None: one with the usual settings.
            cache: for shards in a store; None: none.
        """
        self.collection, self.order, self.recipe = Collection.of(source), order, recipe
        self.extras = extras or Extras()
        self.reader = ShardReader(self.collection, (*recipe.extensions, *self.extras.extensions), storage, cache)

    def request(self, positions: Int64s) -> Request:
        """The request for positions [B]."""
        return self.requests([positions])[0]

    def requests(self, batches: list[Int64s]) -> list[Request]:
        """The requests for the positions of several batches, each [B], located together, which is faster."""
        located = self.order.locate(np.concatenate(batches))
        places = []
        columns = located.shard.tolist(), located.sample.tolist(), located.chunk.tolist()
        for shard, sample, chunk in zip(*columns, strict=True):
            _, first, count = self.order.chunk_samples(chunk)
            places.append(Place(shard, sample, first, count))
        ends = np.cumsum([len(positions) for positions in batches]).tolist()
        return [Request(one, places[end - len(one) : end]) for one, end in zip(batches, ends, strict=True)]

    def item(self, position: int) -> tuple[Tensor, int, str]:
        """(tensor, label, key) at one position.

        Raises:
            BadDataError: the sample and its substitutes are bad.
            ShardError: a shard was changed or cannot be read.
        """
        loaded = self.load(self.request(np.array([position], np.int64)))
        if loaded.batch is None:
            assert loaded.error is not None
            raise loaded.error
        return loaded.batch.images[0], int(loaded.batch.labels[0]), loaded.batch.keys[0]

    def load(self, request: Request) -> Loaded:
        """Reads, decodes and transforms one batch. Bad samples are replaced and listed."""
        builder = _BatchBuilder(self, request)
        try:
            builder.fill(self.reader.read_many(request.places))
        except (ShardError, BadDataError) as error:
            return Loaded(None, tuple(builder.bad), builder.sums(), error)
        return Loaded(builder.batch(), tuple(builder.bad), builder.sums())

    def uniforms(self, positions: Int64s) -> list[list[float]]:
        """[B][num_uniforms] numbers in [0, 1), of each position for itself."""
        rows: list[list[float]] = hash_uniform(
            self.order.config.seed, positions, _AUGMENTATION, self.recipe.num_uniforms
        ).tolist()
        return rows


class _BatchBuilder:
    """One batch while it is being made."""

    def __init__(self, dataset: SampleDataset, request: Request) -> None:
        size, recipe = len(request.positions), dataset.recipe
        self.dataset, self.request, self.extras = dataset, request, dataset.extras
        self.images = recipe.empty_batch(size)
        self.labels = torch.empty(size, dtype=torch.int64)
        self.sources = torch.empty(size, dtype=torch.int64)
        self.keys: list[str] = []
        self.captions: list[str | None] = []
        self.metadata: list[dict[str, Any] | None] = []
        self.bad: list[BadSample] = []
        self.read_s = self.recipe_s = 0.0

    def fill(self, raws: Iterator[RawSample]) -> None:
        """Takes the samples as they were asked for; replaces the bad ones."""
        uniforms = self.dataset.uniforms(self.request.positions)
        for i, place in enumerate(self.request.places):
            started = time.perf_counter()
            raw = next(raws)
            self.read_s += time.perf_counter() - started
            error = self._try(i, place.shard, place.sample, raw, uniforms[i], is_substitute=False)
            if error is not None:
                self._substitute(i, uniforms[i], self.bad[-1])

    def _substitute(self, i: int, uniforms: Sequence[float], first: BadSample) -> None:
        for attempt in range(1, _MAX_SUBSTITUTES + 1):
            shard, sample = self.dataset.order.substitute(first.position, attempt)
            raw = self.dataset.reader.read(shard, sample)
            if self._try(i, shard, sample, raw, uniforms, is_substitute=True) is None:
                return
        raise BadDataError(
            f"the sample at position {first.position} and {_MAX_SUBSTITUTES} substitutes are all bad. The first: "
            f"{first.key} in {first.shard}: {first.error}. Check the data set, data.max_pixels and the model's channels"
        )

    def _try(
        self, i: int, shard: int, sample: int, raw: RawSample, uniforms: Sequence[float], *, is_substitute: bool
    ) -> SampleError | None:
        """Puts one sample into row i, or lists it as bad and returns why."""
        started = time.perf_counter()
        collection, position = self.dataset.collection, int(self.request.positions[i])
        try:
            self._put(i, shard, raw, uniforms)
        except SampleError as error:
            url = collection.entry(shard).url
            self.bad.append(BadSample(url, raw.key, error.cause, str(error), position, is_substitute))
            return error
        except Exception as error:
            error.add_note(f"while loading {raw.key} of {collection.shard_url(shard)}, position {position}")
            raise
        finally:
            self.recipe_s += time.perf_counter() - started
        return None

    def _put(self, i: int, shard: int, raw: RawSample, uniforms: Sequence[float]) -> None:
        collection, extras = self.dataset.collection, self.extras
        source = collection.source(shard)
        label = label_of(raw, collection.manifests[source].classes, extras.label_key or "")
        caption = caption_of(raw) if extras.captions else None
        metadata = metadata_of(raw) if extras.metadata else None
        self.images[i] = self.dataset.recipe(raw, uniforms)
        self.labels[i], self.sources[i] = collection.common_label(shard, label), source
        self.keys.append(raw.key)
        self.captions.append(caption)
        self.metadata.append(metadata)

    def batch(self) -> Batch:
        """The whole batch."""
        return Batch(
            self.images,
            self.labels,
            torch.from_numpy(self.request.positions),
            self.keys,
            self.sources if len(self.dataset.collection.manifests) > 1 else None,
            self.captions if self.extras.captions else None,
            self.metadata if self.extras.metadata else None,
        )

    def sums(self) -> dict[CounterName, float]:
        """What was counted while it was made."""
        counted: dict[CounterName, float] = {
            "read_s": self.read_s,
            "decode_s": self.recipe_s,
            "samples_loaded": len(self.keys),
        }
        return counted | self.dataset.reader.take_sums()
