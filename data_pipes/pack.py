"""Packing: from pictures in folders, zips or built-in sets to shards, index files and manifests.

Enters: a source (data_pipes.sources) and options. Leaves: OUT/train/ and, with a split, OUT/val/, each with
`manifest.json`, `shard-000000.tar`, ... and an index beside each shard, and OUT/pack.json, the record of what was
packed how. Why it exists: a run needs few large files that stock webdataset reads, checked once.

All is planned before the first byte is written: a shard's content follows from the source and the options alone. So a
killed pack continues behind its last finished shard, several threads write shards at once, and the result is the same
to the byte (as long as the same Pillow re-encodes).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import PIL

from data_pipes.builtin import BUILTINS, load_builtin
from data_pipes.files import write_atomically
from data_pipes.index import Manifest, index_shards
from data_pipes.pack_plan import PackOptions, packing_order, plan_shards, shrink_factors, split_pictures
from data_pipes.reencode import UnreadablePicture
from data_pipes.shard_writer import ShardPlan, ShardResult, Stopped, finished_shard, write_shard
from data_pipes.sources import FolderSource, Listing, Source, ZipSource, list_pictures

__all__ = ["RECORD_NAME", "PackOptions", "PackResult", "open_source", "pack"]

RECORD_NAME = "pack.json"
_WORK_FOLDER = ".pack"
_VERSION = 1
_BUILTIN_PREFIX = "builtin:"


@dataclass(frozen=True)
class PackResult:
    """What was packed: the manifests of "train" and "val", and what was not."""

    splits: dict[str, Manifest]
    ignored: list[str]
    # files of the source that are no pictures
    skipped: list[dict[str, str]]
    # unreadable pictures: {"split", "name", "error"}
    num_resumed_shards: int
    # shards that an earlier, killed pack had finished


def open_source(source: str | os.PathLike[str]) -> Source:
    """A folder, a zip, or a built-in set ("builtin:digits"; "digits" where no such path exists). Raises ValueError for
    anything else.
    """
    text = os.fspath(source)
    path = Path(text)
    if text.startswith(_BUILTIN_PREFIX):
        return load_builtin(text.removeprefix(_BUILTIN_PREFIX))
    if path.is_dir():
        return FolderSource(path)
    if path.is_file():
        if path.suffix.lower() == ".tar":
            raise ValueError(
                f"{path}: a tar file; if it holds a webdataset, use `tessera index {path}`; otherwise unpack it "
                "and pack the folder"
            )
        return ZipSource(path)
    if text in BUILTINS:
        return load_builtin(text)
    raise ValueError(
        f"{text}: no such folder or zip; built-in sets are "
        f"{', '.join(_BUILTIN_PREFIX + name for name in sorted(BUILTINS))}"
    )


def pack(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    val: str | os.PathLike[str] | None = None,
    options: PackOptions | None = None,
    workers: int = 1,
    on_plan: Callable[[int, int], None] | None = None,
    on_sample: Callable[[int], None] | None = None,
) -> PackResult:
    """Packs `source` into `out`/train and, with `val` (a second source) or `options.val_fraction`, `out`/val.

    `workers` threads write shards at once. `on_plan(num_pictures, size_bytes)` is called once, `on_sample(size_bytes)`
    for each picture that was handled, from any thread; both count bytes of the source. Every picture is checked as
    `PictureOptions.verify` says. Raises ValueError when `out` is finished, belongs to something else or was begun with
    other options, and for unusable sources and pictures (UnreadablePicture); OSError when `out` cannot be written.
    """
    options = options or PackOptions()
    if val is not None and options.val_fraction:
        raise ValueError("both a validation source and val_fraction are given; choose one")
    if workers < 1:
        raise ValueError(f"workers is {workers}; expected a number of threads >= 1")
    root = Path(out)
    _refuse_foreign(root)
    opened = {"train": open_source(source)}
    listings = {"train": list_pictures(opened["train"])}
    if val is not None:
        opened["val"] = open_source(val)
        listings["val"] = list_pictures(opened["val"], listings["train"].classes)
    identity = _identity(listings, options)
    ordered = {split: packing_order(listing.pictures, options) for split, listing in listings.items()}
    if options.val_fraction:
        opened["val"] = opened["train"]
        ordered = split_pictures(ordered["train"], options.val_fraction)
    with _locked(root):
        record = _begin(root, identity, lambda: shrink_factors(opened, ordered, options))
        plans = [
            plan
            for split, pictures in ordered.items()
            for plan in plan_shards(
                root / split, root / _WORK_FOLDER, pictures, record["shrink_factors"][split], options
            )
        ]
        if on_plan is not None:
            on_plan(
                sum(len(plan.pictures) for plan in plans),
                sum(p.file.size_bytes for plan in plans for p in plan.pictures),
            )
        results, num_resumed = _write_all(plans, opened, options, workers, on_sample or (lambda size_bytes: None))
        ignored = [name for listing in listings.values() for name in listing.ignored]
        splits = _finish(root, record, plans, results, listings["train"].classes, ignored)
    skipped = [entry for result in results for entry in result.skipped]
    return PackResult(splits, ignored, skipped, num_resumed)


def _refuse_foreign(root: Path) -> None:
    if not root.exists() or _read_record(root) is not None:
        return
    if not root.is_dir() or any(child.name != _WORK_FOLDER for child in root.iterdir()):
        raise ValueError(f"{root}: exists and was not begun by `tessera pack`; choose a new or empty folder")


def _identity(listings: dict[str, Listing], options: PackOptions) -> dict[str, Any]:
    """All that decides the content of the shards; how large the files are and what is in them, not where the source
    lies.
    """
    settings = asdict(options)
    encoder = PIL.__version__ if options.pictures.short_side is not None else None
    return {
        "version": _VERSION,
        "pillow": encoder,
        **{f"source_{s}": listing.digest() for s, listing in listings.items()},
        **settings.pop("pictures"),
        **settings,
    }


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """One pack at a time in a folder; the lock goes with the process, so a killed one leaves none behind."""
    (root / _WORK_FOLDER).mkdir(parents=True, exist_ok=True)
    with open(root / _WORK_FOLDER / "lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise ValueError(
                    f"{root}: another `tessera pack` is writing here; wait for it, or choose another folder"
                ) from error
            # some network file systems have no locks: then only the record protects
        yield


def _begin(root: Path, identity: dict[str, Any], probe: Callable[[], dict[str, float]]) -> dict[str, Any]:
    """The record of a new pack, or of the one that is continued."""
    record = _read_record(root)
    if record is None:
        record = {"state": "packing", "identity": identity, "shrink_factors": probe()}
        write_atomically(root / RECORD_NAME, json.dumps(record, indent=1).encode())
        return record
    before = record["identity"]
    changed = [
        f"{name} was {before.get(name)!r}, is {identity.get(name)!r}"
        for name in sorted(before.keys() | identity.keys())
        if before.get(name) != identity.get(name)
    ]
    if changed:
        raise ValueError(
            f"{root}: was begun with other options or another source ({'; '.join(changed)}); repeat the first "
            "command to continue it, or choose another folder"
        )
    return record


def _read_record(root: Path) -> dict[str, Any] | None:
    """The record of a pack that was begun here. Raises ValueError when it is finished or is no record."""
    path = root / RECORD_NAME
    if not path.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        is_finished = {"packing": False, "finished": True}[record["state"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a record of `tessera pack`; choose another folder") from error
    if is_finished:
        raise ValueError(
            f"{root}: holds a finished dataset; it is never overwritten: choose another folder, or delete it first"
        )
    return record


def _write_all(
    plans: Sequence[ShardPlan],
    opened: dict[str, Source],
    options: PackOptions,
    workers: int,
    on_sample: Callable[[int], None],
) -> tuple[list[ShardResult], int]:
    """The results in the order of the plans, and how many of them were there before. The first failure stops the other
    threads at their next picture.
    """
    stop = threading.Event()
    results = [finished_shard(plan) for plan in plans]
    num_resumed = sum(result is not None for result in results)
    for plan, result in zip(plans, results, strict=True):
        for picture in plan.pictures if result is not None else ():
            on_sample(picture.file.size_bytes)
    with ThreadPoolExecutor(workers, thread_name_prefix="pack") as pool:
        arguments = (options.pictures, options.skip_unreadable, stop, on_sample)
        futures = {
            pool.submit(write_shard, plan, opened[plan.split], *arguments): number
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
    classes: tuple[str, ...],
    ignored: list[str],
) -> dict[str, Manifest]:
    """Writes the manifests, then the record that says the dataset is finished."""
    splits: dict[str, Manifest] = {}
    for split in dict.fromkeys(plan.split for plan in plans):
        pairs = zip(plans, results, strict=True)
        shards = [plan.path for plan, result in pairs if plan.split == split and result.num_samples]
        if not shards:
            raise UnreadablePicture(
                f"{root}: none of the pictures for {split} can be read; see why without --skip-unreadable"
            )
        splits[split] = index_shards(shards, root / split, classes)
        for leftover in (root / split).glob(".*.tmp"):  # of a killed pack
            leftover.unlink()
    skipped = [entry for result in results for entry in result.skipped]
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
    shutil.rmtree(root / _WORK_FOLDER)
    return splits
