"""`tessera data`: look at a data set (stats), check it (verify), see what training sees (peek)."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.filesize import decimal

from launchers.progress import progress_bar

if TYPE_CHECKING:
    from data_pipes.inspect.verify import Verdict
    from data_pipes.loading.dataset import Loaded, SampleDataset

HELP = "Look at a data set: its figures, whether it is intact, and a sheet of samples as training sees them."
EXAMPLES = """\
tessera data stats data/in1k/train                        counts and sizes; labels and formats of 1,000 samples
tessera data stats s3://bucket/laion --read 0             from the index files alone
tessera data verify data/in1k/train                       every shard: size, index, all headers
tessera data verify data/in1k/train --decode --workers 16 and every picture, video, label and caption
tessera data peek data/in1k/train --out sheet.png         64 samples, cropped and mirrored, in training order

verify exits with 1 when something is wrong, and lists it as JSON lines in --out. A plain tar has no checksums for its
files: a damaged JPEG that still decodes to some picture cannot be told from an intact one."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the actions, each with its own arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="stats|verify|peek")
    stats = actions.add_parser("stats", help="counts, sizes, labels and formats")
    stats.add_argument("source", metavar="DIR_OR_URL", help="the data set: its folder, with manifest.json")
    stats.add_argument(
        "--read", type=int, default=1000, metavar="N", help="samples read for labels and formats (default %(default)s)"
    )
    stats.add_argument("--seed", type=int, default=0, help="chooses which samples are read (default %(default)s)")

    verify = actions.add_parser("verify", help="is every shard what the manifest says")
    verify.add_argument("source", metavar="DIR_OR_URL", help="the data set: its folder, with manifest.json")
    verify.add_argument(
        "--decode", action="store_true", help="decode every picture and video; read every label and caption"
    )
    verify.add_argument("--workers", type=int, default=1, metavar="N", help="processes (default %(default)s)")
    verify.add_argument(
        "--out", default="corrupt.jsonl", metavar="FILE", help="what is wrong, if anything is (default %(default)s)"
    )

    peek = actions.add_parser("peek", help="a sheet of samples after augmentation, in training order")
    peek.add_argument("source", metavar="DIR_OR_URL", help="the data set: its folder, with manifest.json")
    peek.add_argument("--out", default="sheet.png", metavar="PNG", help="the sheet (default %(default)s)")
    peek.add_argument("--num", type=int, default=64, metavar="N", help="samples on the sheet (default %(default)s)")
    peek.add_argument("--seed", type=int, default=0, help="of order and augmentation (default %(default)s)")
    peek.add_argument(
        "--epoch-position", type=int, default=0, metavar="P", help="of the first sample shown (default %(default)s)"
    )
    peek.add_argument("--size", type=int, default=224, metavar="PX", help="side of the crops (default %(default)s)")
    peek.add_argument("--channels", type=int, default=3, help="of the model's input (default %(default)s)")
    peek.add_argument("--bit-depth", type=int, default=8, choices=(8, 16), help="of the batches (default %(default)s)")
    for action in (stats, verify, peek):
        action.add_argument("--label-key", default="label", metavar="KEY", help="of labels in .json (default label)")
        action.add_argument(
            "--image-member", metavar="NAME", help="which member is the picture or video: left.jpg, *.jpg (a pattern)"
        )
        action.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON object")


def run(arguments: argparse.Namespace) -> dict[str, object]:
    """Looks at, checks or shows a data set.

    Raises:
        ValueError: the data set cannot be used.
        SystemExit: with 1 where `verify` finds flaws: they are a result, and the command line's own exit codes know
            errors only.
    """
    actions = {"stats": _stats, "verify": _verify, "peek": _peek}
    return actions[arguments.action](arguments, Console(stderr=True))


def _say(console: Console, *lines: str) -> None:
    """Prints lines as they are, of whatever length."""
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def _stats(arguments: argparse.Namespace, console: Console) -> dict[str, object]:
    from data_pipes.inspect.stats import dataset_statistics
    from data_pipes.shards.manifest import Manifest
    from data_pipes.shards.wanted import checked_member

    manifest = Manifest.load(arguments.source)
    with progress_bar(console, "shards") as progress:
        task = progress.add_task("index files", total=len(manifest.shards))
        statistics = dataset_statistics(
            manifest,
            num_read=arguments.read,
            seed=arguments.seed,
            label_key=arguments.label_key,
            member=checked_member(arguments.image_member),
            on_shard=lambda: progress.advance(task),
        )
    _say(console, *_describe(arguments.source, statistics, arguments.image_member))
    return {"source": arguments.source, **statistics}


def _describe(source: str, statistics: dict[str, Any], member: str | None) -> list[str]:
    """The statistics in lines for people."""
    from data_pipes.shards.members import no_media

    sizes, members = statistics["sample_bytes"], list(statistics["extensions"].items())[:20]
    lines = [
        f"{source}: {statistics['num_samples']:,} samples in {statistics['num_shards']:,} shards, "
        f"{decimal(statistics['size_bytes'])}, {statistics['num_classes']:,} class names",
        f"sample size: mean {decimal(round(sizes['mean']))}, "
        + ", ".join(f"{name} {decimal(sizes[name])}" for name in ("min", "p1", "p10", "p50", "p90", "p99", "max")),
        "members: " + ", ".join(f".{name} {100 * part['share']:.4g} %" for name, part in members),
    ]
    if not statistics["media"]:
        lines.append("warning: " + no_media(source, "picture or video", list(statistics["extensions"]), member))
    sampled = statistics["sampled"]
    if not sampled:
        return lines
    labels = sampled["labels"]
    lines.append(
        f"of {sampled['num_read']:,} samples read: {sampled['num_unlabelled']:,} without a label, "
        f"{sampled['num_labels_seen']:,} different labels"
    )
    if labels:
        names = [f"{label['name'] or label['label']} {label['num_samples']}" for label in labels]
        least = "; least: " + ", ".join(names[10:][-5:]) if len(names) > 10 else ""
        lines.append("most frequent: " + ", ".join(names[:10]) + least)
    if sampled["pictures"]:
        lines.append("pictures: " + ", ".join(f"{kind} {count:,}" for kind, count in sampled["pictures"].items()))
    if sampled["height"]:
        height, width = sampled["height"], sampled["width"]
        lines.append(
            f"height: {height['min']} to {height['max']}, median {height['p50']}; "
            f"width: {width['min']} to {width['max']}, median {width['p50']}"
        )
    if sampled["bad"]:
        lines.append("unusable: " + ", ".join(f"{cause} {count:,}" for cause, count in sampled["bad"].items()))
    return lines


def _verify(arguments: argparse.Namespace, console: Console) -> dict[str, object]:
    from data_pipes.inspect.content import Check
    from data_pipes.inspect.verify import verify
    from data_pipes.shards.manifest import Manifest
    from data_pipes.shards.members import no_media
    from data_pipes.shards.wanted import checked_member

    manifest = Manifest.load(arguments.source)
    out, start = Path(arguments.out), time.monotonic()
    causes: Counter[str] = Counter()
    num_decoded = num_videos = num_flaws = num_bad_shards = num_without = 0
    found: dict[str, None] = {}
    check = Check(arguments.decode, arguments.label_key, member=checked_member(arguments.image_member))
    with progress_bar(console, "samples") as progress:
        task = progress.add_task("verify", total=manifest.num_samples)
        for verdict in verify(manifest, check, arguments.workers):
            num_decoded, num_flaws = num_decoded + verdict.num_decoded, num_flaws + verdict.num_flaws
            causes.update(flaw.cause for flaw in verdict.flaws)
            num_videos += verdict.num_videos
            num_without += verdict.num_without_media
            found.update(dict.fromkeys(verdict.extensions))
            _write_flaws(out, verdict, append=num_bad_shards > 0)
            num_bad_shards += verdict.num_flaws > 0
            progress.advance(task, verdict.num_samples)
    result: dict[str, object] = {
        "source": arguments.source,
        "intact": num_flaws == 0,
        "num_samples": manifest.num_samples,
        "num_shards": len(manifest.shards),
        "num_bad_shards": num_bad_shards,
        "num_decoded": num_decoded,
        "num_videos": num_videos,
        "num_flaws": num_flaws,
        "num_without_media": num_without,
        "causes": dict(causes.most_common()),
        "list": str(out) if num_flaws else None,
        "seconds": round(time.monotonic() - start, 3),
    }
    checked = f"{manifest.num_samples:,} samples in {len(manifest.shards):,} shards"
    pictures = f", {num_decoded - num_videos:,} pictures decoded" if arguments.decode else ""
    pictures += f", {num_videos:,} videos decoded" if num_videos else ""
    if not num_flaws:
        _say(console, f"{arguments.source}: intact; {checked}{pictures}; {result['seconds']} s")
        return result
    counts = ", ".join(f"{cause}: {count:,}" for cause, count in causes.most_common())
    _say(
        console,
        f"{arguments.source}: {num_flaws:,} flaws in {num_bad_shards:,} of {len(manifest.shards):,} shards ({counts}); "
        f"{checked}{pictures}; listed in {out}",
    )
    if num_without == manifest.num_samples:
        _say(console, no_media(arguments.source, "picture or video", list(found), check.member))
    if arguments.json:
        print(json.dumps(result), flush=True)
    raise SystemExit(1)


def _write_flaws(out: Path, verdict: Verdict, append: bool) -> None:
    """Writes the flaws of a shard as JSON lines; without one, the file is left alone."""
    if verdict.flaws:
        with open(out, "a" if append else "w", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(flaw)) + "\n" for flaw in verdict.flaws)


def _peek(arguments: argparse.Namespace, console: Console) -> dict[str, object]:
    import numpy as np

    from data_pipes.inspect.contact_sheet import contact_sheet
    from data_pipes.store.files import write_atomically

    if arguments.num < 1 or arguments.epoch_position < 0:
        raise ValueError(
            f"--num is {arguments.num} and --epoch-position {arguments.epoch_position}; expected >= 1 and >= 0"
        )
    dataset = _training_set(arguments)
    positions = np.arange(arguments.epoch_position, arguments.epoch_position + arguments.num, dtype=np.int64)
    loaded = dataset.load(dataset.request(positions))
    if loaded.batch is None:
        assert loaded.error is not None
        raise loaded.error
    batch, classes = loaded.batch, dataset.collection.classes
    labels = batch.labels.tolist()
    names = ["no label" if n < 0 else classes[n] if n < len(classes) else str(n) for n in labels]
    replaced = {bad.position for bad in loaded.bad}
    marks = [" (substitute)" if position in replaced else "" for position in batch.positions.tolist()]
    captions = [(key, name + mark) for key, name, mark in zip(batch.keys, names, marks, strict=True)]
    shown = f"positions {positions[0]:,} to {positions[-1]:,}, seed {arguments.seed}"
    sheet = contact_sheet(f"{arguments.source}: {shown}", batch.images, captions)
    write_atomically(Path(arguments.out), sheet)
    _say(console, f"{arguments.out}: {arguments.num:,} samples, {shown}{_bad_note(loaded)}")
    return {
        "sheet": arguments.out,
        "size_bytes": len(sheet),
        "positions": [int(positions[0]), int(positions[-1])],
        "keys": batch.keys,
        "labels": labels,
        "bad": [asdict(bad) for bad in loaded.bad],
    }


def _training_set(arguments: argparse.Namespace) -> SampleDataset:
    """The data set as a run with the default transform would open it; videos become clips."""
    from data_pipes.config import DataConfig
    from data_pipes.decode.video import VIDEO_EXTENSIONS
    from data_pipes.open import open_collection, open_dataset
    from data_pipes.order.order import OrderConfig
    from data_pipes.shards.load_index import load_index
    from data_pipes.shards.members import IMAGE_EXTENSIONS
    from data_pipes.store.storage import Storage
    from data_pipes.transforms.clip_sampling import ClipSampling

    config = DataConfig(
        train=arguments.source,
        order=OrderConfig(seed=arguments.seed),
        bit_depth=arguments.bit_depth,
        label_key=arguments.label_key,
        image_member=arguments.image_member,
    )
    collection = open_collection(config)
    extensions = load_index(collection.manifests[0], 0, Storage()).extensions
    has_pictures, has_videos = (not set(known).isdisjoint(extensions) for known in (IMAGE_EXTENSIONS, VIDEO_EXTENSIONS))
    if arguments.image_member is None and has_videos and not has_pictures:
        config = DataConfig(**{**vars(config), "video": ClipSampling()})
    size = (arguments.size, arguments.size)
    return open_dataset(config, image_size=size, channels=arguments.channels, global_batch=256, collection=collection)


def _bad_note(loaded: Loaded) -> str:
    """What to say of bad samples, behind the line about the sheet."""
    if not loaded.bad:
        return ""
    first = loaded.bad[0]
    return f"; {len(loaded.bad)} bad samples were replaced, e.g. {first.key} in {first.shard}: {first.error}"
