"""The contract between the training loop and what is trained.

An objective owns modules, grouped into named *players* (one per optimizer: a masked autoencoder has one, a tokenizer
has a generator and a discriminator), and says what a step computes. The loop knows nothing else:

    for turn in objective.turns(batch, step):
        strategy.backward(turn.loss, turn.player)
        if last_micro_batch:
            strategy.step(turn.player)

Enters: batches that already lie on the device, as stored (uint8 or uint16 images). Leaves: losses, metrics, pictures.

An objective of one's own is a subclass of `Objective` in a module that Python finds: `objective.name` is then its
import path, `my_package.my_module:MyObjective`, or the name of an entry point in the group `tessera.objectives`. It
sets `config_class`, and what it trains is evaluated and exported by what `build_backbone` gives; nothing else has to
know it. examples/own_objective.py has a whole one.

Legend: B batch, C channels, H/W pixels, N patches, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from data_pipes.batch import Batch


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

    config_class: ClassVar[type[Any]]
    """The frozen dataclass of the keys under `objective`, which the constructor gets as `config`. For classes that are
    named by an import path or an entry point; those of the table have it there. A field `init_from: str | None = None`
    lets runs start from weights."""
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
    def build_backbone(self) -> nn.Module:
        """A fresh, unsharded backbone, whose state dict has the names and shapes of `backbone_player`'s below
        `backbone_prefix`: those weights are loaded into it.

        It is one of three kinds, and what evaluates and exports it follows from that:

        - an encoder of this package, `ViT` or `VideoViT`: everything.
        - a tokenizer, a subclass of `Autoencoder`: the suites and exports of tokenizers.
        - any other module with a method `features(inputs, num_blocks)`, which gives for each of its last `num_blocks`
          stages, the last at the end, a pair (summary [B, D], tokens [B, N, D]) of normalised inputs [B, C, H, W], or
          [B, C, T, H, W] where `num_frames` is a number. It is asked for one stage, unless a suite's linear probe joins
          several. Such an encoder has all protocols on frozen features and tokens (k-NN, linear and attentive probes),
          the export to ONNX, and whatever protocols and export targets others write for it; fine-tuning and the
          layouts of other libraries are refused.
        """

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
