"""The contract between the training loop and what is trained.

An objective owns modules, grouped into named *players* (one per optimizer: a masked autoencoder has one, a tokenizer
has a generator and a discriminator), and says what a step computes. The loop knows nothing else:

    for turn in objective.turns(batch, step):
        strategy.backward(turn.loss, turn.player)
        if last_micro_batch:
            strategy.step(turn.player)

Enters: batches that already lie on the device, as stored (uint8 or uint16 images). Leaves: losses, metrics, pictures.
Legend: B batch, C channels, H/W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from data_pipes.batch import Batch
    from pretrain.models.tokenizers.autoencoder import Autoencoder
    from pretrain.models.video_vit import VideoViT
    from pretrain.models.vit import ViT


@dataclass(frozen=True)
class Turn:
    """One loss to be differentiated, and the player whose parameters it moves."""

    loss: Tensor
    """0-d, float32, with a graph: the mean over the micro-batch's samples."""
    player: str
    """Key of `Objective.players`."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """0-d detached tensors on the device, per-sample means over the micro-batch; named like "loss"."""


class Objective(ABC):
    """What a run trains. A subclass is constructed as `Subclass(config, seed)`, possibly under `torch.device("meta")`.

    A strategy replaces the values of `players` by prepared (sharded, wrapped) modules; therefore every computation
    calls `self.players[name](...)`, through `forward` alone. All randomness comes from (seed, global sample position),
    never from a global generator, so that ranks, the batch's composition and a resume do not change it.
    """

    players: dict[str, nn.Module]
    """Modules by name; one optimizer each."""
    backbone_player: str
    """The player that holds what is evaluated and exported."""
    backbone_prefix: str
    """Where the backbone's parameters lie in that player's state dict, e.g. "encoder."."""

    @abstractmethod
    def turns(self, batch: Batch, step: int) -> Iterator[Turn]:
        """Yields the losses of one micro-batch in the order in which the players move.

        Args:
            batch: this rank's micro-batch on the device.
            step: optimizer steps done so far, >= 0.
        """

    @abstractmethod
    def blocks(self, player: str) -> list[nn.Module]:
        """The units of a player that are compiled, checkpointed and sharded one by one, in forward order."""

    @abstractmethod
    def init_weights(self, player: str) -> None:
        """Fills a player's materialised parameters and buffers (e.g. after `to_empty`) with their starting values.

        Draws from torch's default generator of the parameters' device: seed it first. The values do not depend on
        what the tensors held before.
        """

    def start(self, seed: int) -> None:
        """Fills all players with their starting values from one generator seeded with `seed`, one after the other.

        A run's start: it is the same for every strategy, and for whoever wants the untrained model later.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for player in self.players:
                self.init_weights(player)

    @abstractmethod
    def validate(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Per-sample means over the batch (0-d, no graph). A pure function of the weights and the batch."""

    @abstractmethod
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Views of the batch by name, uint8 [B, 1 or 3, H, W] on the CPU. Runs forward: call it on every rank."""

    def alarms(self, metrics: Mapping[str, float], step: int) -> list[str]:
        """Sentences about what is going wrong, for people and the journal.

        Args:
            metrics: means of the logging interval, e.g. "train/loss".
            step: the optimizer step at which the interval ended.
        """
        return []

    def films(self, batch: Batch) -> dict[str, Tensor]:
        """Views of the batch's clips by name, uint8 [B, T, 1 or 3, H, W] on the CPU; empty where samples are images.

        Runs forward: call it on every rank.
        """
        return {}

    @abstractmethod
    def flops_per_sample(self) -> float:
        """Model FLOPs of forward and backward for one sample (matrix products only, nothing recomputed)."""

    @abstractmethod
    def build_backbone(self) -> ViT | VideoViT | Autoencoder:
        """A fresh, unsharded backbone on the CPU, to load `backbone_prefix` weights into."""

    @property
    @abstractmethod
    def image_size(self) -> tuple[int, int]:
        """Height and width, in pixels, of the images that `turns` expects."""

    @property
    def num_frames(self) -> int | None:
        """Frames of the clips that `turns` expects, [B, R, C, T, H, W]; None: it expects images, [B, C, H, W]."""
        return None

    @property
    def repeats(self) -> int:
        """R, clips of each video that `turns` expects; batches, learning rates and epochs count videos."""
        return 1

    @property
    @abstractmethod
    def in_channels(self) -> int:
        """Channels of the images that `turns` expects."""

    @property
    @abstractmethod
    def mean(self) -> tuple[float, ...]:
        """Per channel, on the scale where the stored range is [0, 1]; subtracted before `std` divides."""

    @property
    @abstractmethod
    def std(self) -> tuple[float, ...]:
        """Per channel, on the same scale as `mean`."""
