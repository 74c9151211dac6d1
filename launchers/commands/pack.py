"""`tessera pack`: pictures in folders, zips or built-in sets -> WebDataset shards, index files and a manifest."""

from __future__ import annotations

import argparse
import os
import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.filesize import decimal

from launchers.progress import progress_bar

if TYPE_CHECKING:
    from data_pipes.index import Manifest
    from data_pipes.pack import PackOptions, PackResult

HELP = "Pack class folders, a zip of them, or built-in pictures into WebDataset shards with an index and a manifest."
EXAMPLES = """\
tessera pack builtin:digits data/digits --val-fraction 0.1      1,797 digits, 10 % of them for validation
tessera pack imagenet/train data/in1k --val imagenet/val --short-side 256 --workers 16
tessera pack cifar10_train.zip data/cifar10 --val cifar10_test.zip
tessera pack photos.zip data/photos                             pictures without class folders: unlabelled

SRC is a folder of class folders, a zip of the same, a folder or zip of pictures only (unlabelled), builtin:digits or
builtin:photos. OUT gets train/ and, with --val or --val-fraction, val/; each is a dataset for data.train or data.val.
The order is shuffled by a hash of seed and key, so that each shard mixes the classes. A pack that was killed continues
when the same command is given again, and ends with the same bytes. A finished OUT is never overwritten."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """SRC, OUT and how to pack."""
    parser.add_argument("source", metavar="SRC", help="folder, zip, builtin:digits or builtin:photos")
    parser.add_argument("out", metavar="OUT", help="folder to create")
    validation = parser.add_mutually_exclusive_group()
    validation.add_argument("--val", metavar="SRC2", help="another source with the same classes, packed as OUT/val")
    validation.add_argument(
        "--val-fraction", type=float, default=0.0, metavar="F", help="share of SRC for OUT/val, by a hash of the key"
    )
    parser.add_argument(
        "--short-side",
        type=int,
        metavar="PX",
        help="re-encode pictures whose short side is longer (bicubic, antialias); the others keep their bytes",
    )
    parser.add_argument("--quality", type=int, default=95, help="of re-encoded JPEG (default %(default)s)")
    parser.add_argument(
        "--verify",
        choices=("header", "decode"),
        default="header",
        help="what is checked of pictures that keep their bytes: format, size and PNG checksums, or all pixels",
    )
    parser.add_argument("--skip-unreadable", action="store_true", help="list bad pictures in pack.json, don't stop")
    parser.add_argument(
        "--shard-size", type=float, default=256, metavar="MIB", help="MiB per shard, at most (default %(default)s)"
    )
    parser.add_argument(
        "--shard-samples", type=int, default=100_000, metavar="N", help="samples per shard, at most (default 100,000)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="take only N pictures of each source, in packing order")
    parser.add_argument("--seed", type=int, default=0, help="of the packing order (default %(default)s)")
    parser.add_argument("--no-shuffle", action="store_true", help="keep the natural order of the names")
    parser.add_argument(
        "--workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        metavar="N",
        help="threads, each writing a shard (default %(default)s)",
    )


def run(arguments: argparse.Namespace) -> dict[str, object]:
    """Packs. Raises ValueError for unusable sources, pictures and folders, OSError when OUT cannot be written."""
    from data_pipes.pack import pack

    options = _options(arguments)
    console = Console(stderr=True)
    start = time.monotonic()
    with progress_bar(console, "pictures") as progress:
        task = progress.add_task("list", total=None)
        result = pack(
            arguments.source,
            arguments.out,
            val=arguments.val,
            options=options,
            workers=arguments.workers,
            on_plan=lambda num_pictures, size_bytes: progress.update(task, description="pack", total=num_pictures),
            on_sample=lambda size_bytes: progress.advance(task),
        )
    seconds = time.monotonic() - start
    _print_result(console, arguments.out, result, seconds)
    return {
        "out": arguments.out,
        "splits": {split: _summary(manifest) for split, manifest in result.splits.items()},
        "num_ignored": len(result.ignored),
        "num_skipped": len(result.skipped),
        "skipped": result.skipped,
        "num_resumed_shards": result.num_resumed_shards,
        "seconds": round(seconds, 3),
    }


def _options(arguments: argparse.Namespace) -> PackOptions:
    from data_pipes.pack import PackOptions
    from data_pipes.reencode import PictureOptions

    return PackOptions(
        shard_size_bytes=round(arguments.shard_size * 2**20),
        shard_samples=arguments.shard_samples,
        val_fraction=arguments.val_fraction,
        limit=arguments.limit,
        shuffle=not arguments.no_shuffle,
        seed=arguments.seed,
        skip_unreadable=arguments.skip_unreadable,
        pictures=PictureOptions(arguments.short_side, arguments.quality, arguments.verify),
    )


def _print_result(console: Console, out: str, result: PackResult, seconds: float) -> None:
    lines = [
        f"{out}/{split}: {manifest.num_samples:,} samples in {len(manifest.shards):,} shards, "
        f"{decimal(manifest.size_bytes)}, {f'{len(manifest.classes):,} classes' if manifest.classes else 'unlabelled'}"
        for split, manifest in result.splits.items()
    ]
    if result.num_resumed_shards:
        lines.append(f"continued: {result.num_resumed_shards:,} shards were finished before")
    if result.ignored:
        lines.append(f"not packed, since they are no pictures: {len(result.ignored):,} files, e.g. {result.ignored[0]}")
    if result.skipped:
        lines.append(f"left out, unreadable: {len(result.skipped):,} pictures, listed in {out}/pack.json, e.g.")
        lines.append(f"  {result.skipped[0]['error']}")
    lines.append(f"done in {seconds:.1f} s")
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def _summary(manifest: Manifest) -> dict[str, object]:
    return {
        "num_samples": manifest.num_samples,
        "num_shards": len(manifest.shards),
        "size_bytes": manifest.size_bytes,
        "num_classes": len(manifest.classes),
        "fingerprint": manifest.fingerprint,
    }
