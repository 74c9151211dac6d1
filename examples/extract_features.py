"""Loads a backbone and extracts features: `python examples/extract_features.py [FOLDER]`, half a minute on a CPU.

Trains a small masked autoencoder on scikit-learn's digits for a moment, so that there is a backbone; with a run of your
own, only the last lines are of interest.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

import tessera
from data_pipes.pack.pack import pack
from data_pipes.pack.plan import PackOptions


def train_for_a_moment(folder: Path) -> Path:
    """The folder of a run of one epoch on 1,437 digits of 8 x 8 pixels."""
    pack("builtin:digits", folder / "digits", options=PackOptions(val_fraction=0.2))
    encoder = {"image_size": [16, 16], "patch_size": [4, 4], "in_channels": 1, "width": 32, "depth": 2, "heads": 2}
    config = {
        "name": "features",
        "output_dir": str(folder),
        "device": "cpu",
        "data": {"train": str(folder / "digits/train"), "val": str(folder / "digits/val"), "flip": 0.0},
        "objective": {"name": "image_mae", "model": {"encoder": encoder, "decoder_width": 32, "decoder_heads": 2}},
        "optim": {"base_lr": None, "lr": 1e-3, "warmup_epochs": 0},
        "train": {"global_batch": 64, "epochs": 1},
        "tracking": {"ship": False},
    }
    return tessera.train(tessera.load_config(config)).run_dir


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp())
    run = train_for_a_moment(folder)

    backbone = tessera.load_backbone(run)
    pictures = np.random.default_rng(0).integers(0, 256, (5, 40, 30), dtype=np.uint8)  # five grey pictures, any size
    features = backbone.features(list(pictures))
    print(f"summaries {tuple(features.summary.shape)}, tokens {tuple(features.tokens.shape)}, from {run}")


if __name__ == "__main__":
    main()
