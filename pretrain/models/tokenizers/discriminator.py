"""PatchGAN discriminator (arXiv 1611.07004): a logit for each overlapping patch of a picture.

Enters: images and reconstructions on the same scale. Leaves: logits, high for what looks like an image.
Legend: B batch, C channels, H/W pixels, h/w patches.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.losses.adversarial import LeCam
from pretrain.models.norms import NORM_EPS
from pretrain.models.precision import without_autocast
from pretrain.models.tokenizers.config import DiscriminatorConfig

SLOPE = 0.2
"""Of the leaky ReLUs where the input is negative."""
WEIGHT_STD = 0.02
"""Standard deviation of the weights' starting values, as in pix2pix."""
MAX_WIDENING = 8
"""Most channels of a layer / those of the first."""


class Logits(NamedTuple):
    """What a discriminator gives: high where a patch looks like an image's."""

    fake: Tensor
    """[B, 1, h, w], of the reconstructions."""
    real: Tensor | None
    """[B, 1, h, w], of the images; None where there were none."""


class Discriminator(nn.Module):
    """Judges reconstructions alone in the autoencoder's turn, and beside images in its own."""

    def __init__(self, config: DiscriminatorConfig, in_channels: int, lecam_decay: float) -> None:
        super().__init__()
        widths = [config.width * min(2**layer, MAX_WIDENING) for layer in range(config.layers + 1)]
        spectral, batch = config.norm == "spectral", config.norm == "batch"
        layers = [PatchConv(in_channels, widths[0], stride=2, spectral=spectral, batch_norm=False)]
        for layer, (width, out_width) in enumerate(pairwise(widths), 1):
            stride = 2 if layer < config.layers else 1
            layers.append(PatchConv(width, out_width, stride, spectral, batch))
        self.layers = nn.ModuleList(layers)
        self.head = PatchConv(widths[-1], 1, 1, spectral, batch_norm=False)
        self.lecam = LeCam(lecam_decay)

    def forward(self, reconstructions: Tensor, images: Tensor | None = None) -> Logits:
        """Judges reconstructions alone in the autoencoder's turn, and beside images in the discriminator's own.

        In the autoencoder's turn the weights are constants, so that its backward pass leaves no gradient in them, under
        any wrapper. In its own, gradients reach the weights, and the estimates of spectral norms advance.

        Args:
            reconstructions: float [B, C, H, W].
            images: float [B, C, H, W]; None in the autoencoder's turn.
        """
        constant = images is None
        pictures = [reconstructions] if images is None else [reconstructions, images]
        for layer in self.layers:
            pictures = [F.leaky_relu(x, SLOPE) for x in layer(pictures, constant)]
        logits = self.head(pictures, constant)
        return Logits(logits[0], None if images is None else logits[1])

    def init_weights(self) -> None:
        """Fills all parameters and buffers with their starting values: weights N(0, 0.02), as in pix2pix."""
        for module in self.modules():
            if isinstance(module, (PatchConv, LeCam)):
                module.reset_parameters()


class PatchConv(nn.Module):
    """A 4 x 4 convolution of several batches with one weight, and a norm; batches never share statistics."""

    direction: Tensor
    """float32 [out_width]: left singular vector of the largest singular value, as far as power iteration has come."""

    def __init__(self, width: int, out_width: int, stride: int, spectral: bool, batch_norm: bool) -> None:
        super().__init__()
        self.stride, self.spectral = stride, spectral
        self.weight = nn.Parameter(torch.empty(out_width, width, 4, 4))
        self.bias = nn.Parameter(torch.empty(out_width))
        self.norm_weight = nn.Parameter(torch.empty(out_width)) if batch_norm else None
        if spectral:
            self.register_buffer("direction", torch.empty(out_width))
        self.reset_parameters()

    def forward(self, pictures: list[Tensor], constant: bool) -> list[Tensor]:
        """Convolves and normalises each batch.

        Args:
            pictures: batches [B, width, H, W].
            constant: whether the parameters get no gradient and the buffers do not change.

        Returns:
            A map [B, out_width, h, w] for each batch.
        """
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        norm_weight: Tensor | None = self.norm_weight
        if constant:
            weight, bias = weight.detach(), bias.detach()
            norm_weight = None if norm_weight is None else norm_weight.detach()
        if self.spectral:
            weight = weight / self._spectral_norm(weight, advance=self.training and not constant)
        if norm_weight is None:
            return [F.conv2d(x, weight, bias, self.stride, 1) for x in pictures]
        convolved = [F.conv2d(x, weight, None, self.stride, 1) for x in pictures]
        return [
            F.batch_norm(x, None, None, norm_weight.float(), bias.float(), training=True, eps=NORM_EPS)
            for x in convolved
        ]

    def _spectral_norm(self, weight: Tensor, advance: bool) -> Tensor:
        """The weight's largest singular value by one step of power iteration (arXiv 1802.05957, algorithm 1).

        Args:
            weight: [out_width, width, 4, 4].
            advance: whether `direction` takes over the step's result.

        Returns:
            0-d float32, differentiable in `weight`.
        """
        with without_autocast(weight.device):
            matrix = weight.flatten(1).float()
            with torch.no_grad():
                right = F.normalize(self.direction @ matrix, dim=0)
                left = F.normalize(matrix @ right, dim=0)
                if advance:
                    self.direction.copy_(left)
            return left @ (matrix @ right)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fills parameters and buffers with their starting values; the direction is a random one of length 1."""
        nn.init.normal_(self.weight, std=WEIGHT_STD)
        nn.init.zeros_(self.bias)
        if self.norm_weight is not None:
            nn.init.ones_(self.norm_weight)
        if self.spectral:
            nn.init.normal_(self.direction)
            self.direction.copy_(F.normalize(self.direction, dim=0))
