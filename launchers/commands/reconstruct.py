"""`tessera reconstruct`: pictures beside what a tokenizer makes of them, with the PSNR of each."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launchers.commands.encode import add_model, load_model, loading_of, size_of

if TYPE_CHECKING:
    from pretrain.latents.decode import Reconstruction

HELP = "encode and decode pictures: each one beside its reconstruction, and its PSNR"
EXAMPLES = """\
  tessera reconstruct photo.jpg out --model runs/f32c32
  tessera reconstruct photos/ more.png out --model exports/f32c32 --size 256
  tessera reconstruct satellite.tif out --model runs/f32c32 --tile 2048

OUT gets a PNG per picture: the picture, its reconstruction, and their difference around grey, side by side. Pictures
keep their size unless --size is given; larger ones than --tile go through the model in tiles, which fade into each
other."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """PICTURES, OUT, the model, and the size."""
    parser.add_argument("pictures", type=Path, nargs="+", metavar="PICTURES", help="picture files, or folders of them")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the results")
    add_model(parser)
    parser.set_defaults(tile=1024)
    parser.add_argument(
        "--size", type=size_of, metavar="PX", help="centre crop of the resized picture: 256, or height x width"
    )


def run(arguments: argparse.Namespace) -> dict[str, object]:
    """Writes each picture beside its reconstruction.

    Raises:
        ValueError: a picture cannot be read, or a result exists.
    """
    from rich.console import Console

    from data_pipes.transforms.image import EvalTransform
    from launchers.progress import progress_bar
    from pretrain.latents.coder import PictureCoder
    from pretrain.latents.decode import find_pictures, reconstruct_file
    from pretrain.parallel.world import pick_device

    pictures = find_pictures(arguments.pictures)
    tokenizer = load_model(arguments)
    loading = loading_of(tokenizer)
    transform = None if arguments.size is None else EvalTransform(arguments.size, max(arguments.size))
    coder = PictureCoder(tokenizer, pick_device(arguments.device), precision=arguments.precision, tile=arguments.tile)
    console, results = Console(stderr=True), []
    with progress_bar(console, "pictures") as progress:
        for picture, name in progress.track(pictures, description="reconstruct"):
            results.append(
                reconstruct_file(
                    picture,
                    name,
                    coder,
                    arguments.out,
                    transform=transform,
                    bit_depth=loading.bit_depth,
                    max_pixels=loading.max_pixels,
                )
            )
    mean = sum(result.psnr for result in results) / len(results)
    _print_table(console, results, mean)
    return {
        "out": str(arguments.out),
        "model": tokenizer.label,
        "model_digest": tokenizer.digest,
        "psnr": mean,
        "protocol": "psnr_uint8",
        "tile": arguments.tile,
        "pictures": [
            {"picture": str(r.picture), "size": list(r.size), "psnr": r.psnr, "file": str(r.file)} for r in results
        ],
    }


def _print_table(console: Any, results: list[Reconstruction], mean: float) -> None:
    """The figures, for people."""
    from rich.table import Table

    table = Table("picture", "height x width", "PSNR dB", "side by side")
    for result in results:
        table.add_row(
            str(result.picture), f"{result.size[0]} x {result.size[1]}", f"{result.psnr:.2f}", str(result.file)
        )
    console.print(table)
    console.print(f"mean PSNR of {len(results):,} pictures: {mean:.2f} dB", highlight=False)
