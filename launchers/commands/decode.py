"""`tessera decode`: latents -> pictures."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from launchers.commands.encode import add_model, load_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pretrain.latents.decode import StoredLatent

HELP = "decode latent shards, or safetensors files of latents, to PNG files"
EXAMPLES = """\
  tessera decode data/in1k_latents pictures --model runs/f32c32 --limit 64
  tessera decode samples.safetensors pictures --model exports/f32c32 --scaling-factor 0.3189

LATENTS is a folder that `tessera encode` made, or a .safetensors file with tensors [channels, height, width] or batches
of these, such as a diffusion model's samples. The latents of `tessera encode` are not scaled; those of a diffusion
model usually are: name its factor."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """LATENTS, OUT, the model, and which latents."""
    parser.add_argument(
        "latents", type=Path, metavar="LATENTS", help="folder of `tessera encode`, or a .safetensors file"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the pictures")
    add_model(parser)
    parser.add_argument("--limit", type=int, metavar="N", help="the first N latents (default: all)")
    parser.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="latents per pass (default %(default)s)"
    )
    parser.add_argument("--mirrored", action="store_true", help="the tensors that `tessera encode --mirrored` added")
    parser.add_argument(
        "--scaling-factor", type=float, metavar="F", help="of a file's latents: they are divided by it (default: 1)"
    )


def run(arguments: argparse.Namespace) -> dict[str, object]:
    """Decodes latents to PNG files.

    Raises:
        ValueError: latents of another model's shape, pictures that exist, or options that do not fit.
    """
    from rich.console import Console

    from launchers.progress import progress_bar
    from pretrain.latents.coder import PictureCoder
    from pretrain.latents.decode import decode_to_files
    from pretrain.parallel.world import pick_device

    if (arguments.limit or 1) < 1 or arguments.batch_size < 1:
        raise ValueError(f"--limit {arguments.limit} and --batch-size {arguments.batch_size}; expected at least 1")
    tokenizer = load_model(arguments)
    latents, total, encoded_by = _latents(arguments)
    coder = PictureCoder(tokenizer, pick_device(arguments.device), precision=arguments.precision, tile=arguments.tile)
    console = Console(stderr=True)
    if encoded_by not in (None, tokenizer.digest):
        console.print(f"note: another model encoded these latents; {tokenizer.label} only decodes them as they were if "
                      "it has the same encoder", style="yellow")  # fmt: skip
    with progress_bar(console, "pictures") as progress:
        task = progress.add_task("decode", total=None if total is None else min(total, arguments.limit or total))
        count = decode_to_files(
            latents,
            coder,
            arguments.out,
            batch_size=arguments.batch_size,
            limit=arguments.limit,
            on_picture=lambda: progress.advance(task),
        )
    console.print(f"{arguments.out}: {count:,} pictures", highlight=False)
    return {
        "out": str(arguments.out),
        "num_pictures": count,
        "model_digest": tokenizer.digest,
        "encoded_by_this_model": None if encoded_by is None else encoded_by == tokenizer.digest,
    }


def _latents(arguments: argparse.Namespace) -> tuple[Iterator[StoredLatent], int | None, str | None]:
    """What the arguments name.

    Returns:
        (latents, their number, digest of the model that encoded them); None where it is not known.

    Raises:
        ValueError: the options do not fit the latents.
    """
    from data_pipes.shards.manifest import Manifest
    from pretrain.latents.decode import latents_of_dataset, latents_of_file
    from pretrain.latents.encode_dataset import read_description

    if arguments.latents.is_file():
        if arguments.mirrored:
            raise ValueError(f"{arguments.latents} is a file, all of whose tensors are decoded: leave out --mirrored")
        factor = 1.0 if arguments.scaling_factor is None else arguments.scaling_factor
        if factor <= 0.0:
            raise ValueError(f"--scaling-factor is {factor}; expected a positive number")
        return latents_of_file(arguments.latents, factor), None, None
    if arguments.scaling_factor is not None:
        raise ValueError("the latents of `tessera encode` are not scaled: leave out --scaling-factor")
    manifest = Manifest.load(arguments.latents)
    description = read_description(manifest)
    tensor = "mirrored" if arguments.mirrored else "latent"
    return latents_of_dataset(manifest, tensor), manifest.num_samples, description["model"]["digest"]
