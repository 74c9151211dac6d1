"""Distances per sample against their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from pretrain.losses.reconstruction import kl_per_value, l1, psnr


def test_l1_is_a_mean_per_sample_in_float32() -> None:
    one, other = torch.randn(2, 3, 2, 4, 5)
    for sample in range(3):
        expected = sum(abs(a - b) for a, b in zip(one[sample].flatten(), other[sample].flatten(), strict=True)) / 40
        torch.testing.assert_close(l1(one, other)[sample], expected)
    assert l1(one.bfloat16(), other).dtype == torch.float32


def test_kl_has_the_scale_of_the_reconstruction() -> None:
    """A weight w on both means is a weight w on both sums."""
    one, other, kl = torch.randn(2, 2, 4, 5), torch.randn(2, 2, 4, 5), torch.tensor([3.0, 5.0])
    means = l1(one, other) + 1e-6 * kl_per_value(kl, other)
    sums = (one - other).abs().flatten(1).sum(dim=1) + 1e-6 * kl
    torch.testing.assert_close(means * 40, sums)


def test_psnr_is_per_image_and_finite() -> None:
    images = torch.randint(0, 200, (2, 3, 8, 8), dtype=torch.uint8)
    worse = images.clone()
    worse[1] += 10
    values = psnr(worse, images)
    assert values[1].item() == pytest.approx(20 * math.log10(255 / 10))
    assert values[0].isfinite()
    assert values[0] > 60
    assert psnr(images - images, torch.full_like(images, 255))[0].item() == pytest.approx(0.0)
