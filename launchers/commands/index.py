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
    from data_pipes.index import IndexedShard

HELP = "Index WebDataset shards that somebody else wrote; the shards stay untouched and are checked strictly."
EXAMPLES = """\
tessera index data/shards                                          all *.tar in a folder
tessera index 'laion/{00000..00331}.tar' --out data/laion          braces as in webdataset
tessera index '/mnt/readonly/*.tar' --out data/mine --index-dir data/mine/index --classes names.txt

Writes `<shard>.tar.idx` beside each shard (or into --index-dir) and manifest.json. An intact index of an unchanged
shard is kept, so an interrupted run continues when repeated. Tars in ustar, PAX or GNU format; compressed ones are
refused. Truncation, damaged headers and samples whose files are not adjacent are errors that name the shard."""

_SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The shards and where the index goes."""
    parser.add_argument(
        "shards", nargs="+", metavar="SHARDS", help="tar files, folders of them, or patterns with * or {a..b}"
    )
    parser.add_argument("--out", metavar="DIR", help="folder for manifest.json (default: the folder of the shards)")
    parser.add_argument("--index-dir", metavar="DIR", help="folder for the index files (default: beside each shard)")
    parser.add_argument("--classes", metavar="FILE", help="text file, line i (from 0) is the name of label i")
    parser.add_argument("--force", action="store_true", help="index again what has a valid index")
    parser.add_argument(
        "--allow-missing-end",
        action="store_true",
        help="accept tars without the two zero blocks at their end, which look the same as truncated ones",
    )
    parser.add_argument(
        "--workers", type=int, default=min(8, os.cpu_count() or 1), metavar="N", help="processes (default %(default)s)"
    )


def run(arguments: argparse.Namespace) -> dict[str, object]:
    """Indexes. Raises ShardError (a ValueError) for shards that are damaged or not there."""
    from data_pipes.index import index_shards

    shards = find_shards(arguments.shards)
    out = Path(arguments.out) if arguments.out else _common_folder(shards)
    classes = _class_names(arguments.classes, out)
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
            on_shard=on_shard,
        )
    num_skipped, num_kept = sum(r.num_skipped for r in reports), sum(r.kept for r in reports)
    seconds = time.monotonic() - start
    line = (
        f"{out}: {manifest.num_samples:,} samples in {len(shards):,} shards, {decimal(manifest.size_bytes)}, "
        f"{f'{len(classes):,} classes' if classes else 'no class names'}; {num_kept:,} indexes were still valid; "
        f"{num_skipped:,} members belong to no sample (folders, hidden files, no extension); {seconds:.1f} s"
    )
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    return {
        "out": str(out),
        "num_samples": manifest.num_samples,
        "num_shards": len(shards),
        "size_bytes": manifest.size_bytes,
        "num_classes": len(classes),
        "num_kept_indexes": num_kept,
        "num_skipped_members": num_skipped,
        "fingerprint": manifest.fingerprint,
        "seconds": round(seconds, 3),
    }


def find_shards(patterns: Sequence[str]) -> list[Path]:
    """The shards that paths, folders and patterns name, each argument in natural order. Raises ShardError for none."""
    from data_pipes.index import ShardError
    from data_pipes.sources import natural_key

    found: list[Path] = []
    for pattern in patterns:
        if "://" in pattern or pattern.startswith("pipe:"):
            raise ShardError(f"{pattern}: only local shards can be indexed; copy or mount them first")
        shards = sorted(_expand(pattern), key=lambda path: natural_key(str(path)))
        if not shards:
            raise ShardError(f"{pattern}: no shard here; expected a .tar file, a folder that holds some, or a pattern")
        found += shards
    return found


def _expand(pattern: str) -> Iterator[Path]:
    path = Path(pattern)
    if path.is_dir():
        yield from (child for child in path.iterdir() if child.name.endswith(_SHARD_SUFFIXES) and child.is_file())
    elif path.exists():
        yield path
    elif "{" in pattern:
        from webdataset.shardlists import expand_urls

        yield from map(Path, expand_urls(pattern))  # each one must exist: a gap in the numbers is an error
    else:
        yield from map(Path, glob.glob(pattern, recursive=True))


def _common_folder(shards: Sequence[Path]) -> Path:
    from data_pipes.index import ShardError

    folders = sorted({shard.parent for shard in shards})
    if len(folders) > 1:
        raise ShardError(f"the shards lie in {len(folders)} folders, e.g. {folders[0]} and {folders[1]}; give --out")
    return folders[0]


def _class_names(file: str | None, out: Path) -> tuple[str, ...]:
    """From the file, else those of the manifest that is replaced: indexing again must not lose them."""
    from data_pipes.index import Manifest

    if file is not None:
        return tuple(line.strip() for line in Path(file).read_text(encoding="utf-8").rstrip().splitlines())
    try:
        return Manifest.load(out).classes
    except ValueError:
        return ()
