"""Indexing: from tar shards that anybody wrote, on a disk or in a store, to index files and a manifest.

Enters: paths and URLs of shards. Leaves: an index file for each (see data_pipes.index.walk) and a `Manifest`; the
shards stay untouched. Why it exists: shards are many, so they are walked by many processes, and a run that was
interrupted keeps what it has.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

from data_pipes.errors import EmptyShardError, ShardError
from data_pipes.index.progress import IndexJournal
from data_pipes.index.walk import index_shard
from data_pipes.shards.index_file import ShardIndex
from data_pipes.shards.load_index import read_index
from data_pipes.shards.manifest import Manifest, ShardEntry, check_class_names, index_url
from data_pipes.store.storage import Storage
from data_pipes.store.urls import check_url, is_remote, join_url, local_path, scheme_of

_MAX_SHOWN = 50
"""Shards that cannot be used whose errors are shown; the others are counted."""


@dataclass(frozen=True)
class IndexedShard:
    """What `index_shards` reports of each shard."""

    entry: ShardEntry
    kept: bool
    """Whether an index that was there is still valid, so that the shard was not walked."""
    num_skipped: int
    """Members that belong to no sample, see ShardIndex."""
    extensions: tuple[str, ...]
    """Of the members of its samples."""


@dataclass(frozen=True)
class _Job:
    """One shard to index."""

    place: str
    """Path or URL of the shard."""
    index_place: str
    """Path or URL of its index file."""
    url: str
    """How the manifest names the shard."""
    known: ShardEntry | None
    """What an earlier run noted of the shard; for objects only."""
    storage: Storage


def index_shards(
    shards: Sequence[str | os.PathLike[str]],
    out_dir: str | os.PathLike[str],
    classes: Iterable[str] = (),
    *,
    index_dir: str | os.PathLike[str] | None = None,
    force: bool = False,
    workers: int = 1,
    allow_missing_end: bool = False,
    allow_empty: bool = False,
    on_shard: Callable[[IndexedShard], None] | None = None,
    storage: Storage | None = None,
) -> Manifest:
    """Indexes shards and writes `manifest.json`; the shards stay untouched.

    An index that is there, intact, of the shard's present size and not older than the shard (for an object: of its
    present etag) is kept, so that a killed run continues.

    Args:
        shards: paths or URLs; their order is the order of the data set.
        out_dir: path or URL of the folder of the manifest.
        classes: the name of label i is the i-th of them; none: the data set names no classes.
        index_dir: path or URL of the folder of the index files; None: they go beside the shards, and those of objects
            into `index` below a local `out_dir`.
        force: index again what has a valid index.
        workers: processes that walk the shards.
        allow_missing_end: see `walk_tar`.
        allow_empty: leave shards without a sample out of the manifest, instead of failing.
        on_shard: called for each shard in order, for progress.
        storage: for objects; None: one with the default settings.

    Returns:
        The manifest that was written.

    Raises:
        ValueError: a class name or a URL cannot be used, or `workers` is below 1.
        ShardError: there is no shard, the same shard is given twice, nothing can be written, or see `index_shard`; all
            shards are looked at, and the message names all that cannot be used.
        StorageError: a store cannot be used.
    """
    root, places = _place(out_dir), [_place(shard) for shard in shards]
    if workers < 1:
        raise ValueError(f"workers is {workers}; expected a number of processes >= 1")
    _check_shards(places, root)
    names = check_class_names(classes)
    storage = storage or Storage()
    any_remote = any(map(is_remote, places))
    index_root = None if index_dir is None else _place(index_dir)
    if index_root is None and any_remote and not is_remote(root):
        index_root = join_url(root, "index")
    journal = IndexJournal(root, storage) if any_remote else None
    jobs = list(_jobs(places, root, index_root, journal, storage))
    entries, errors = [], list[ShardError]()
    try:
        for indexed in _index_all(jobs, workers, force, allow_missing_end):
            if isinstance(indexed, ShardError):
                errors.append(indexed)
                continue
            entries.append(indexed.entry)
            if journal is not None and not indexed.kept:
                journal.add(indexed.entry)
            if on_shard is not None:
                on_shard(indexed)
        _refuse(errors, len(jobs), allow_empty)
    except BaseException:
        with suppress(ShardError):
            if journal is not None:
                journal.flush()
        raise
    manifest = Manifest(root, tuple(entries), names, None if index_root is None else _relative_to(index_root, root))
    _save_manifest(manifest, root, storage)
    if journal is not None:
        journal.finish()
    return manifest


def _jobs(
    places: Sequence[str], root: str, index_root: str | None, journal: IndexJournal | None, storage: Storage
) -> Iterator[_Job]:
    """What is to be done for each shard; arguments as `index_shards` has them."""
    for place in places:
        url = _relative_to(place, root)
        known = journal.known.get(url) if journal is not None else None
        yield _Job(place, index_url(place, url, index_root), url, known, storage)


def _save_manifest(manifest: Manifest, root: str, storage: Storage) -> None:
    """Writes `manifest.json`.

    Raises:
        ShardError: it cannot be written.
    """
    try:
        manifest.save(root, storage)
    except OSError as error:
        raise ShardError(
            f"{root}: the manifest cannot be written ({error.strerror or error}); name a writable folder with --out"
        ) from error


def _refuse(errors: Sequence[ShardError], num_shards: int, allow_empty: bool) -> None:
    """Fails with all that is wrong, so that it can be mended at once.

    Args:
        errors: of single shards.
        num_shards: of the data set.
        allow_empty: whether shards without a sample may be left out, as long as others have some.

    Raises:
        ShardError: there is an error that is not allowed.
    """
    is_rest_empty = len(errors) == num_shards
    wrong = [e for e in errors if not allow_empty or is_rest_empty or not isinstance(e, EmptyShardError)]
    if len(wrong) == 1:
        raise wrong[0]
    if wrong:
        more = f"\n  and {len(wrong) - _MAX_SHOWN:,} more" if len(wrong) > _MAX_SHOWN else ""
        shown = "".join(f"\n  {error}" for error in wrong[:_MAX_SHOWN])
        raise ShardError(f"{len(wrong):,} of {num_shards:,} shards cannot be used:{shown}{more}")


def _index_all(
    jobs: Sequence[_Job], workers: int, force: bool, allow_missing_end: bool
) -> Iterator[IndexedShard | ShardError]:
    """Indexes the shards in several processes and gives the reports in order; objects in memory are known to this
    process alone, so with these it works alone.
    """
    workers = 1 if any(scheme_of(job.place) == "memory" for job in jobs) else min(workers, len(jobs))
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) if workers > 1 else None
    try:
        yield from (pool.map if pool else map)(_index_or_error, jobs, repeat(force), repeat(allow_missing_end))
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def _index_or_error(job: _Job, force: bool, allow_missing_end: bool) -> IndexedShard | ShardError:
    """The report of one shard, or what is wrong with it."""
    try:
        return _index_or_keep(job, force, allow_missing_end)
    except ShardError as error:
        return error


def _index_or_keep(job: _Job, force: bool, allow_missing_end: bool) -> IndexedShard:
    """Indexes one shard, unless the index that is there is still valid."""
    if is_remote(job.place):
        return _index_or_keep_object(job, force, allow_missing_end)
    shard, index_file = Path(job.place), Path(job.index_place)
    index = None if force else _valid_index(shard, index_file, allow_missing_end)
    if index is not None:
        digest = hashlib.sha256(index_file.read_bytes()).hexdigest()
        return IndexedShard(
            ShardEntry(job.url, index.num_samples, index.size_bytes, digest), True, index.num_skipped, index.extensions
        )
    index = index_shard(shard, allow_missing_end=allow_missing_end)
    digest = _save(index, job)
    return IndexedShard(
        ShardEntry(job.url, index.num_samples, index.size_bytes, digest), False, index.num_skipped, index.extensions
    )


def _index_or_keep_object(job: _Job, force: bool, allow_missing_end: bool) -> IndexedShard:
    """The same for an object, whose etag says whether it is the one that was indexed."""
    info = job.storage.info(job.place)
    known = job.known
    if known and not force and info.etag is not None and (known.size_bytes, known.etag) == (info.size_bytes, info.etag):
        index = None
        with suppress(ShardError, OSError):
            index = read_index(job.index_place, known.index_sha256, job.storage)
        if index and index.size_bytes == info.size_bytes and (index.has_end_marker or allow_missing_end):
            return IndexedShard(known, True, index.num_skipped, index.extensions)
    index = index_shard(job.place, allow_missing_end=allow_missing_end, storage=job.storage)
    after = job.storage.info(job.place)
    if after != info or index.size_bytes != info.size_bytes:
        raise ShardError(f"{job.place}: the object was replaced while it was indexed; run `tessera index` again")
    entry = ShardEntry(job.url, index.num_samples, index.size_bytes, _save(index, job), info.etag)
    return IndexedShard(entry, False, index.num_skipped, index.extensions)


def _save(index: ShardIndex, job: _Job) -> str:
    """Writes an index file and returns its sha256."""
    try:
        if not is_remote(job.index_place):
            return index.save(job.index_place)
        data = index.to_bytes()
        job.storage.write_whole(job.index_place, data)
        return hashlib.sha256(data).hexdigest()
    except OSError as error:
        raise ShardError(
            f"{job.index_place}: the index cannot be written ({error.strerror or error}); name a writable folder with "
            "--index-dir"
        ) from error


def _valid_index(shard: Path, index_file: Path, allow_missing_end: bool) -> ShardIndex | None:
    """The index of a local shard that is intact, not older than the shard and of its size; else None."""
    try:
        index = ShardIndex.load(index_file)
        shard_stat, index_stat = shard.stat(), index_file.stat()
    except (ShardError, OSError):
        return None
    fresh = index.size_bytes == shard_stat.st_size and index_stat.st_mtime_ns >= shard_stat.st_mtime_ns
    return index if fresh and (index.has_end_marker or allow_missing_end) else None


def _place(given: str | os.PathLike[str]) -> str:
    """An absolute path, or a URL without "/" at its end. No symlink is resolved: a dataset may be a folder of links."""
    text = os.fspath(given)
    check_url(text)
    return text.rstrip("/") if is_remote(text) else os.path.abspath(local_path(text))


def _check_shards(places: Sequence[str], root: str) -> None:
    if not places:
        raise ShardError("no shard to index; give tar files, or a folder or pattern that holds some")
    if len(set(places)) != len(places):
        repeated = next(place for i, place in enumerate(places) if place in places[:i])
        raise ShardError(f"{repeated}: given twice; name each shard once")
    local = next((place for place in places if not is_remote(place)), None)
    if is_remote(root) and local is not None:
        raise ShardError(f"{local}: a local shard of a data set in {root}; upload the shards, or name a local --out")


def _relative_to(place: str, root: str) -> str:
    """How a manifest in `root` names a place: relative where that leads back to it, else absolute."""
    relative = place.removeprefix(root.rstrip("/") + "/")
    return relative if relative != place and join_url(root, relative) == place else place
