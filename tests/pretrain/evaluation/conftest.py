"""Tiny real runs, trained once for all tests of this folder, and the labelled samples that they are evaluated on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipes.pack.pack import pack
from pretrain.config import load_config
from pretrain.train import train
from tests.pretrain.evaluation.encoder.labelled_pictures import write_pictures
from tests.pretrain.evaluation.encoder.labelled_videos import write_videos

ENCODER = "{image_size: [16, 16], patch_size: [4, 4], in_channels: 1, width: 16, depth: 2, heads: 2}"

VIDEO_RUN = """
name: tiny
device: cpu
data: {video: {num_frames: 4, stride: 2}}
objective:
  name: video_mae
  mask_ratio: 0.75
  mean: [0.4, 0.4, 0.4]
  std: [0.25, 0.25, 0.25]
  model:
    encoder: {num_frames: 4, image_size: [16, 16], patch_size: [8, 8], width: 16, depth: 2, heads: 2}
    decoder_width: 16
    decoder_depth: 1
    decoder_heads: 2
optim: {base_lr: null, lr: 1.0e-3, ema_decay: 0.5}
train: {global_batch: 8, steps: 3, log_every: 1}
tracking: {ship: false}
"""


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


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data sets train/ (24 videos) and val/ (16)."""
    folder = tmp_path_factory.mktemp("videos")
    write_videos(folder / "train", 12, seed=0)
    write_videos(folder / "val", 8, seed=1)
    return folder


@pytest.fixture(scope="session")
def video_run_dir(tmp_path_factory: pytest.TempPathFactory, videos: Path) -> Path:
    """The folder of a run on clips, as `run_dir`."""
    folder = tmp_path_factory.mktemp("video_runs")
    (folder / "run.yaml").write_text(VIDEO_RUN)
    overrides = [f"output_dir={folder}", f"data.train={videos / 'train'}"]
    config = load_config(folder / "run.yaml", overrides)
    train(config, config_path=folder / "run.yaml", overrides=overrides)
    return config.run_dir
