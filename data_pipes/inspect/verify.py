"""Whether a data set is what its manifest says: every shard, and if wanted every picture. `tessera data verify`.

Enters: a manifest, on any storage. Leaves: a `Verdict` per shard with its `Flaw`s. Why it exists: copies get cut, disks
flip bits, and a run should not be where that is found out.

Without decoding, these are found: a missing shard, another size, an index that is not the manifest's, samples without a
picture or video, and any damage to any header, as the strict walk must give the very index that is there. The bytes of
the members have no checksum in a plain tar: damage there is found only by decoding, as far as the format of the picture
notices (PNG always, as every checksum is compared; JPEG often not; arrays, BMP and uncompressed TIFF never).
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch

from data_pipes.errors import ShardError
from data_pipes.index.walk import index_shard
from data_pipes.inspect.content import NO_MEDIA, Check, Decoded, Found, sample_flaws, samples_without_media
from data_pipes.shards.collection import Place
from data_pipes.shards.index_file import ShardIndex
from data_pipes.shards.load_index import load_index
from data_pipes.shards.manifest import Manifest
from data_pipes.shards.reader import ShardReader
from data_pipes.store.storage import Storage

_MAX_FLAWS = 10_000
"""Flaws that are listed per shard; all are counted."""
_AT_ONCE = 64
"""Samples that are requested together."""


@dataclass(frozen=True)
class Flaw:
    """One thing that is wrong."""

    shard: str
    """The shard's url in the manifest."""
    key: str | None
    """The key of the sample; None where the whole shard is concerned."""
    cause: str
    """A short name to count by: "shard" (missing, cut, damaged headers), "size", "index" (missing, another, not the
    shard's), or a cause of SampleError."""
    error: str
    """What was found, in words."""


@dataclass(frozen=True)
class Verdict:
    """What was found in one shard."""

    shard: str
    """The shard's url in the manifest."""
    num_samples: int
    """Number of samples that the manifest says."""
    num_decoded: int
    """Pictures and videos that were decoded."""
    num_flaws: int
    flaws: tuple[Flaw, ...]
    """The first flaws, at most `_MAX_FLAWS`."""
    extensions: tuple[str, ...] = ()
    """Of the shard's members."""
    num_videos: int = 0
    """Of what was decoded."""
    num_without_media: int = 0
    """Samples that have no picture, no video and no tensor; each is a flaw too."""


def verify(manifest: Manifest, check: Check, workers: int = 1) -> Iterator[Verdict]:
    """Checks a data set.

    Args:
        manifest: of the data set.
        check: what is checked beyond the headers.
        workers: processes.

    Yields:
        The verdict on each shard, in their order.

    Raises:
        ValueError: `workers` is below 1.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}; expected a number of processes >= 1")
    shards = iter(range(len(manifest.shards)))
    if workers == 1:
        yield from map(partial(verify_shard, manifest, check, storage=Storage()), shards)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data_pipes.inspect.verify"])  # torch is imported once, not in every worker
    with ProcessPoolExecutor(min(workers, len(manifest.shards)), context, _begin_worker, (manifest, check)) as pool:
        waiting = [pool.submit(_verify_in_worker, shard) for shard in islice(shards, 2 * workers)]
        try:
            while waiting:
                yield waiting.pop(0).result()
                waiting.extend(pool.submit(_verify_in_worker, shard) for shard in islice(shards, 1))
        finally:
            pool.shutdown(cancel_futures=True)


_worker_task: tuple[Manifest, Check, Storage]
"""What a worker process checks with: sent to it once, not with every shard."""


def _begin_worker(manifest: Manifest, check: Check) -> None:
    global _worker_task
    _worker_task = manifest, check, Storage()
    torch.set_num_threads(1)


def _verify_in_worker(shard: int) -> Verdict:
    manifest, check, storage = _worker_task
    return verify_shard(manifest, check, shard, storage)


def verify_shard(manifest: Manifest, check: Check, shard: int, storage: Storage) -> Verdict:
    """Checks one shard: its size, its index, its headers, and with `check.decode` the content of each sample.

    Args:
        manifest: of the data set.
        check: what is checked beyond the headers.
        shard: the number of the shard.
        storage: for a shard in a store.
    """
    entry = manifest.shards[shard]
    flaws: list[Flaw] = []
    num_decoded = num_videos = num_flaws = num_without_media = 0
    for found in _flaws(manifest, check, shard, storage):
        if isinstance(found, str):
            num_decoded, num_videos = num_decoded + 1, num_videos + (found == "video")
            continue
        num_flaws += 1
        num_without_media += found[1] == NO_MEDIA
        if len(flaws) < _MAX_FLAWS:
            flaws.append(Flaw(entry.url, *found))
    extensions: tuple[str, ...] = ()
    if num_without_media:
        extensions = load_index(manifest, shard, storage).extensions
    return Verdict(
        entry.url, entry.num_samples, num_decoded, num_flaws, tuple(flaws), extensions, num_videos, num_without_media
    )


def _flaws(manifest: Manifest, check: Check, shard: int, storage: Storage) -> Iterator[Found | Decoded]:
    """Gives each flaw of a shard, and what was decoded."""
    url, entry, index = manifest.shard_url(shard), manifest.shards[shard], None
    try:
        index = load_index(manifest, shard, storage)
    except (ShardError, OSError) as error:
        yield None, "index", str(error)
    try:
        missing_end = index is not None and not index.has_end_marker
        walked = index_shard(url, allow_missing_end=missing_end, storage=storage)
    except (ShardError, OSError) as error:
        yield None, "shard", str(error)
        return
    if walked.size_bytes != entry.size_bytes:
        found = f"{walked.size_bytes:,} bytes, the manifest says {entry.size_bytes:,}"
        yield None, "size", f"{url}: {found}; restore it, or run `tessera index` and start anew"
        return
    if index is None:
        return
    if walked.to_bytes() != index.to_bytes():
        yield None, "index", f"{url}: {_difference(walked, index)}; run `tessera index` again"
        return
    yield from samples_without_media(index, check)
    if check.decode:
        yield from _content_flaws(manifest, check, shard, storage)


def _difference(walked: ShardIndex, index: ShardIndex) -> str:
    """In what a walk over a shard differs from its index, in words."""
    if walked.num_samples != index.num_samples:
        return f"it holds {walked.num_samples:,} samples, its index lists {index.num_samples:,}"
    for sample in range(walked.num_samples):
        if (walked.key(sample), walked.members(sample)) != (index.key(sample), index.members(sample)):
            return f"sample {sample:,} is {walked.key(sample)!r}, in its index {index.key(sample)!r}, or lies elsewhere"
    return "its headers are not those that were indexed"


def _content_flaws(manifest: Manifest, check: Check, shard: int, storage: Storage) -> Iterator[Found | Decoded]:
    """Gives each flaw in the samples of a shard, and what was decoded."""
    reader = ShardReader(manifest, check.read, storage)
    places = [Place(shard, sample) for sample in range(manifest.shards[shard].num_samples)]
    try:
        for start in range(0, len(places), _AT_ONCE):
            for raw in reader.read_many(places[start : start + _AT_ONCE]):
                yield from sample_flaws(raw, manifest.classes, check)
    except (ShardError, OSError) as error:  # its storage fails, or another object stands there now
        yield None, "shard", str(error)
