"""What masked autoencoding of images (`image_mae`) and of clips (`clip_mae`) share: one player, and its data's shape.

Enters: an autoencoder and the statistics of its data. Leaves: the parts of `Objective` that do not depend on whether a
sample is an image or a clip.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from pretrain.models.normalise import Normalise
from pretrain.objectives.base import Objective

if TYPE_CHECKING:
    from pretrain.models.mae import MAE
    from pretrain.models.video_mae import VideoMAE

VALIDATION_SEED = 0x7E55E2A
"""Of the masks in `validate` and `pictures`: the same for all runs, so that their validation losses compare."""


class MaskedAutoencoderObjective(Objective):
    """One player, "model", whose encoder is the backbone."""

    backbone_player = "model"
    backbone_prefix = "encoder."

    def __init__(self, model: MAE | VideoMAE, normalise: Normalise, seed: int) -> None:
        """Takes what both kinds have.

        Args:
            model: the player.
            normalise: with the data's statistics.
            seed: of the training masks, together with each sample's position.
        """
        self.model = model
        self.players: dict[str, nn.Module] = {"model": model}
        self.normalise = normalise
        self.seed = seed

    def blocks(self, player: str) -> list[nn.Module]:
        self._check(player)
        return [*self.model.encoder.blocks, *self.model.decoder.blocks]

    def init_weights(self, player: str) -> None:
        self._check(player)
        self.model.init_weights()

    @property
    def image_size(self) -> tuple[int, int]:
        return self.model.config.encoder.image_size

    @property
    def in_channels(self) -> int:
        return self.model.config.encoder.in_channels

    @property
    def mean(self) -> tuple[float, ...]:
        return self.normalise.mean

    @property
    def std(self) -> tuple[float, ...]:
        return self.normalise.std

    def _check(self, player: str) -> None:
        if player != "model":
            raise ValueError(f"There is no player {player!r}; a masked autoencoder has one, 'model'.")
