"""What a researcher would write outside of the package; tests copy this file into a folder of theirs.

An objective whose encoder has nothing of this package's, a protocol for each kind of suite, an export target, and what
is wrong with others of each.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipes.batch import Batch
from pretrain.evaluation.encoder.protocols import Protocol
from pretrain.evaluation.encoder.subject import Subject
from pretrain.evaluation.outcome import Outcome
from pretrain.evaluation.tokenizer.protocols import TokenizerProtocol
from pretrain.evaluation.tokenizer.reconstruction_metrics import ReconstructionMeter
from pretrain.models.normalise import Normalise
from pretrain.objectives.base import Objective, Turn
from pretrain.objectives.image_mae import ImageMAEObjective
from pretrain.objectives.mae_config import ImageMAEConfig
from pretrain.weights.backbone import Backbone

SIDE = 8


class Rows(nn.Module):
    """An encoder whose tokens are the rows of a picture."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rows = nn.Linear(SIDE, width)

    def features(self, inputs: Tensor, num_blocks: int = 1) -> list[tuple[Tensor, Tensor]]:
        tokens = self.rows(inputs[:, 0]).tanh()
        return [(tokens.mean(dim=1), tokens)]


class RowModel(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder, self.head = Rows(width), nn.Linear(width, SIDE)

    def forward(self, images: Tensor) -> Tensor:
        predicted: Tensor = self.head(self.encoder.features(images)[0][1])
        return predicted


@dataclass(frozen=True)
class RowConfig:
    width: int = 8
    """Features of a row."""


class RowObjective(Objective):
    """Each row predicts the row below it."""

    config_class = RowConfig
    backbone_player, backbone_prefix = "rows", "encoder."
    in_channels, mean, std = 1, (0.5,), (0.5,)

    def __init__(self, config: RowConfig, seed: int) -> None:
        self.config = config
        self.players = {"rows": RowModel(config.width)}
        self.normalise = Normalise(self.mean, self.std)

    @property
    def image_size(self) -> tuple[int, int]:
        return SIDE, SIDE

    def _loss(self, batch: Batch) -> Tensor:
        images = self.normalise(batch.images)
        return (self.players["rows"](images)[:, :-1] - images[:, 0, 1:]).square().mean()

    def turns(self, batch: Batch, step: int) -> Iterator[Turn]:
        die_after(step)
        loss = self._loss(batch)
        yield Turn(loss, "rows", {"loss": loss.detach()})

    @torch.no_grad()
    def validate(self, batch: Batch, step: int) -> dict[str, Tensor]:
        return {"loss": self._loss(batch)}

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        return {"input": batch.images.cpu()}

    def blocks(self, player: str) -> list[nn.Module]:
        return []

    def init_weights(self, player: str) -> None:
        model = self.players[player]
        for layer in (model.encoder.rows, model.head):
            layer.reset_parameters()

    def flops_per_sample(self) -> float:
        return 12.0 * SIDE * SIDE * self.config.width

    def build_backbone(self) -> nn.Module:
        return Rows(self.config.width)


def die_after(step: int) -> None:
    """SIGKILL once the checkpoint that OWN_PARTS_DIE names is complete, in step 6 at the latest."""
    checkpoint = os.environ.get("OWN_PARTS_DIE")
    if checkpoint is None or step < 6:
        return
    while not (Path(checkpoint) / "COMPLETE").is_file():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class SpreadConfig:
    scale: float = 1.0
    """Multiplies the figure."""


def spread(subject: Subject, config: SpreadConfig) -> Outcome | None:
    """The standard deviation of the test set's summaries."""
    features = subject.features()
    if features is None:
        return None
    train, test = features
    figure = config.scale * float(test.class_tokens[:, -1].std())
    return Outcome({"spread": figure}, {"by": "nothing was chosen"}, num_train=len(train), num_test=len(test))


PROTOCOL = Protocol(SpreadConfig, spread, on_features=True)


class BrightnessMeter(ReconstructionMeter):
    """How much brighter reconstructions are than their pictures, on average."""

    def __init__(self, scale: float) -> None:
        self.scale, self.sum, self.count = scale, 0.0, 0

    def update(self, pictures: Tensor, reconstructions: Tensor, latents: Tensor) -> None:
        self.sum += float((reconstructions.double() - pictures.double()).mean(dim=(1, 2, 3)).sum())
        self.count += len(pictures)

    def finish(self, gather: Callable[[Any], list[Any]]) -> dict[str, float]:
        sums, counts = zip(*gather((self.sum, self.count)), strict=True)
        return {"brighter_by": self.scale * sum(sums) / sum(counts)}


METER = TokenizerProtocol(SpreadConfig, lambda settings, measured: BrightnessMeter(settings.scale))


def export(model: Backbone, folder: Path, half: bool = False) -> Mapping[str, object]:
    """One JSON file with the weights' sums."""
    if model.step == 0:
        raise ValueError("weights without training are not worth a file")
    sums = {name: float(tensor.sum()) for name, tensor in model.model.state_dict().items()}
    (folder / "sums.json").write_text(json.dumps({"half": half, "sums": sums}))
    return {"errors": {"sums": 0.0}, "half": half}


def write_nothing(model: Backbone, folder: Path) -> None:
    """A target that forgets its files."""


class Wrapped(nn.Module):
    """This package's model within one of one's own."""

    def __init__(self, mae: nn.Module) -> None:
        super().__init__()
        self.mae = mae

    def forward(self, images: Tensor, noise: Tensor) -> Any:
        return self.mae(images, noise)


class WrappedMAE(ImageMAEObjective):
    config_class = ImageMAEConfig
    backbone_prefix = "mae.encoder."

    def __init__(self, config: ImageMAEConfig, seed: int) -> None:
        super().__init__(config, seed)
        self.players = {"model": Wrapped(self.model)}


NUMBER = 3


class NoObjective:
    config_class = RowConfig


class Unfinished(Objective):
    config_class = RowConfig


class WithoutConfig(RowObjective):
    config_class = None  # type: ignore[assignment]


@dataclass(frozen=True)
class NamedConfig:
    name: str = "x"


class Named(RowObjective):
    config_class = NamedConfig


class OtherPrefix(RowObjective):
    backbone_prefix = "encodre."


class OtherPlayer(RowObjective):
    backbone_player = "columns"


class NoFeatures(RowObjective):
    backbone_prefix = "head."

    def build_backbone(self) -> nn.Module:
        return nn.Linear(self.config.width, SIDE)


class FlatRows(Rows):
    def features(self, inputs: Tensor, num_blocks: int = 1) -> Any:
        return super().features(inputs, num_blocks)[0][0]


class FlatFeatures(RowObjective):
    def build_backbone(self) -> nn.Module:
        return FlatRows(self.config.width)
