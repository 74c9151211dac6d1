"""`tessera pack`: pictures or videos in folders, zips or built-in sets -> WebDataset shards with index and manifest."""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from typing import TYPE_CHECKING

from rich.console import Console
from rich.filesize import decimal

from launchers.progress import progress_bar

if TYPE_CHECKING:
    from data_pipes.pack.pack import PackResult
    from data_pipes.pack.plan import PackOptions

HELP = "Pack class folders of pictures or videos, a zip of them, or a built-in set into indexed WebDataset shards."
EXAMPLES = """\
tessera pack builtin:digits data/digits --val-fraction 0.1      1,797 digits, 10 % of them for validation
tessera pack imagenet/train data/in1k --val imagenet/val --short-side 256 --workers 16
tessera pack cifar10_train.zip data/cifar10 --val cifar10_test.zip
tessera pack photos.zip data/photos                             pictures without class folders: unlabelled
tessera pack kinetics/train data/k400 --val kinetics/val --short-side 256 --gop 32 --skip-unreadable
tessera pack ssv2/videos data/ssv2 --labels train.csv --val-labels val.csv --short-side 256 --gop 32
tessera pack photos data/photos --labels list.tsv --columns image=path,label=category --delimiter tab
tessera pack builtin:motion data/motion                         2,400 small videos, labelled by what moves how
tessera pack builtin:motion,videos=8000,size=96,frames=32 data/motion96

SRC is a folder of class folders, a zip of the same, a folder or zip of pictures or videos only (unlabelled, or with
--labels), or a built-in set: builtin:digits, builtin:photos, or builtin:motion, which brings its own validation set and
has the options videos, val_videos, size, frames and seed. OUT gets train/ and, with --val, --val-labels or
--val-fraction, val/; each is a dataset for data.train or data.val. Videos keep their bytes unless --short-side, --gop
or --fps asks for less than they have; then they become H.264 without sound. The order is shuffled by a hash of seed and
key, so that each shard mixes the classes. A pack that was killed continues when the same command is given again, and
ends with the same bytes. A finished OUT is never overwritten."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares SRC, OUT and how to pack."""
    parser.add_argument("source", metavar="SRC", help="folder, zip or built-in set")
    parser.add_argument("out", metavar="OUT", help="folder to create")
    validation = parser.add_mutually_exclusive_group()
    validation.add_argument("--val", metavar="SRC2", help="another source with the same classes, packed as OUT/val")
    validation.add_argument(
        "--val-fraction", type=float, default=0.0, metavar="F", help="share of SRC for OUT/val, by a hash of the key"
    )
    parser.add_argument("--media", choices=("pictures", "videos"), help="which to pack, where SRC holds both")
    parser.add_argument(
        "--labels",
        metavar="FILE",
        help="lines of `path,label` or `path label` instead of class folders; paths below SRC",
    )
    parser.add_argument("--val-labels", metavar="FILE", help="the same for OUT/val, from SRC2 or from SRC")
    parser.add_argument(
        "--columns",
        metavar="image=A,label=B",
        help="titles of the columns with paths and labels, or their numbers from 0 in lists without titles",
    )
    parser.add_argument(
        "--delimiter", metavar="D", help="between the columns of the lists: a character, comma, tab, semicolon or blank"
    )
    parser.add_argument(
        "--short-side",
        type=int,
        metavar="PX",
        help="re-encode what has a longer short side (bicubic, antialias); the others keep their bytes",
    )
    parser.add_argument(
        "--gop", type=int, metavar="N", help="re-encode videos with more frames per keyframe (32 is good)"
    )
    parser.add_argument("--fps", type=float, metavar="F", help="re-encode videos with more frames per second")
    parser.add_argument(
        "--crf", type=int, metavar="Q", help="x264's quality of re-encoded videos, 0 to 51 (default 20)"
    )
    parser.add_argument("--quality", type=int, default=95, help="of re-encoded JPEG (default %(default)s)")
    parser.add_argument(
        "--verify",
        choices=("header", "decode"),
        default="header",
        help="what is checked of files that keep their bytes: format, size and PNG checksums, of videos the list of "
        "packets and the first frame; or all pixels of all frames",
    )
    parser.add_argument(
        "--skip-unreadable", action="store_true", help="list files that cannot be read in pack.json, don't stop"
    )
    parser.add_argument(
        "--skip-missing",
        action="store_true",
        help="list files of the lists that are not there in pack.json, don't stop",
    )
    parser.add_argument(
        "--shard-size", type=float, default=256, metavar="MIB", help="MiB per shard, at most (default %(default)s)"
    )
    parser.add_argument(
        "--shard-samples", type=int, default=100_000, metavar="N", help="samples per shard, at most (default 100,000)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="take only N files of each source, in packing order")
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
    """Packs the source.

    Raises:
        ValueError: a source, a file or the folder cannot be used.
        OSError: OUT cannot be written.
        ImportError: the files are videos, and PyAV is missing.
    """
    from data_pipes.pack.list_format import ListFormat, parse_columns
    from data_pipes.pack.pack import pack

    options = _options(arguments)
    columns = (None, None) if arguments.columns is None else parse_columns(arguments.columns)
    if (arguments.columns or arguments.delimiter) and not (arguments.labels or arguments.val_labels):
        raise ValueError("--columns and --delimiter are about lists of labels; give one with --labels or --val-labels")
    console = Console(stderr=True)
    start = time.monotonic()
    with progress_bar(console, "files") as progress:
        task = progress.add_task("list", total=None)
        result = pack(
            arguments.source,
            arguments.out,
            val=arguments.val,
            media=arguments.media,
            labels=arguments.labels,
            val_labels=arguments.val_labels,
            list_format=ListFormat(arguments.delimiter, *columns),
            options=options,
            workers=arguments.workers,
            on_understood=lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True),
            on_plan=lambda num_files, size_bytes: progress.update(task, description="pack", total=num_files),
            on_sample=lambda size_bytes: progress.advance(task),
        )
    seconds = time.monotonic() - start
    _print_result(console, arguments.out, result, seconds)
    return {
        "out": arguments.out,
        "media": result.media,
        "splits": {split: manifest.summary() for split, manifest in result.splits.items()},
        "num_ignored": len(result.ignored),
        "num_skipped": len(result.skipped),
        "skipped_by_cause": _by_cause(result),
        "skipped": result.skipped,
        "num_resumed_shards": result.num_resumed_shards,
        "seconds": round(seconds, 3),
    }


def _options(arguments: argparse.Namespace) -> PackOptions:
    from data_pipes.pack.plan import PackOptions
    from data_pipes.pack.reencode_picture import PictureOptions
    from data_pipes.pack.reencode_video import VideoOptions

    side, verify = arguments.short_side, arguments.verify
    return PackOptions(
        shard_size_bytes=round(arguments.shard_size * 2**20),
        shard_samples=arguments.shard_samples,
        val_fraction=arguments.val_fraction,
        limit=arguments.limit,
        shuffle=not arguments.no_shuffle,
        seed=arguments.seed,
        skip_unreadable=arguments.skip_unreadable,
        skip_missing=arguments.skip_missing,
        pictures=PictureOptions(side, arguments.quality, verify),
        videos=VideoOptions(side, arguments.gop, arguments.fps, arguments.crf, verify),
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
        lines.append(
            f"not packed, since they are no {result.media}, or not in the list of labels: "
            f"{len(result.ignored):,} files, e.g. {result.ignored[0]}{_by_ending(result)}"
        )
    if result.skipped:
        causes = ", ".join(f"{cause}: {count:,}" for cause, count in _by_cause(result).items())
        lines.append(f"left out: {len(result.skipped):,} files ({causes}), listed in {out}/pack.json, e.g.")
        lines.append(f"  {result.skipped[0]['error']}")
    lines.append(f"done in {seconds:.1f} s")
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def _by_ending(result: PackResult) -> str:
    """The endings of the files that were not packed, the most frequent first."""
    endings = Counter(os.path.splitext(name)[1].lower() or "no ending" for name in result.ignored)
    return f" ({', '.join(f'{ending} {count:,}' for ending, count in endings.most_common(5))})"


def _by_cause(result: PackResult) -> dict[str, int]:
    """How many files were left out for each cause."""
    return dict(Counter(entry["cause"] for entry in result.skipped).most_common())
