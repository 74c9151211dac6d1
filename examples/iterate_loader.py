"""Iterates the loader by itself: `python examples/iterate_loader.py [FOLDER]`, seconds on a CPU.

The order is a function of the seed: the same for every number of workers and ranks, and one integer resumes it.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

import tessera
from data_pipes.pack.pack import pack


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp())
    pack("builtin:digits", folder / "digits")  # 1,797 grey pictures of 8 x 8 pixels, in ten classes
    shards, size = folder / "digits" / "train", (16, 16)

    with tessera.open_loader(shards, batch_size=128, image_size=size, channels=1, workers=2, flip=0.0) as batches:
        seen = 0
        for batch in batches:
            seen += len(batch.keys)
            if seen == 512:
                break
        position, rest = batches.position, [batch.positions for batch in batches]
    print(f"a batch is {batch.images.dtype} {tuple(batch.images.shape)}; {seen} samples were seen")

    with tessera.open_loader(
        shards, batch_size=128, image_size=size, channels=1, flip=0.0, position=position, epochs=None
    ) as again:
        for expected, batch in zip(rest, again, strict=False):
            assert torch.equal(batch.positions, expected)
    print(f"resumed at sample {position}: {len(rest)} batches came again in the same order")


if __name__ == "__main__":
    main()
