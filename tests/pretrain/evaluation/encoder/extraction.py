"""Run by test_features on two ranks: extracts features of a generated dataset and saves what the main process has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pretrain.evaluation.encoder.features import extract, make_accelerator
from pretrain.models.config import ViTConfig
from pretrain.models.vit import ViT

CONFIG = ViTConfig(image_size=(8, 8), patch_size=(4, 4), width=16, depth=3, heads=2)


class Pictures(Dataset[tuple[Tensor, int]]):
    """`num_samples` different pictures; sample i has label i % 5."""

    def __init__(self, num_samples: int):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(0, 256, (num_samples, 3, 8, 8), dtype=torch.uint8, generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], index % 5


def seeded_model() -> ViT:
    torch.manual_seed(7)
    return ViT(CONFIG)


def to_float(images: Tensor) -> Tensor:
    return images.float() / 255 - 0.5


def save_features(num_samples: int, batch_size: int, accelerator: Any, output: Path) -> None:
    features = extract(
        seeded_model(), Pictures(num_samples), accelerator, normalise=to_float, num_blocks=2, batch_size=batch_size
    )
    assert (features is not None) == accelerator.is_main_process
    if features is not None:
        saved = {
            "class_tokens": features.class_tokens,
            "average": features.average,
            "labels": features.labels,
            "processes": torch.tensor(accelerator.num_processes),
        }
        torch.save(saved, output)


def main(folder: str, batch_size: int, sizes: list[int]) -> None:
    torch.set_num_threads(1)
    accelerator = make_accelerator(cpu=False)  # the default of the command
    for num_samples in sizes:
        save_features(num_samples, batch_size, accelerator, Path(folder) / f"{num_samples}.pt")
    accelerator.end_training()
