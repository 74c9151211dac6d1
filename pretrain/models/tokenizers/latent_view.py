"""What a decoder is shown in one training step instead of the whole latent, and what it should make of that.

Enters: latents, and the images they came from. Leaves: the first channels of the latents alone (DC-AE 1.5, arXiv
2508.00413), or scaled and turned latents with equally scaled and turned images (EQ-VAE, 2502.09509).
Legend: B batch, C image channels, L latent channels, H/W pixels, h/w latent pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.models.precision import without_autocast


@dataclass(frozen=True)
class LatentView:
    """One view; the default shows the latent as it is."""

    channels: Tensor | None = None
    """int64 [B]: how many of its first channels each sample keeps, the others are 0; None keeps all."""
    size: tuple[int, int] | None = None
    """h, w to which the latent is resized before it is turned; None keeps its size."""
    quarter_turns: int = 0
    """Counter-clockwise turns by 90 degrees, 0 to 3."""

    @property
    def keeps_geometry(self) -> bool:
        """Whether the latent is neither resized nor turned, so that the reconstruction should be the image itself."""
        return self.size is None and self.quarter_turns == 0

    def kept_channels(self, num_channels: int) -> Tensor | None:
        """Which latent channels the decoder sees, bool [B, num_channels]; None where it sees all."""
        if self.channels is None:
            return None
        return torch.arange(num_channels, device=self.channels.device) < self.channels[:, None]

    def apply_to_latent(self, latent: Tensor) -> Tensor:
        """What the decoder sees of a latent: [B, L, h, w] to [B, L, h', w'].

        Hidden channels are multiplied with 0. A convolution then gives what its weights, sliced to the kept input
        channels, give with the same bias: products with 0 add nothing. A shortcut that repeats channels adds 0 to
        the features that belong to hidden ones; slicing alone would not define it, as it would deal the kept channels
        out anew for each count. DC-AE 1.5 has no such shortcut, so there both are the same function.
        """
        kept = self.kept_channels(latent.shape[1])
        if kept is not None:
            latent = latent * kept[:, :, None, None].to(latent.dtype)
        if self.size is not None:
            latent = resize(latent, self.size)
        return torch.rot90(latent, self.quarter_turns, (2, 3)) if self.quarter_turns else latent

    def apply_to_images(self, padded: Tensor, factor: int) -> Tensor:
        """What the decoder should make of the view.

        Args:
            padded: the images, float [B, C, H, W], with H and W multiples of `factor`.
            factor: pixels of the image per pixel of the latent, in each direction.

        Returns:
            float [B, C, h' * factor, w' * factor], resized and turned as the latent is.
        """
        if self.size is not None:
            padded = resize(padded, (self.size[0] * factor, self.size[1] * factor))
        return torch.rot90(padded, self.quarter_turns, (2, 3)) if self.quarter_turns else padded


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """`F.interpolate(x, size, mode="bilinear")` of [B, C, H, W] as two products, at least float32 inside.

    The backward pass of torch's bilinear kernel adds with atomics on CUDA, in an order that no seed fixes; a run would
    not resume to the bit.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    with without_autocast(x.device):
        rows, columns = (
            F.interpolate(torch.eye(old, device=x.device, dtype=dtype)[None], new, mode="linear")[0]
            for old, new in zip(x.shape[2:], size, strict=True)
        )  # [H, H'], [W, W']
        return (rows.T @ (x.to(dtype) @ columns)).to(x.dtype)
