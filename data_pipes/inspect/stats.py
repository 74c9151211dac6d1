"""What a data set consists of, without reading it whole: `tessera data stats`.

Enters: a manifest. Leaves: counts, sizes and fractions from the index files alone; labels and picture headers from a
bounded number of samples, drawn without replacement by a key, so that the same command gives the same figures. Why it
exists: a data set is looked at before it is trained on for weeks. Works on any storage that the manifest can live in.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipes.decode import npy, tiff, tiff_tags
from data_pipes.decode.formats import refuse_unread
from data_pipes.decode.pil import pil_formats
from data_pipes.decode.video import VIDEO_EXTENSIONS
from data_pipes.errors import DecodeError, SampleError
from data_pipes.inspect.content import Check
from data_pipes.order.hashing import feistel, hash_words
from data_pipes.shards.collection import Place
from data_pipes.shards.load_index import load_index
from data_pipes.shards.manifest import Manifest
from data_pipes.shards.members import IMAGE_EXTENSIONS, LABEL_EXTENSIONS, encoded_picture, label_of
from data_pipes.shards.reader import RawSample, ShardReader
from data_pipes.store.storage import Storage

PERCENTILES = (1, 10, 50, 90, 99)
"""The percentiles that are reported of sizes."""
_BINS_PER_E = 100
"""Bins in which sizes that differ by a factor of e are counted: a bin is 1 % wide, so percentiles are exact to that,
and their memory is the same for any number of samples."""
_NUM_BINS = 45 * _BINS_PER_E
"""Enough for sizes up to e**45, which is more than 64 bits hold."""
_AT_ONCE = 64
"""Samples that are requested together."""
_DRAW = 4
"""Hashed with the seed into the key by which samples are drawn."""


@dataclass
class SizeHistogram:
    """Positive integers, counted in bins that are 1 % wide."""

    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_NUM_BINS, np.int64))
    """How many sizes fell into each bin."""
    total: int = 0
    """Sum of all sizes."""
    low: int | None = None
    """The least size; None before the first one."""
    high: int = 0
    """The largest size."""

    def add(self, sizes: NDArray[Any]) -> None:
        """Counts sizes [n]."""
        if len(sizes):
            bins = np.ceil(np.log(np.maximum(sizes, 1)) * _BINS_PER_E).astype(np.int64)
            self.counts += np.bincount(bins, minlength=_NUM_BINS)[:_NUM_BINS]
            self._merge_bounds(int(sizes.sum()), int(sizes.min()), int(sizes.max()))

    def merge(self, other: SizeHistogram) -> None:
        """Adds what another one counted."""
        self.counts += other.counts
        if other.low is not None:
            self._merge_bounds(other.total, other.low, other.high)

    def _merge_bounds(self, total: int, low: int, high: int) -> None:
        """Adds the sum, the least and the largest of further sizes."""
        self.total += total
        self.low, self.high = low if self.low is None else min(self.low, low), max(self.high, high)

    def summary(self) -> dict[str, float]:
        """The figures "mean", "min", "max" and "p1" to "p99"; empty without a size."""
        ends = np.cumsum(self.counts)
        number = int(ends[-1])
        if number == 0 or self.low is None:
            return {}
        found = {"mean": round(self.total / number, 1), "min": self.low, "max": self.high}
        for percent in PERCENTILES:
            place = int(np.searchsorted(ends, max(1, -(-number * percent // 100))))
            found[f"p{percent}"] = min(max(round(float(np.exp(place / _BINS_PER_E))), self.low), self.high)
        return found


@dataclass
class _ShardSums:
    """What the index of one shard says."""

    sizes: SizeHistogram = field(default_factory=SizeHistogram)
    """Bytes of the samples: of all their members' data together."""
    samples_with: Counter[str] = field(default_factory=Counter)
    """Extension -> how many samples have such a member."""
    bytes_of: Counter[str] = field(default_factory=Counter)
    """Extension -> bytes of all such members."""


def dataset_statistics(
    manifest: Manifest,
    *,
    num_read: int = 1000,
    seed: int = 0,
    label_key: str = "label",
    member: str | None = None,
    storage: Storage | None = None,
    threads: int = 8,
    on_shard: Callable[[], None] | None = None,
) -> dict[str, object]:
    """The statistics of a data set, as one JSON object.

    Args:
        manifest: of the data set.
        num_read: samples that are read for labels and picture headers, at most.
        seed: chooses these samples.
        label_key: see `label_of`.
        member: which member is the picture, see `DataConfig.image_member`; None: what has a known ending.
        storage: for a data set in a store; None: one with the default settings.
        threads: index files that are read at once.
        on_shard: called after each shard, for progress.

    Raises:
        ShardError: an index is missing or damaged.
    """
    storage = storage or Storage()
    total = _ShardSums()
    with ThreadPoolExecutor(threads) as pool:
        for sums in pool.map(lambda shard: _count(manifest, shard, storage), range(len(manifest.shards))):
            total.sizes.merge(sums.sizes)
            total.samples_with.update(sums.samples_with)
            total.bytes_of.update(sums.bytes_of)
            if on_shard is not None:
                on_shard()
    num_samples = manifest.num_samples
    extensions = {
        name: {"num_samples": count, "share": round(count / num_samples, 6), "size_bytes": total.bytes_of[name]}
        for name, count in total.samples_with.most_common()
    }
    return {
        **manifest.summary(),
        "samples_per_shard": _spread([shard.num_samples for shard in manifest.shards]),
        "shard_bytes": _spread([shard.size_bytes for shard in manifest.shards]),
        "sample_bytes": total.sizes.summary(),
        "extensions": extensions,
        "media": [name for name in extensions if name in Check(member=member).media],
        "sampled": _read_some(manifest, min(num_read, num_samples), seed, label_key, member, storage)
        if num_read
        else {},
    }


def _count(manifest: Manifest, shard: int, storage: Storage) -> _ShardSums:
    """Counts the samples and members of one shard in its index."""
    index = load_index(manifest, shard, storage)
    sums = _ShardSums()
    sums.sizes.add(np.add.reduceat(index.member_size, index.first_member[:-1].astype(np.int64)))
    extension, number = index.member_extension.astype(np.int64), len(index.extensions)
    samples, size_bytes = np.bincount(extension, minlength=number), np.zeros(number, np.int64)
    np.add.at(size_bytes, extension, index.member_size.astype(np.int64))
    for name, count, size in zip(index.extensions, samples.tolist(), size_bytes.tolist(), strict=True):
        sums.samples_with[name] += count  # a sample has each extension once
        sums.bytes_of[name] += size
    return sums


def _spread(values: Sequence[int]) -> dict[str, float]:
    return {"min": min(values), "mean": round(sum(values) / len(values), 1), "max": max(values)}


def _read_some(
    manifest: Manifest, num_read: int, seed: int, label_key: str, member: str | None, storage: Storage
) -> dict[str, object]:
    """Counts labels and picture headers in `num_read` samples."""
    ends = np.cumsum([shard.num_samples for shard in manifest.shards])
    drawn = np.sort(feistel(np.arange(num_read), manifest.num_samples, hash_words(seed, _DRAW)))
    shards = np.searchsorted(ends, drawn, side="right")
    firsts = ends[shards] - np.array([manifest.shards[shard].num_samples for shard in shards.tolist()], np.int64)
    places = [Place(*place) for place in zip(shards.tolist(), (drawn - firsts).tolist(), strict=True)]
    pictures = IMAGE_EXTENSIONS if member is None else (member,)
    reader = ShardReader(manifest, (*pictures, *LABEL_EXTENSIONS), storage)
    labels: Counter[int] = Counter()
    kinds: Counter[str] = Counter()
    bad: Counter[str] = Counter()
    heights: list[int] = []
    widths: list[int] = []
    for start in range(0, len(places), _AT_ONCE):
        for raw in reader.read_many(places[start : start + _AT_ONCE]):
            try:
                labels[label_of(raw, manifest.classes, label_key)] += 1
            except SampleError as error:
                bad[error.cause] += 1
            video = next((name for name in raw.found if name in VIDEO_EXTENSIONS), None)
            if video is not None and not any(name in raw.members for name in IMAGE_EXTENSIONS):
                kinds[f"{video} (video, not opened)"] += 1
                continue
            try:
                kind, height, width = picture_header(raw, member)
            except SampleError as error:
                bad[error.cause] += 1
            else:
                kinds[kind] += 1
                heights.append(height)
                widths.append(width)
    reader.close()
    num_unlabelled = labels.pop(-1, 0)
    return {
        "num_read": num_read,
        "num_unlabelled": num_unlabelled,
        "num_labels_seen": len(labels),
        "labels": [
            {"label": label, "name": _class_name(manifest, label), "num_samples": count}
            for label, count in sorted(labels.items(), key=lambda item: (-item[1], item[0]))
        ],
        "pictures": dict(kinds.most_common()),
        "height": _quantiles(heights),
        "width": _quantiles(widths),
        "bad": dict(bad.most_common()),
    }


def _quantiles(values: Sequence[int]) -> dict[str, int]:
    if not values:
        return {}
    places = np.percentile(values, [0, *PERCENTILES, 100], method="inverted_cdf").tolist()
    return dict(zip(("min", *(f"p{percent}" for percent in PERCENTILES), "max"), map(int, places), strict=True))


def _class_name(manifest: Manifest, label: int) -> str | None:
    return manifest.classes[label] if label < len(manifest.classes) else None


def picture_header(raw: RawSample, member: str | None = None) -> tuple[str, int, int]:
    """What the header of a sample's picture says; nothing is decoded.

    Args:
        raw: the sample.
        member: see `encoded_picture`.

    Returns:
        Format and mode in words, height and width in pixels.

    Raises:
        SampleError: the sample has no picture, or its header cannot be read.
    """
    data = encoded_picture(raw, member)
    refuse_unread(data)
    if data.startswith(tiff_tags.MAGICS):
        height, width, channels, bits = tiff.describe(data)
        return f"TIFF {channels} x {bits} bit", height, width
    try:
        if data.startswith(npy.MAGIC):
            shape, dtype, *_ = npy.read_header(data)
            return f"NPY {(*shape, 1)[2]} x {dtype.itemsize * 8} bit", shape[0], shape[1]
        with Image.open(io.BytesIO(data), formats=pil_formats()) as picture:
            depth = " 16 bit" if picture.format == "PNG" and data[24:25] == b"\x10" else ""
            is_moving = picture.format != "MPO" and getattr(picture, "is_animated", False)  # of MPO: thumbnails
            moving = ", animated (the first frame is read)" if is_moving else ""
            return f"{picture.format} {picture.mode}{depth}{moving}", picture.height, picture.width
    except Exception as error:  # as in data_pipes.decode.picture: parsers raise nearly anything
        raise DecodeError("decode", f"no readable header ({type(error).__name__}: {error})") from error
