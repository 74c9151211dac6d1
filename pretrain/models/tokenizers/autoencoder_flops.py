"""What a training step of an autoencoder costs, counted from its layers on the meta device.

Enters: how to build an autoencoder, and what of it is trained. Leaves: FLOPs of convolutions and matrix products. A
bottleneck's are not counted: a codebook look-up needs no gradient, and is small beside both halves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pretrain.models.attention import SelfAttention
from pretrain.models.encoder import PatchProjection
from pretrain.models.tokenizers.autoencoder import Autoencoder, pad_to_multiple
from pretrain.models.tokenizers.linear_attention import LiteMLA, attention_flops

COUNTED = (nn.Conv2d, nn.Linear, PatchProjection, LiteMLA, SelfAttention)
"""Layers whose products are counted; of the two attentions only what their inner layers do not count."""


@torch.no_grad()
def training_flops(build: Callable[[], Autoencoder], image_size: tuple[int, int], trained: Sequence[str]) -> float:
    """FLOPs of forward and backward for one image.

    The backward pass costs as much as the forward pass for the gradients of a step's input, from the first trained step
    on, and again for those of its weights, where they are trained.

    Args:
        build: makes the autoencoder on the current default device.
        image_size: height and width, in pixels.
        trained: what is trained; see `Autoencoder.train_only`.
    """
    with torch.device("meta"):
        model = build().eval()
        x = torch.empty(1, model.config.in_channels, *image_size)
    model.train_only(trained)
    x = pad_to_multiple(x, model.config.factor)
    total = 0.0
    for number, step in enumerate(model.steps()):
        passes = 1 + (number >= model.num_frozen_steps) + any(p.requires_grad for p in step.parameters())
        counted: list[float] = []
        for module in step.modules():
            if isinstance(module, COUNTED):
                module.register_forward_hook(lambda layer, _, out, counts=counted: counts.append(_flops(layer, out)))
        x = step(x)
        total += passes * sum(counted)
        if number + 1 == len(model.encoder.steps()):
            x = x[:, : model.config.latent_channels]
    return total


def _flops(layer: nn.Module, out: Tensor) -> float:
    """FLOPs of one layer's own products, without those of the layers in it; `out` is its output for one sample."""
    if isinstance(layer, LiteMLA):
        return attention_flops(layer.proj.in_channels, out.shape[2] * out.shape[3])
    if isinstance(layer, SelfAttention):
        return 4.0 * out.shape[1] ** 2 * out.shape[2]  # [1, N, D]: queries with keys, weights with values
    assert isinstance(layer, (nn.Conv2d, nn.Linear, PatchProjection))
    places = out.numel() // layer.weight.shape[0]
    return 2.0 * layer.weight.numel() * places
