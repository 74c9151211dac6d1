"""An objective of one's own, outside of the package: `python examples/own_objective.py [FOLDER]`, half a minute.

Which way was a picture turned (Gidaris et al., arXiv 1803.07728)? Each one is shown in all four rotations, and a small
convolutional network says which is which. Once Python finds this file, `objective.name: own_objective:Rotations` is all
that a configuration needs: it trains, resumes, is evaluated and exported like the built-in ones.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tessera
from data_pipes.batch import Batch
from data_pipes.pack.pack import pack
from data_pipes.pack.plan import PackOptions
from pretrain.models.normalise import Normalise
from pretrain.objectives.base import Objective, Turn


class ConvEncoder(nn.Module):
    """The backbone: what evaluation and export ask for is `features`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(1, width, 3, 2, 1), nn.Conv2d(width, width, 3, 1, 1)

    def features(self, inputs: Tensor, num_blocks: int = 1) -> list[tuple[Tensor, Tensor]]:
        tokens = F.gelu(self.body(F.gelu(self.stem(inputs)))).flatten(2).transpose(1, 2)  # [B, N, D]
        return [(tokens.mean(dim=1), tokens)]


class RotationModel(nn.Module):
    """The player: the backbone, and a head that training alone needs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder, self.head = ConvEncoder(width), nn.Linear(width, 4)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder.features(images)[0][0])
        return logits


@dataclass(frozen=True)
class RotationConfig:
    width: int = 32
    """Channels of the network."""
    side: int = 16
    """Height and width of the pictures, in pixels."""


class Rotations(Objective):
    config_class = RotationConfig
    backbone_player, backbone_prefix = "model", "encoder."
    in_channels, mean, std = 1, (0.3,), (0.37,)

    def __init__(self, config: RotationConfig, seed: int) -> None:
        self.config = config
        self.players = {"model": RotationModel(config.width)}
        self.normalise = Normalise(self.mean, self.std)

    @property
    def image_size(self) -> tuple[int, int]:
        return self.config.side, self.config.side

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        images = self.normalise(batch.images)
        logits = self.players["model"](torch.cat([images.rot90(turns, (2, 3)) for turns in range(4)]))
        answers = torch.arange(4, device=logits.device).repeat_interleave(len(images))
        return F.cross_entropy(logits, answers), (logits.argmax(dim=1) == answers).float().mean()

    def turns(self, batch: Batch, step: int) -> Iterator[Turn]:
        loss, accuracy = self._loss(batch)
        yield Turn(loss, "model", {"loss": loss.detach(), "accuracy": accuracy})

    @torch.no_grad()
    def validate(self, batch: Batch, step: int) -> dict[str, Tensor]:
        return dict(zip(("loss", "accuracy"), self._loss(batch), strict=True))

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        return {f"turned_{turns}": batch.images.rot90(turns, (2, 3)).cpu() for turns in range(4)}

    def blocks(self, player: str) -> list[nn.Module]:
        return []  # too small to be compiled or sharded in parts

    def init_weights(self, player: str) -> None:
        for module in self.players[player].modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.reset_parameters()

    def flops_per_sample(self) -> float:
        return 3 * 4 * 2 * (self.config.side // 2) ** 2 * 9 * self.config.width * (1 + self.config.width)

    def build_backbone(self) -> ConvEncoder:
        return ConvEncoder(self.config.width)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp())
    pack("builtin:digits", folder / "digits", options=PackOptions(val_fraction=0.2))
    config: dict[str, Any] = {
        "name": "rotations",
        "output_dir": str(folder),
        "device": "cpu",
        "data": {"train": str(folder / "digits/train"), "val": str(folder / "digits/val"), "flip": 0.0},
        "objective": {"name": "own_objective:Rotations", "width": 32},
        "optim": {"base_lr": None, "lr": 3e-3, "warmup_epochs": 0},
        "train": {"global_batch": 64, "epochs": 3},
        "tracking": {"ship": False},
    }
    result = tessera.train(tessera.load_config(config))
    suite = {"tasks": {"knn": {"protocol": "knn_dino", "settings": {"k": [10], "primary_k": 10}}}}
    (record,) = tessera.evaluate(result.run_dir, suite, device="cpu")
    print(f"k-NN {record['metrics']['top1']:.1f} % of {record['num_test']} digits, on features learned without labels")
    print(f"rotations told apart: {result.metrics['val/accuracy']:.1%}; the run is in {result.run_dir}")


if __name__ == "__main__":
    main()
