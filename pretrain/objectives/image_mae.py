"""Masked autoencoding of images (He et al., arXiv 2111.06377): what one step computes.

Enters: batches of stored images with their global sample positions. Leaves: the loss on hidden patches, and pictures.
Legend: B batch, N patches, C channels, H/W pixels, p/q patch height/width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pretrain.losses.pixels import patch_statistics, patchify, unpatchify
from pretrain.models.mae import MAE, MAEOutput, mae_flops
from pretrain.models.masking import position_noise
from pretrain.models.normalise import Normalise
from pretrain.models.vit import ViT
from pretrain.objectives.base import Turn
from pretrain.objectives.mae_config import ImageMAEConfig
from pretrain.objectives.masked_autoencoder import VALIDATION_SEED, MaskedAutoencoderObjective

if TYPE_CHECKING:
    from data_pipes.batch import Batch


class ImageMAEObjective(MaskedAutoencoderObjective):
    """One player, "model": a `MAE`, called as `players["model"](images, noise) -> MAEOutput`."""

    def __init__(self, config: ImageMAEConfig, seed: int) -> None:
        """Builds the autoencoder on the current default device.

        Args:
            config: the autoencoder, and the statistics of its images.
            seed: of the training masks, together with each sample's position.
        """
        super().__init__(MAE(config.model), Normalise(config.mean, config.std), seed)
        self.config = config

    def turns(self, batch: Batch, step: int) -> Iterator[Turn]:
        output = self._forward(self.normalise(batch.images), batch.positions, self.seed)
        yield Turn(output.loss, "model", {"loss": output.loss.detach()})

    @torch.no_grad()
    def validate(self, batch: Batch, step: int) -> dict[str, Tensor]:
        return {"loss": self._forward(self.normalise(batch.images), batch.positions, VALIDATION_SEED).loss}

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """The batch as the model sees it, and what it makes of it; the first 3 channels, or the first of fewer.

        "input" is the image, "masked" has the hidden patches in grey. "prediction" has the model's output in the hidden
        patches, shown through the data set's mean and std, and the image elsewhere. With `norm_pixels` the model
        predicts each patch's contrast and not its brightness, so this honest view is grey on average where patches were
        hidden. "oracle_denormalised" (only with `norm_pixels`) is the same with each hidden patch's true mean and
        variance put back, which the model was not given and did not predict.

        Args:
            batch: of stored images.

        Returns:
            Views by name, uint8 [B, 1 or 3, H, W] on the CPU.
        """
        images = self.normalise(batch.images)
        output = self._forward(images, batch.positions, VALIDATION_SEED)
        patches = patchify(images, self.config.model.encoder.patch_size)
        hidden, prediction = output.mask[..., None], output.prediction.to(patches.dtype)
        masked = self.normalise.to_picture(images)
        masked[self._pixels(hidden.expand_as(patches))[:, : masked.shape[1]].cpu()] = 128
        views = {
            "input": self.normalise.to_picture(images),
            "masked": masked,
            "prediction": self.normalise.to_picture(self._pixels(torch.where(hidden, prediction, patches))),
        }
        if self.config.model.norm_pixels:
            mean, std = patch_statistics(patches)
            oracle = torch.where(hidden, prediction * std + mean, patches)
            views["oracle_denormalised"] = self.normalise.to_picture(self._pixels(oracle))
        return views

    def flops_per_sample(self) -> float:
        return mae_flops(self.config.model)

    def build_backbone(self) -> ViT:
        with torch.device("cpu"):
            return ViT(self.config.model.encoder)

    def _forward(self, images: Tensor, positions: Tensor, seed: int) -> MAEOutput:
        noise = position_noise(positions, self.config.model.encoder.num_patches, seed)
        output: MAEOutput = self.players["model"](images, noise)
        return output

    def _pixels(self, patches: Tensor) -> Tensor:
        """Puts patches [B, N, p*q*C] together to images [B, C, H, W]."""
        encoder = self.config.model.encoder
        return unpatchify(patches, encoder.grid_size, encoder.patch_size)
