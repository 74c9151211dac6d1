"""`tessera index`: tar shards that somebody else wrote -> index files and a manifest; the shards stay untouched."""

from __future__ import annotations

import argparse
import glob
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.filesize import decimal

from launchers.progress import progress_bar

if TYPE_CHECKING:
    from data_pipes.index.index import IndexedShard
    from data_pipes.store.storage import Storage

HELP = "Index WebDataset shards, here or in a store; the shards stay untouched and are checked strictly."
EXAMPLES = """\
tessera index data/shards                                          all *.tar in a folder
tessera index 'laion/{00000..00331}.tar' --out data/laion          braces as in webdataset
tessera index '/mnt/readonly/*.tar' --out data/mine --index-dir data/mine/index --classes names.txt
tessera index s3://bucket/train                                    writes beside the shards; needs that right
tessera index 'https://host/laion/{00000..00331}.tar' --out data/laion

Writes `<shard>.tar.idx` beside each shard (or into --index-dir) and manifest.json. Of shards in a store (http(s), s3,
gs, az, hf) everything goes into a local --out where there is one. An intact index of an unchanged shard is kept, so an
interrupted run continues when repeated. Tars in ustar, PAX or GNU format; compressed ones are refused. Truncation,
damaged headers and samples whose files are not adjacent are errors that name the shard."""

_SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
"""What is taken for a shard in a folder; compressed ones are then refused, not passed over."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the shards and where the index goes."""
    parser.add_argument(
        "shards",
        nargs="+",
        metavar="SHARDS",
        help="paths or URLs: tar files, folders of them, patterns with * or {a..b}",
    )
    parser.add_argument(
        "--out", metavar="DIR", help="folder (path or URL) for manifest.json (default: the folder of the shards)"
    )
    parser.add_argument(
        "--index-dir",
        metavar="DIR",
        help="folder for the index files (default: beside each shard; of a store's shards: index/ in a local --out)",
    )
    parser.add_argument("--classes", metavar="FILE", help="text file, line i (from 0) is the name of label i")
    parser.add_argument("--force", action="store_true", help="index again what has a valid index")
    parser.add_argument(
        "--allow-missing-end",
        action="store_true",
        help="accept tars without the two zero blocks at their end, which look the same as truncated ones",
    )
    parser.add_argument(
        "--allow-empty", action="store_true", help="leave out shards without a sample, which are errors otherwise"
    )
    parser.add_argument(
        "--workers", type=int, default=min(8, os.cpu_count() or 1), metavar="N", help="processes (default %(default)s)"
    )


def run(arguments: argparse.Namespace) -> dict[str, object]:
    """Indexes the shards.

    Raises:
        ShardError: a shard is damaged or not there; it is a ValueError.
        StorageError: a store cannot be used; it is an OSError.
    """
    from data_pipes.store.storage import Storage

    storage = Storage()
    try:
        return _run(arguments, storage)
    finally:
        storage.close()


def _run(arguments: argparse.Namespace, storage: Storage) -> dict[str, object]:
    from data_pipes.index.index import index_shards
    from data_pipes.inspect.content import Check
    from data_pipes.shards.members import no_media

    shards = find_shards(arguments.shards, storage)
    out = _as_place(arguments.out) if arguments.out else _common_folder(shards)
    classes = _class_names(arguments.classes, out, storage)
    console = Console(stderr=True)
    start = time.monotonic()
    reports: list[IndexedShard] = []
    with progress_bar(console, "shards") as progress:
        task = progress.add_task("index", total=len(shards))

        def on_shard(report: IndexedShard) -> None:
            reports.append(report)
            progress.advance(task)

        manifest = index_shards(
            shards,
            out,
            classes,
            index_dir=arguments.index_dir,
            force=arguments.force,
            workers=arguments.workers,
            allow_missing_end=arguments.allow_missing_end,
            allow_empty=arguments.allow_empty,
            on_shard=on_shard,
            storage=storage,
        )
    num_skipped, num_kept = sum(r.num_skipped for r in reports), sum(r.kept for r in reports)
    seconds = time.monotonic() - start
    line = (
        f"{out}: {manifest.num_samples:,} samples in {len(shards):,} shards, {decimal(manifest.size_bytes)}, "
        f"{f'{len(classes):,} classes' if classes else 'no class names'}; {num_kept:,} indexes were still valid; "
        f"{num_skipped:,} members belong to no sample (folders, hidden files, no extension); {seconds:.1f} s"
    )
    num_empty = len(shards) - len(manifest.shards)
    line += f"\n{num_empty:,} shards hold no sample and were left out" if num_empty else ""
    extensions = list(dict.fromkeys(name for report in reports for name in report.extensions))
    has_media = any(name in Check().media for name in extensions)
    if not has_media:
        line += f"\nwarning: {no_media(str(out), 'picture or video', extensions)}"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    return {
        "out": str(out),
        **manifest.summary(),
        "has_media": has_media,
        "num_kept_indexes": num_kept,
        "num_skipped_members": num_skipped,
        "num_empty_shards": num_empty,
        "seconds": round(seconds, 3),
    }


def find_shards(patterns: Sequence[str], storage: Storage | None = None) -> list[Path | str]:
    """The shards that a user names.

    Args:
        patterns: paths, URLs, folders and patterns; the shards of each are put into natural order.
        storage: for URLs; None: one with the default settings.

    Returns:
        A Path for each local shard, the URL for each other one.

    Raises:
        ShardError: a pattern names no shard.
    """
    from data_pipes.errors import ShardError
    from data_pipes.pack.sources import natural_key
    from data_pipes.store.urls import check_url

    found: list[Path | str] = []
    for pattern in patterns:
        check_url(pattern)
        place = _as_place(pattern)
        named: Iterator[Path | str] = _expand(place) if isinstance(place, Path) else _expand_url(place, storage)
        shards = sorted(named, key=lambda shard: natural_key(str(shard)))
        if not shards:
            raise ShardError(f"{pattern}: no shard here; expected a .tar file, a folder that holds some, or a pattern")
        found += shards
    return found


def _as_place(text: str) -> Path | str:
    from data_pipes.store.urls import is_remote, local_path

    return text.rstrip("/") if is_remote(text) else local_path(text)


def _expand(path: Path) -> Iterator[Path]:
    """The local shards that a path, folder or pattern names, in any order."""
    pattern = str(path)
    if path.is_dir():
        yield from (child for child in path.iterdir() if child.name.endswith(_SHARD_SUFFIXES) and child.is_file())
    elif path.exists():
        yield path
    elif "{" in pattern:
        from webdataset.shardlists import expand_urls

        yield from map(Path, expand_urls(pattern))  # each one must exist: a gap in the numbers is an error
    else:
        yield from map(Path, glob.glob(pattern, recursive=True))


def _expand_url(pattern: str, storage: Storage | None) -> Iterator[str]:
    """The shards in a store that a URL, a folder there or a pattern names, in any order."""
    from webdataset.shardlists import expand_urls

    from data_pipes.store.storage import Storage

    storage = storage or Storage()
    for url in expand_urls(pattern):
        path = url.partition("?")[0]
        if "*" in url:
            yield from storage.list(url)
        elif path.endswith(_SHARD_SUFFIXES):
            yield url  # it must exist: a gap in the numbers is an error
        else:
            yield from (found for found in storage.list(url) if found.endswith(_SHARD_SUFFIXES))


def _common_folder(shards: Sequence[Path | str]) -> Path | str:
    """The folder of all shards, where the manifest goes if no other is named.

    Raises:
        ShardError: they lie in several folders, or where no file can be written.
    """
    from data_pipes.errors import ShardError
    from data_pipes.store.urls import scheme_of

    folders = sorted(
        {shard.parent if isinstance(shard, Path) else shard.rpartition("/")[0] for shard in shards}, key=str
    )
    if len(folders) > 1:
        raise ShardError(f"the shards lie in {len(folders)} folders, e.g. {folders[0]} and {folders[1]}; give --out")
    if scheme_of(str(folders[0])) in ("http", "https"):
        raise ShardError(f"{folders[0]}: web servers take no files; name a folder for the index with --out")
    return folders[0]


def _class_names(file: str | None, out: Path | str, storage: Storage) -> tuple[str, ...]:
    """The class names in the file, else those of the manifest that is replaced: indexing again must not lose them."""
    from data_pipes.shards.manifest import Manifest

    if file is not None:
        return tuple(line.strip() for line in Path(file).read_text(encoding="utf-8").rstrip().splitlines())
    try:
        return Manifest.load(out, storage).classes
    except (ValueError, OSError):
        return ()
