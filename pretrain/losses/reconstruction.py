"""How far a reconstruction is from its image. Pure functions; one number per sample, float32 in any autocast.

Legend: B batch, C channels, H/W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def l1(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Mean absolute difference over a sample's values: float [B, C, H, W] each to [B], at least float32."""
    return (at_least_float32(reconstruction) - images).abs().flatten(1).mean(dim=1)


def kl_per_value(kl: Tensor, images: Tensor) -> Tensor:
    """A latent's divergence on the scale of `l1`, per value of the image.

    Published weights such as 1e-6 go with a reconstruction loss that is summed over the image's values; divided by
    their number, both are means and the same weight fits.

    Args:
        kl: [B], nats summed over a sample's latent values.
        images: [B, C, H, W].

    Returns:
        [B], nats per value.
    """
    return kl / images[0].numel()


def psnr(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each sample.

    A perfect reconstruction counts as one that is wrong by half a grey level in a single value, as infinity has no
    mean.

    Args:
        reconstruction: uint8 [B, C, H, W], rounded as it would be stored.
        images: uint8 [B, C, H, W].

    Returns:
        float32 [B], in dB.
    """
    error = (reconstruction.float() - images.float()).square().flatten(1)
    return 10.0 * torch.log10(255.0**2 / error.mean(dim=1).clamp_min(0.25 / error.shape[1]))


def at_least_float32(values: Tensor) -> Tensor:
    """The same values in float32, or in float64 where they were that."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
