"""Packing: from pictures or videos in folders, zips or built-in sets to shards, index files and manifests.

Enters: a source (data_pipes.pack.sources) and options. Leaves: OUT/train/ and, with a split, OUT/val/, each with
`manifest.json`, `shard-000000.tar`, ... and an index beside each shard, and OUT/pack.json, the record of what was
packed how. Why it exists: a run needs few large files that stock webdataset reads, checked once.

All is planned before the first byte is written: a shard's content follows from the source and the options alone. So a
killed pack continues behind its last finished shard, several threads write shards at once, and the result is the same
to the byte (as long as the same Pillow or PyAV re-encodes).
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import PIL

from data_pipes.decode.video_stream import import_av
from data_pipes.index.index import index_shards
from data_pipes.pack.label_lists import read_labels
from data_pipes.pack.list_format import ListFormat
from data_pipes.pack.listing import Listing, Media, describe, list_source
from data_pipes.pack.open_sources import Place, open_sources
from data_pipes.pack.plan import PackOptions, packing_order, plan_shards, shrink_factors, split_entries
from data_pipes.pack.record import RECORD_NAME, WORK_FOLDER, begin, locked, refuse_foreign
from data_pipes.pack.reencode_picture import UnreadableFile
from data_pipes.pack.shard_writer import ShardPlan, ShardResult, ShardWriter, Stopped, finished_shard
from data_pipes.pack.sources import Source
from data_pipes.shards.manifest import Manifest
from data_pipes.store.files import write_atomically

__all__ = ["PackOptions", "PackResult", "pack"]

_VERSION = 1
"""Part of a pack's identity: to be raised when the same source and options give other shards."""


@dataclass(frozen=True)
class PackResult:
    """What was packed, and what was not."""

    media: Media
    """Which kind of files."""
    splits: dict[str, Manifest]
    """The manifests of "train" and, where there is one, of "val"."""
    ignored: list[str]
    """Files of the source that are something else."""
    skipped: list[dict[str, str]]
    """Unreadable or missing files, each with its "split", "name", "cause" and "error"."""
    num_resumed_shards: int
    """Shards that an earlier, killed pack had finished."""


def pack(
    source: Place,
    out: Place,
    *,
    val: Place | None = None,
    media: Media | None = None,
    labels: Place | None = None,
    val_labels: Place | None = None,
    list_format: ListFormat | None = None,
    options: PackOptions | None = None,
    workers: int = 1,
    on_understood: Callable[[str], None] | None = None,
    on_plan: Callable[[int, int], None] | None = None,
    on_sample: Callable[[int], None] | None = None,
) -> PackResult:
    """Packs `source` into `out`/train and, with `val` (a second source), `val_labels`, `options.val_fraction` or a
    built-in set that brings its own, `out`/val.

    Every file is checked as `verify` of PictureOptions or VideoOptions says.

    Args:
        source: a folder, a zip or a built-in set, see `open_source`.
        out: the folder that is written.
        val: another source, for validation.
        media: which kind of files; None takes the pictures or the videos, whichever the source has.
        labels: a list of labels (data_pipes.pack.label_lists) instead of class folders.
        val_labels: a list of labels for validation; without `val`, a second list over `source`.
        list_format: how the lists of labels are written; None: as their lines have it in common.
        options: None means the defaults.
        workers: threads; each of them writes one shard at a time.
        on_understood: called for each split, before anything is written, with what was found in its source, in words.
        on_plan: called once with the number of files to pack and their bytes in the sources.
        on_sample: called for each file that was handled, with its bytes in its source, from any thread.

    Raises:
        ValueError: `out` is finished, belongs to something else or was begun with other options; or a source or a file
            cannot be used (UnreadableFile).
        OSError: `out` cannot be written.
        ImportError: the files are videos, and PyAV is missing.
    """
    options = options or PackOptions()
    if workers < 1:
        raise ValueError(f"workers is {workers}; expected a number of threads >= 1")
    root = Path(out)
    refuse_foreign(root)
    opened = open_sources(source, val, val_labels, options.val_fraction)
    listings = _list_sources(opened, media, {"train": labels, "val": val_labels}, list_format, on_understood)
    media = listings["train"].media
    missing = _missing(opened, listings, options)
    identity = _identity(opened, listings, options)
    ordered = {split: packing_order(listing.entries, options) for split, listing in listings.items()}
    if options.val_fraction:
        opened["val"] = opened["train"]
        ordered = split_entries(ordered["train"], options.val_fraction)
    with locked(root):
        record = begin(root, identity, lambda: shrink_factors(opened, ordered, options, media))
        plans = [
            plan
            for split, entries in ordered.items()
            for plan in plan_shards(root / split, root / WORK_FOLDER, entries, record["shrink_factors"][split], options)
        ]
        if on_plan is not None:
            on_plan(
                sum(len(plan.entries) for plan in plans),
                sum(entry.file.size_bytes for plan in plans for entry in plan.entries),
            )
        results, num_resumed = _write_all(
            plans, opened, media, options, workers, on_sample or (lambda size_bytes: None)
        )
        ignored = _ignored(opened, listings)
        skipped = missing + [entry for result in results for entry in result.skipped]
        splits = _finish(root, record, plans, results, listings["train"], ignored, skipped)
    return PackResult(media, splits, ignored, skipped, num_resumed)


def _list_sources(
    opened: dict[str, Source],
    media: Media | None,
    labels: dict[str, Place | None],
    list_format: ListFormat | None,
    on_understood: Callable[[str], None] | None,
) -> dict[str, Listing]:
    """What is packed of each source; the kind of files and the classes of validation are those of training.

    Args:
        opened: the source of each split, training first.
        media: see `pack`.
        labels: the list of labels of each split, where there is one.
        list_format: see `pack`.
        on_understood: see `pack`.
    """
    listings: dict[str, Listing] = {}
    for split, source in opened.items():
        place = labels[split]
        lines = None if place is None else read_labels(Path(place), list_format)
        first = listings.get("train")
        listings[split] = list_source(
            source, first.media if first else media, first.classes if first else None, labels=lines
        )
        if on_understood is not None:
            on_understood(f"{split}: {describe(listings[split], source.title, lines)}")
    return listings


def _missing(opened: dict[str, Source], listings: dict[str, Listing], options: PackOptions) -> list[dict[str, str]]:
    """The files that a list of labels names and its source does not have.

    Raises:
        UnreadableFile: there are some, and `options.skip_missing` is off.
    """
    missing = [
        {"split": split, "name": name, "cause": "missing", "error": f"{opened[split].title}: {name} is not there"}
        for split, listing in listings.items()
        for name in listing.missing
    ]
    if missing and not options.skip_missing:
        raise UnreadableFile(
            f"{missing[0]['error']}, and {len(missing) - 1:,} more of the list of labels; complete the source, or "
            "leave out and list such files with --skip-missing",
            "missing",
        )
    return missing


def _ignored(opened: dict[str, Source], listings: dict[str, Listing]) -> list[str]:
    """The files of the sources that are not packed; of one source with two lists of labels, those that neither has."""
    train, *others = [listing.ignored for listing in listings.values()]
    if others and opened["val"] is opened["train"]:
        in_neither = set(train).intersection(*others)
        return [name for name in train if name in in_neither]
    return train + [name for names in others for name in names]


def _identity(opened: dict[str, Source], listings: dict[str, Listing], options: PackOptions) -> dict[str, Any]:
    """All that decides the content of the shards: the sizes, checksums and names of the files and the options, but not
    where the source lies.

    Raises:
        ValueError: an option was given that is about the other kind of files.
    """
    media = listings["train"].media
    settings = asdict(options)
    if not settings["skip_missing"]:  # packs that began before it was an option go on
        del settings["skip_missing"]
    of_kind: dict[Media, dict[str, Any]] = {"pictures": settings.pop("pictures"), "videos": settings.pop("videos")}
    other: Media = "pictures" if media == "videos" else "videos"
    defaults = asdict(PackOptions().of(other))
    foreign = [name for name, value in of_kind[other].items() if value != defaults[name] and name not in of_kind[media]]
    if foreign:
        raise ValueError(f"{', '.join(foreign)} is for {other}; {opened['train'].title} holds {media}")
    is_encoded = options.reencodes(media) or not all(source.sizes_are_exact for source in opened.values())
    return {
        "version": _VERSION,
        "media": media,
        "encoder": None if not is_encoded else PIL.__version__ if media == "pictures" else import_av().__version__,
        **{f"source_{split}": listing.digest() for split, listing in listings.items()},
        **of_kind[media],
        **settings,
    }


def _write_all(
    plans: Sequence[ShardPlan],
    opened: dict[str, Source],
    media: Media,
    options: PackOptions,
    workers: int,
    on_sample: Callable[[int], None],
) -> tuple[list[ShardResult], int]:
    """Writes the shards that are not finished yet; the first failure stops the other threads at their next file.

    Args:
        plans: all shards.
        opened: the source of each split.
        media: which kind of files.
        options: how they are packed.
        workers: threads.
        on_sample: see `pack`.

    Returns:
        The results in the order of the plans, and how many of them were there before.
    """
    stop = threading.Event()
    results = [finished_shard(plan) for plan in plans]
    num_resumed = sum(result is not None for result in results)
    for plan, result in zip(plans, results, strict=True):
        for entry in plan.entries if result is not None else ():
            on_sample(entry.file.size_bytes)
    with ThreadPoolExecutor(workers, thread_name_prefix="pack") as pool:
        writer = ShardWriter(options.preparation(media), options.skip_unreadable, on_sample, stop)
        futures = {
            pool.submit(writer.write, plan, opened[plan.split]): number
            for number, plan in enumerate(plans)
            if results[number] is None
        }
        try:
            for future in as_completed(futures):
                if not isinstance(future.exception(), Stopped):  # the failure that stopped it comes too
                    results[futures[future]] = future.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return [result for result in results if result is not None], num_resumed


def _finish(
    root: Path,
    record: dict[str, Any],
    plans: list[ShardPlan],
    results: list[ShardResult],
    listing: Listing,
    ignored: list[str],
    skipped: list[dict[str, str]],
) -> dict[str, Manifest]:
    """Writes the manifests, then the record that says that the data set is finished.

    Args:
        root: the folder that was packed into.
        record: of the pack that was begun.
        plans: all shards.
        results: one for each plan.
        listing: of the training source.
        ignored: files of the sources that are something else.
        skipped: unreadable or missing files, see `PackResult`.

    Returns:
        The manifest of each split.

    Raises:
        UnreadableFile: no file of a split can be read.
    """
    splits: dict[str, Manifest] = {}
    for split in dict.fromkeys(plan.split for plan in plans):
        pairs = zip(plans, results, strict=True)
        shards = [plan.path for plan, result in pairs if plan.split == split and result.num_samples]
        if not shards:
            raise UnreadableFile(
                f"{root}: none of the {listing.media} for {split} can be read; see why without --skip-unreadable"
            )
        splits[split] = index_shards(shards, root / split, listing.classes)
        for leftover in (root / split).glob(".*.tmp"):  # of a killed pack
            leftover.unlink()
    fingerprints = {split: manifest.fingerprint for split, manifest in splits.items()}
    content = {
        **record,
        "state": "finished",
        "fingerprints": fingerprints,
        "skipped": skipped,
        "num_ignored": len(ignored),
        "ignored_examples": ignored[:20],
    }
    write_atomically(root / RECORD_NAME, json.dumps(content, indent=1).encode())
    shutil.rmtree(root / WORK_FOLDER)
    return splits
