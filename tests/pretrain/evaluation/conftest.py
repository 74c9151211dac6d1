"""A tiny real run, trained once for all tests of this folder, and the labelled pictures that it is evaluated on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipes.pack import pack
from pretrain.config import load_config
from pretrain.train import train
from tests.pretrain.evaluation.labelled_pictures import write_pictures

ENCODER = "{image_size: [16, 16], patch_size: [4, 4], in_channels: 1, width: 16, depth: 2, heads: 2}"


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the packed datasets train/ (60 pictures) and val/ (31)."""
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder / "a", 20, seed=0)
    write_pictures(folder / "b", 10, seed=1)
    Image.fromarray(np.full((16, 16), 9, dtype=np.uint8)).save(folder / "b/class0/odd.png")
    pack(folder / "a", folder / "packed", val=folder / "b")
    return folder / "packed"


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory, pictures: Path, root: Path) -> Path:
    """The folder of a run of three steps with a moving average; tests add files only below eval/ and the journal."""
    config_path = root / "configs/demo/digits.yaml"
    overrides = [
        f"objective.model.encoder={ENCODER}",
        "objective.model.decoder_width=16",
        "name=tiny",
        f"output_dir={tmp_path_factory.mktemp('runs')}",
        f"data.train={pictures / 'train'}",
        f"data.val={pictures / 'val'}",
        "train.epochs=null",
        "train.steps=3",
        "train.global_batch=8",
        "train.val_samples=8",
        "train.num_pictures=1",
        "optim.warmup_epochs=0",
        "optim.ema_decay=0.5",
        "tracking.ship=false",
        "device=cpu",
    ]
    config = load_config(config_path, overrides)
    train(config, config_path=config_path, overrides=overrides)
    return config.run_dir
