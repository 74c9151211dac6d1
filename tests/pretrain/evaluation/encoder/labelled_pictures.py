"""Pictures whose class a probe can tell: written as class folders, ready to be packed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_pictures(folder: Path, num_per_class: int, seed: int) -> Path:
    """Three classes of 16 x 16 grey pictures: noise with a bright third."""
    generator = np.random.default_rng(seed)
    for label in range(3):
        (folder / f"class{label}").mkdir(parents=True)
        for index in range(num_per_class):
            pixels = generator.integers(0, 120, (16, 16), dtype=np.uint8)
            pixels[5 * label : 5 * label + 5] += 100
            Image.fromarray(pixels).save(folder / f"class{label}" / f"{index:03d}.png")
    return folder
