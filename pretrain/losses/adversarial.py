"""Losses of an autoencoder and its discriminator: penalties, weights over time, and LeCam's moving averages.

Enters: logits of a patch discriminator. Leaves: one number per sample, float32 in any autocast.
Legend: B batch, C channels, H/W pixels, h/w patches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.losses.reconstruction import at_least_float32

GRADIENT_EPS = 1e-8
"""Added to the norm of the adversarial gradient, which is 0 where a hinge is flat."""


def generator_loss(fake: Tensor, kind: str) -> Tensor:
    """How far the discriminator is from taking reconstructions for images.

    Args:
        fake: logits [B, 1, h, w] of reconstructions.
        kind: see `AdversarialConfig.kind`.

    Returns:
        float32 [B].
    """
    fake = at_least_float32(fake)
    return sample_mean(-fake if kind == "hinge" else F.softplus(-fake))


def discriminator_loss(real: Tensor, fake: Tensor, kind: str) -> Tensor:
    """How far the discriminator is from telling images from reconstructions.

    With "hinge" it is the mean of both halves, as in VQGAN; with "non_saturating" their sum, as in the original GAN.

    Args:
        real: logits [B, 1, h, w] of images.
        fake: logits [B, 1, h, w] of their reconstructions.
        kind: see `AdversarialConfig.kind`.

    Returns:
        float32 [B].
    """
    real, fake = at_least_float32(real), at_least_float32(fake)
    if kind == "hinge":
        return 0.5 * sample_mean(F.relu(1.0 - real) + F.relu(1.0 + fake))
    return sample_mean(F.softplus(-real) + F.softplus(fake))


def squared_gradient(real: Tensor, images: Tensor) -> Tensor:
    """R1 (arXiv 1801.04406): squared norm of each image's gradient of the mean logit.

    Args:
        real: logits [B, 1, h, w] of `images`. Samples must not mix in the discriminator.
        images: [B, C, H, W], which require gradients.

    Returns:
        float32 [B], itself differentiable.
    """
    (gradient,) = torch.autograd.grad(sample_mean(real).sum(), images, create_graph=True)
    return at_least_float32(gradient).square().flatten(1).sum(dim=1)


def adaptive_factors(reconstruction: Tensor, adversarial: Tensor, maximum: float) -> Tensor:
    """Per sample, |gradient of the reconstruction loss| / |gradient of the adversarial loss|.

    VQGAN (arXiv 2012.09841) takes these gradients at the decoder's last layer, over the whole batch: under
    sharding that layer's gradient lies in pieces, and ranks and micro-batches would each get a factor of their own. At
    the pixels each sample has one that does not depend on its neighbours.

    Args:
        reconstruction: gradient of the reconstruction loss at the reconstruction's pixels, [B, C, H, W].
        adversarial: gradient of the adversarial loss there, [B, C, H, W].
        maximum: largest factor.

    Returns:
        float32 [B].
    """
    reconstruction_norm, adversarial_norm = (
        torch.linalg.vector_norm(at_least_float32(gradient).flatten(1), dim=1)
        for gradient in (reconstruction, adversarial)
    )
    factors: Tensor = reconstruction_norm / (adversarial_norm + GRADIENT_EPS)
    return factors.clamp(max=maximum)


def with_gradient(value: Tensor, at: Tensor, gradient: Tensor) -> Tensor:
    """The number `value` (0-d), whose gradient at `at` is `gradient`: joins gradients that were computed apart."""
    surrogate = (at * gradient.detach()).sum()
    return value.detach() + (surrogate - surrogate.detach())


def sample_mean(values: Tensor) -> Tensor:
    """The mean over a sample's values: [B, ...] to [B]."""
    return values.flatten(1).mean(dim=1)


class LeCam(nn.Module):
    """Moving averages of a discriminator's mean logits, and the penalty for leaving them (arXiv 2104.03310).

    All state is in buffers, so that a checkpoint holds it. The averages move once per optimizer step: the logits of its
    micro-batches are collected, over all ranks, and taken in when the next step begins.
    """

    averages: Tensor
    """float32 [2]: of the mean logits of images and of reconstructions."""
    collected: Tensor
    """float32 [3]: sums of the two over the micro-batches of a step, and how many these were."""
    collected_step: Tensor
    """0-d int64: the optimizer step that `collected` belongs to; -1 before the first."""

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("averages", torch.zeros(2))
        self.register_buffer("collected", torch.zeros(3))
        self.register_buffer("collected_step", torch.tensor(-1))

    def penalty(self, real: Tensor, fake: Tensor) -> Tensor:
        """How far logits are from the other side's average (LeCam's regularisation, arXiv 2104.03310).

        Args:
            real: logits [B, 1, h, w] of images.
            fake: logits [B, 1, h, w] of their reconstructions.

        Returns:
            float32 [B].
        """
        real, fake = at_least_float32(real), at_least_float32(fake)
        average_real, average_fake = self.averages.clone()  # which an update may change before the backward pass
        return sample_mean(F.relu(real - average_fake).square()) + sample_mean(F.relu(average_real - fake).square())

    @torch.no_grad()
    def collect(self, real: Tensor, fake: Tensor, step: int) -> None:
        """Takes in a micro-batch's logits. A collective where a process group exists; the host does not wait.

        Args:
            real: logits [B, 1, h, w] of images.
            fake: logits [B, 1, h, w] of their reconstructions.
            step: optimizer steps done so far.
        """
        means = torch.stack([at_least_float32(real).mean(), at_least_float32(fake).mean()])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(means)
            means /= torch.distributed.get_world_size()
        begins = self.collected_step != step
        has_some = begins & (self.collected[2] > 0)
        previous = self.collected[:2] / self.collected[2].clamp_min(1.0)
        moved = torch.lerp(previous, self.averages, self.decay)
        self.averages.copy_(torch.where(has_some, moved, self.averages))
        fresh = torch.cat([means, means.new_ones(1)])
        self.collected.copy_(torch.where(begins, fresh, self.collected + fresh))
        self.collected_step.fill_(step)

    def reset_parameters(self) -> None:
        """Fills the buffers as before the first step."""
        self.averages.zero_()
        self.collected.zero_()
        self.collected_step.fill_(-1)
