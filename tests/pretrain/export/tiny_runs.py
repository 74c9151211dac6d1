"""Tiny real runs on clips and on images, whose checkpoints are exported and imported."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from data_pipes.index.index import index_shards
from pretrain.config import load_config
from pretrain.train import train
from tests.data_pipes.tiny_videos import video

COMMON = """
name: run
device: cpu
optim: {base_lr: null, lr: 1.0e-2, ema_decay: 0.5}
train: {global_batch: 4, steps: 2, num_pictures: 1}
tracking: {ship: false}
"""
CLIPS = """
data: {video: {num_frames: 4, stride: 2}}
objective:
  name: video_mae
  mask_ratio: 0.5
  model:
    encoder: {num_frames: 4, image_size: [16, 16], patch_size: [8, 8], width: 24, depth: 2, heads: 2}
    decoder_width: 16
    decoder_depth: 1
    decoder_heads: 2
"""
IMAGES = """
objective:
  name: image_mae
  model:
    encoder: {image_size: [16, 16], patch_size: [8, 8], width: 24, depth: 2, heads: 2}
    decoder_width: 8
    decoder_depth: 1
    decoder_heads: 2
"""


def train_on_clips(folder: Path, *overrides: str) -> Path:
    """The folder of a run of two steps with a moving average."""
    return _train(folder, CLIPS, {"mp4": [video(8 + number) for number in range(8)]}, overrides)


def train_on_images(folder: Path, *overrides: str) -> Path:
    """The folder of a run of two steps with a moving average."""
    generator = np.random.default_rng(0)
    pictures = [generator.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in range(8)]
    return _train(folder, IMAGES, {"png": [png(picture) for picture in pictures]}, overrides)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _train(folder: Path, text: str, members: dict[str, list[bytes]], overrides: tuple[str, ...]) -> Path:
    (extension, contents), shard, path = *members.items(), folder / "shard-000000.tar", folder / "run.yaml"
    with webdataset.TarWriter(str(shard)) as writer:
        for number, content in enumerate(contents):
            writer.write({"__key__": f"{number:03d}", extension: content, "cls": b"0"})
    index_shards([shard], folder)
    path.write_text(COMMON + text)
    config = load_config(path, [f"data.train={folder}", f"output_dir={folder / 'runs'}", *overrides])
    train(config, config_path=path, overrides=list(overrides))
    return config.run_dir
