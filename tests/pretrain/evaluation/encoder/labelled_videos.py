"""Videos whose class only several frames tell: they become brighter or darker, and are alike in frame 4."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import webdataset

from data_pipes.index.index import index_shards
from tests.data_pipes.tiny_videos import encode

NUM_FRAMES = 7
"""A clip of 4 frames with stride 2 is all of the video, and frame 4 is its middle one."""


def write_videos(folder: Path, num_per_class: int, seed: int) -> Path:
    """A packed data set of two classes, "brighter" and "darker", of 24 x 32 pixels."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    change = 12 * (np.arange(NUM_FRAMES) - 4)[:, None, None, None]
    with webdataset.TarWriter(str(folder / "shard-000000.tar")) as writer:
        for number in range(2 * num_per_class):
            label = number % 2
            texture = generator.integers(0, 40, (6, 8, 3)).repeat(4, 0).repeat(4, 1) + generator.integers(50, 150)
            frames = (texture + (1 - 2 * label) * change).clip(0, 255).astype(np.uint8)
            mp4 = encode(frames, gop=4, b_frames=0)
            writer.write({"__key__": f"{number:03d}", "mp4": mp4, "cls": str(label).encode()})
    index_shards(sorted(folder.glob("*.tar")), folder, ("brighter", "darker"))
    return folder
