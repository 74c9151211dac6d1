"""A tiny tokenizer (factor 4, 8 latent channels) as a real run leaves it, and pictures to encode."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image

from data_pipes.index.index import index_shards
from data_pipes.shards.manifest import Manifest
from pretrain.config import RunConfig, load_config
from pretrain.models.tokenizers.dc_ae import DCAE
from pretrain.models.tokenizers.dc_ae_config import dc_ae_config
from pretrain.train import train
from pretrain.weights.backbone import weights_digest
from pretrain.weights.tokenizer import LoadedTokenizer

RUN = """
name: tokenizer
device: cpu
data: {crop_scale: [0.5, 1.0]}
objective:
  name: tokenizer
  image_size: [16, 16]
  mean: [0.4, 0.5, 0.6]
  std: [0.5, 0.4, 0.3]
  model:
    latent_channels: 8
    widths: [16, 32, 64]
    encoder_depths: [0, 1, 1]
    decoder_depths: [0, 1, 1]
    blocks: [res, res, attention]
    decoder_norms: [rms, rms, rms]
optim: {base_lr: null, lr: 1.0e-3, clip_norm: 1.0, ema_decay: 0.5}
train: {global_batch: 4, steps: 2, log_every: 1, num_pictures: 1}
tracking: {ship: false}
"""


def train_tokenizer(data: Path, folder: Path, name: str, *more: str) -> RunConfig:
    """Two steps of a run called `name` below `folder`, on a packed data set."""
    path = folder / f"{name}.yaml"
    path.write_text(RUN)
    overrides = [f"data.train={data}", f"output_dir={folder}", f"name={name}", *more]
    config = load_config(path, overrides)
    train(config, config_path=path, overrides=overrides)
    return config


def random_tokenizer(channels: int = 3, norm: str = "rms") -> LoadedTokenizer:
    """One that nobody trained, with statistics that tell its channels apart."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DCAE(dc_ae_config("tiny", in_channels=channels, decoder_norms=(norm, norm, "rms"))).eval()
    mean, std = tuple(0.4 + 0.1 * c for c in range(channels)), tuple(0.5 - 0.1 * (c % 3) for c in range(channels))
    return LoadedTokenizer(model, mean, std, "random", "random", weights_digest(model.state_dict()))


def photo(seed: int, height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3]: waves of a few pixels' length, so that it can be resized without turning grey."""
    generator = np.random.default_rng(seed)
    rows, columns = np.indices((height, width))
    planes = [
        127 + 120 * np.sin(rows / a + phase) * np.cos(columns / b)
        for a, b, phase in zip(*generator.uniform(1, 6, (3, 3)), strict=True)
    ]
    return np.stack(planes, axis=-1).astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_photos(folder: Path, samples_per_shard: list[int], sizes: tuple[tuple[int, int], ...]) -> Manifest:
    """Shards of labelled photographs with captions; sizes are taken in turn. Key 000017 has label 17 mod 3."""
    folder.mkdir(parents=True, exist_ok=True)
    number, paths = 0, []
    for shard, count in enumerate(samples_per_shard):
        paths.append(folder / f"shard-{shard:06d}.tar")
        with webdataset.TarWriter(str(paths[-1]), mtime=0) as writer:
            for _ in range(count):
                members = {
                    "png": png(photo(number, *sizes[number % len(sizes)])),
                    "cls": b"%d" % (number % 3),
                    "txt": f"photograph {number}".encode(),
                    "json": b'{"number": %d}' % number,
                }
                writer.write({"__key__": f"{number:06d}", **members})
                number += 1
    return index_shards(paths, folder, ("a", "b", "c"))
