"""`tessera encode`: a data set of pictures -> latents for diffusion models, on any number of processes."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipes.config import DataConfig
    from pretrain.latents.encode_dataset import EncodeResult
    from pretrain.latents.options import EncodeOptions
    from pretrain.weights.tokenizer import LoadedTokenizer

HELP = "encode a data set of pictures into latent shards, with their statistics in the manifest"
EXAMPLES = """\
  tessera encode data/in1k/train data/in1k_latents --model runs/f32c32 --size 256
  tessera encode s3://bucket/photos latents/photos --model exports/f32c32 --size 512 --dtype bf16 --mirrored
  torchrun --nproc-per-node 8 --no-python tessera encode data/in1k/train data/latents --model runs/f32c32 --size 256
  tessera encode data/scans latents/scans --model runs/f32c32 --any-size --tile 1024

SHARDS is a packed or indexed data set, OUT a folder that all processes see. Shard i becomes OUT/shard-00000i.tar, whose
samples hold <key>.latent.safetensors (tensor "latent", unscaled) and the members that --carry names; stock webdataset
reads it. OUT/manifest.json has under "latents": mean and std per channel, the scaling factor 1/RMS, and the model's
digest. A job that was killed continues when the same command is given again, on any number of processes, and ends with
the same bytes (on the same kind of device)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """SHARDS, OUT, the model, and what latents are to be."""
    parser.add_argument("shards", metavar="SHARDS", help="folder or URL of a packed or indexed data set")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to create")
    add_model(parser)
    view = parser.add_mutually_exclusive_group()
    view.add_argument(
        "--size", type=size_of, metavar="PX", help="centre crop: 256, or height x width as 256x384 (default: the run's)"
    )
    view.add_argument("--any-size", action="store_true", help="encode each picture as it is")
    parser.add_argument(
        "--short-side", type=int, metavar="PX", help="of the resized picture before the crop (default: the crop's side)"
    )
    parser.add_argument(
        "--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="of the stored latents (default %(default)s)"
    )
    parser.add_argument("--mirrored", action="store_true", help="add the mirrored picture's latent to each sample")
    parser.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="pictures per pass (default %(default)s)"
    )
    parser.add_argument(
        "--carry",
        nargs="*",
        default=["cls", "json", "txt", "caption"],
        metavar="EXT",
        help="members that are copied, by extension (default: cls json txt caption)",
    )
    parser.add_argument(
        "--skip-unreadable", action="store_true", help="list bad samples in OUT/skipped.json, don't stop"
    )
    parser.add_argument("--workers", type=int, default=4, metavar="N", help="threads that decode (default %(default)s)")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds --model and how it runs; `decode` and `reconstruct` have these options too."""
    parser.add_argument("--model", required=True, metavar="RUN", help="run, checkpoint, or folder in diffusers' layout")
    parser.add_argument("--no-ema", action="store_true", help="the weights themselves, not their moving average")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="of the forward pass (default %(default)s)"
    )
    parser.add_argument(
        "--tile", type=int, metavar="PX", help="tiles of so many pixels for pictures with a longer side"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto = the GPU, if any")


def size_of(text: str) -> tuple[int, int]:
    """(height, width) from "256" or "256x384".

    Raises:
        ValueError: anything else, which argparse reports.
    """
    height, cross, width = text.partition("x")
    return int(height), int(width if cross else height)


def load_model(arguments: argparse.Namespace) -> LoadedTokenizer:
    """The tokenizer that the options of `add_model` name."""
    from pretrain.weights.tokenizer import load_tokenizer

    return load_tokenizer(arguments.model, ema=False if arguments.no_ema else None)


def loading_of(tokenizer: LoadedTokenizer) -> DataConfig:
    """How the tokenizer's run reads pictures; the defaults where there is no run."""
    from data_pipes.config import DataConfig

    return DataConfig() if tokenizer.config is None else tokenizer.config.data


def run(arguments: argparse.Namespace) -> dict[str, object]:
    """Encodes a data set. Under torchrun all processes share the work, and rank 0 alone has a summary.

    Raises:
        ValueError: unusable data, options or folders.
        OSError: OUT cannot be written.
    """
    from rich.console import Console

    from data_pipes.shards.manifest import Manifest
    from data_pipes.store.storage import Storage
    from launchers.progress import progress_bar
    from pretrain.latents.encode_dataset import encode_dataset
    from pretrain.parallel.world import join_world, leave_world

    tokenizer = load_model(arguments)
    loading = loading_of(tokenizer)
    manifest = Manifest.load(arguments.shards, Storage(loading.storage))
    options = _options(arguments, tokenizer, loading)
    world = join_world(arguments.device, timeout_s=7 * 86_400)  # the ranks wait for the slowest at the end
    console, begin_s = Console(stderr=True), time.monotonic()
    with progress_bar(console, "pictures") as progress:
        task = progress.add_task("encode", total=None, visible=world.is_main)
        result = encode_dataset(
            manifest,
            arguments.out,
            tokenizer,
            options,
            world,
            workers=arguments.workers,
            storage=loading.storage,
            on_plan=lambda num_samples: progress.update(task, total=num_samples),
            on_sample=lambda: progress.advance(task),
        )
    leave_world()
    if result is None:  # a rank other than 0
        return {}
    seconds = time.monotonic() - begin_s
    _print_result(console, arguments.out, result, seconds)
    return {
        "out": str(arguments.out),
        "num_samples": result.manifest.num_samples,
        "num_shards": len(result.manifest.shards),
        "num_resumed_shards": result.num_resumed_shards,
        "num_skipped": result.description["num_skipped"],
        "size_bytes": result.manifest.size_bytes,
        "fingerprint": result.manifest.fingerprint,
        "model": result.description["model"],
        "statistics": result.description["statistics"],
        "seconds": round(seconds, 3),
    }


def _options(arguments: argparse.Namespace, tokenizer: LoadedTokenizer, loading: DataConfig) -> EncodeOptions:
    """What the arguments and the tokenizer's run say of the latents.

    Raises:
        ValueError: the size is not known, or options do not fit each other.
    """
    from pretrain.latents.options import EncodeOptions

    size = tokenizer.image_size
    if arguments.any_size:
        size = None
    elif arguments.size is not None:
        size = arguments.size
    elif size is None:
        raise ValueError(f"{tokenizer.source} does not say which size it was trained on; give --size or --any-size")
    return EncodeOptions(
        size=size,
        short_side=arguments.short_side,
        dtype=arguments.dtype,
        precision=arguments.precision,
        batch_size=arguments.batch_size,
        mirrored=arguments.mirrored,
        carried=tuple(arguments.carry),
        skip_unreadable=arguments.skip_unreadable,
        tile=arguments.tile,
        bit_depth=loading.bit_depth,
        max_pixels=loading.max_pixels,
    )


def _print_result(console: Any, out: Path, result: EncodeResult, seconds: float) -> None:
    """Says what was encoded, for people."""
    from rich.filesize import decimal

    statistics, manifest = result.description["statistics"], result.manifest
    lines = [
        f"{out}: {manifest.num_samples:,} latents in {len(manifest.shards):,} shards, {decimal(manifest.size_bytes)}",
        f"RMS {statistics['rms']:.4g}, scaling factor {statistics['scaling_factor']:.4g}; mean and std per channel are "
        f"in {out}/manifest.json",
    ]
    if result.num_resumed_shards:
        lines.append(f"continued: {result.num_resumed_shards:,} shards were finished before")
    if result.description["num_skipped"]:
        lines.append(
            f"left out, unreadable: {result.description['num_skipped']:,} samples, listed in {out}/skipped.json"
        )
    lines.append(f"done in {seconds:.1f} s")
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
