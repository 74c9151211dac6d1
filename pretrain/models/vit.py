"""Vision transformer encoder for images that can skip hidden patches.

Enters: normalised images and, for masked training, the ids of the patches to look at. Leaves: tokens.
Legend: B batch, N patches (row-major over the grid), K kept patches, D width, V values of a patch, C channels, H/W
pixels, p/q pixels of a patch's height/width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretrain.losses.pixels import split_patches
from pretrain.models.config import ViTConfig
from pretrain.models.encoder import TOKEN_STD, Encoder, init_layer
from pretrain.models.positions import sincos_position_embedding


class ViT(Encoder):
    """Encoder of He et al. (arXiv 2111.06377): class token, fixed sin-cos positions, pre-norm blocks, final norm."""

    pos_embed: Tensor
    """float32 [1, 1 + N, D], the class token's first."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config, config.image_size, config.patch_size, has_class_token=True)
        self.config = config
        # A buffer and not a frozen parameter: in the state dict as in the original, outside optimizers and shards.
        self.register_buffer("pos_embed", torch.zeros(1, 1 + config.num_patches, config.width))
        self.init_weights()

    def split(self, inputs: Tensor) -> Tensor:
        return split_patches(inputs, self.config.patch_size).flatten(1, 2).flatten(2)

    def position_embedding(self, keep_ids: Tensor | None) -> Tensor:
        positions = self.pos_embed[:, 1:]
        return positions if keep_ids is None else positions[0][keep_ids]

    def class_position(self) -> Tensor:
        return self.pos_embed[:, :1]

    @torch.no_grad()
    def init_weights(self) -> None:
        """Starting values as in He et al.: xavier-uniform, tokens N(0, 0.02), fixed positions. See `init_layer`."""
        self.apply(init_layer)
        nn.init.normal_(self.cls_token, std=TOKEN_STD)
        self.pos_embed.copy_(sincos_position_embedding(self.config.grid_size, self.config.width))
