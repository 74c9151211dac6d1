"""A pretrained encoder with a classifier on top, and its parameter groups with layer-wise learning rates.

In: a ViT or VideoViT. Out: what fine-tuning trains. As in MAE and VideoMAE the patch tokens are averaged, then normed
(`fc_norm`); the encoder's own final norm is left out.

Legend: B batch, C channels, T frames, H/W pixels, N patch tokens, D width, K classes.
"""

from __future__ import annotations

import copy
from typing import TypedDict, cast

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from pretrain.models.encoder import LAYER_NORM_EPS, Block
from pretrain.models.video_vit import VideoViT
from pretrain.models.vit import ViT

HEAD_STD = 2e-5
"""Standard deviation of the head's first weights, as in MAE's fine-tuning."""


class Group(TypedDict):
    """One of the optimizer's parameter groups."""

    params: list[nn.Parameter]
    """its parameters"""
    weight_decay: float
    """0 for those that are not decayed"""
    lr_scale: float
    """its learning rate / the head's"""


class Classifier(nn.Module):
    """Encoder, mean over the patch tokens, LayerNorm, Linear."""

    def __init__(self, backbone: ViT | VideoViT, num_classes: int, drop_path: float) -> None:
        """The head is drawn from torch's global generator.

        Args:
            backbone: a pretrained encoder; it is copied.
            num_classes: K.
            drop_path: probability that the last block is left out; it grows linearly from 0 at the first.
        """
        super().__init__()
        self.backbone = copy.deepcopy(backbone)
        self.backbone.norm = cast(nn.LayerNorm, nn.Identity())
        rates = torch.linspace(0, drop_path, len(self.backbone.blocks)).tolist()
        for block, rate in zip(self.backbone.blocks, rates, strict=True):
            if rate > 0:
                assert isinstance(block, Block)
                block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)
        width = backbone.config.width
        self.fc_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.head = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=HEAD_STD)
        nn.init.zeros_(self.head.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalised images [B, C, H, W] or clips [B, C, T, H, W] to logits [B, K]."""
        tokens = self.backbone.embed(inputs, None)
        for block in self.backbone.blocks:
            tokens = block(tokens)
        if has_class_token(self.backbone):
            tokens = tokens[:, 1:]
        logits: Tensor = self.head(self.fc_norm(tokens.mean(dim=1)))
        return logits


def has_class_token(backbone: ViT | VideoViT) -> bool:
    """Whether the first token is a class token and not a patch's."""
    return backbone.config.has_class_token if isinstance(backbone, VideoViT) else True


def layer_decay_groups(model: Classifier, *, weight_decay: float, layer_decay: float) -> list[Group]:
    """Parameter groups in which the learning rate of a layer is `layer_decay` times that of the next one.

    Layer 0 is what makes tokens (patches, positions, class token), layers 1 to depth are the blocks, the last one is
    `fc_norm` and the head, with `lr_scale` 1. Source: BEiT (arXiv 2106.08254) as MAE's and VideoMAE's fine-tuning use
    it.

    Args:
        model: what is trained.
        weight_decay: of all but biases, one-dimensional parameters, positions and class tokens.
        layer_decay: in [0, 1].
    """
    last = len(model.backbone.blocks) + 1
    groups: dict[tuple[int, bool], Group] = {}
    for name, parameter in model.named_parameters():
        layer, token = _layer_of(name, last), name.startswith(("backbone.positions", "backbone.cls_token"))
        decayed = parameter.ndim > 1 and not name.endswith(".bias") and not token
        empty = Group(params=[], weight_decay=weight_decay if decayed else 0.0, lr_scale=layer_decay ** (last - layer))
        groups.setdefault((layer, decayed), empty)["params"].append(parameter)
    return list(groups.values())


def _layer_of(name: str, last: int) -> int:
    """The layer of a parameter by its name; `last` is that of the head."""
    if name.startswith("backbone.blocks."):
        return int(name.split(".")[2]) + 1
    return 0 if name.startswith("backbone.") else last
