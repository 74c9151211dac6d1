"""What all autoencoders share: a forward pass in steps, of which the first ones may be frozen, and any picture size.

Enters: normalised images of any size. Leaves: reconstructions of the same size, and latents. An architecture gives an
encoder, a bottleneck and a decoder (`pretrain/models/tokenizers/dc_ae.py` is one).
Legend: B batch, C image channels, L latent channels, H/W pixels, h/w latent pixels, K codes of a codebook.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.norms import BatchNorm, commit_statistics
from pretrain.models.tokenizers.bottlenecks import Bottleneck, Latent
from pretrain.models.tokenizers.latent_view import LatentView


class AutoencoderConfig(Protocol):
    """What the configuration of every architecture has."""

    @property
    def in_channels(self) -> int:
        """Channels of the images."""

    @property
    def latent_channels(self) -> int:
        """Channels of the latent."""

    @property
    def factor(self) -> int:
        """Pixels of the image per pixel of the latent, in each direction."""

    @property
    def gaussian(self) -> bool:
        """Whether the latent is drawn from a gaussian in training."""

    @property
    def stage_names(self) -> dict[str, str]:
        """Prefixes of parameter names by place: "encoder_deepest", "decoder_deepest" (beside the latent) and
        "decoder_finest" (beside the pixels); without the leading "encoder." or "decoder."."""


class AutoencoderOutput(NamedTuple):
    """What a forward pass gives."""

    reconstruction: Tensor
    """[B, C, H, W], on the scale of the images; of the view's size where one moves or resizes the latent."""
    latent: Tensor
    """[B, L, h, w], as the decoder got it."""
    kl: Tensor | None
    """[B]: divergence from N(0, 1) in nats, summed over the latent values that the decoder saw; None where the latent
    is not gaussian."""
    commitment: Tensor | None = None
    """0-d: what a learned codebook adds to the loss; None without one. See `Latent`."""
    code_counts: Tensor | None = None
    """float32 [K]: how often each code occurs in this batch; None where the latent is not quantised."""


class EncoderOrDecoder(nn.Module, ABC):
    """One half of an autoencoder. Its layers next to the latent and to the pixels are called `project_in` or
    `project_out`: names of trained parts rely on them."""

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The units that are compiled, checkpointed and sharded one by one, in forward order."""

    @abstractmethod
    def steps(self) -> list[nn.Module]:
        """Everything that a forward pass calls one after the other, each with the result of the one before."""

    @abstractmethod
    def init_weights(self) -> None:
        """Fills all parameters and buffers with their starting values."""


class Autoencoder(nn.Module):
    """Encoder, bottleneck, decoder. `forward` is what training calls; `encode` and `decode` are for using the result.

    An architecture is a subclass that only builds the three.
    """

    def __init__(
        self,
        config: AutoencoderConfig,
        encoder: EncoderOrDecoder,
        bottleneck: Bottleneck,
        decoder: EncoderOrDecoder,
    ) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.bottleneck = bottleneck
        self.decoder = decoder
        self.num_frozen_steps = 0
        """How many of `steps()` run without gradients; see `train_only`."""

    def forward(self, images: Tensor, noise: Tensor | None = None, view: LatentView | None = None) -> AutoencoderOutput:
        """Reconstructs images.

        Args:
            images: float [B, C, H, W]. The sides need not be multiples of the factor: images are padded on the right
                and at the bottom.
            noise: standard normal [B, L, h, w], for a gaussian latent; None takes its mean.
            view: what of the latent the decoder sees; None is all of it.

        Returns:
            The reconstructions, the latents, and what these cost.
        """
        latent, view = self._latent(images, noise), view or LatentView()
        shown, kl = view.apply_to_latent(latent.values), latent.kl
        if kl is not None:
            kept = view.kept_channels(self.config.latent_channels)
            kl = (kl if kept is None else kl * kept).sum(dim=1)
        decoded = self._run(self.decoder.steps(), shown, len(self.encoder.steps()))
        if view.keeps_geometry:
            decoded = decoded[..., : images.shape[2], : images.shape[3]]
        if self.training:
            commit_statistics(module for module in self.decoder.modules() if isinstance(module, BatchNorm))
        return AutoencoderOutput(decoded, shown, kl, latent.commitment, latent.code_counts)

    def encode(self, images: Tensor) -> Tensor:
        """The latents of images, without noise.

        Args:
            images: float [B, C, H, W], any size.

        Returns:
            Unscaled latents [B, L, ceil(H / factor), ceil(W / factor)].
        """
        return self._latent(images, None).values

    def decode(self, latent: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """The images of latents.

        Args:
            latent: [B, L, h, w], unscaled.
            size: height and width to crop to, in pixels; None keeps h * factor, w * factor.

        Returns:
            [B, C, H, W], on the scale of the images that the model was trained on.
        """
        decoded = self._run(self.decoder.steps(), latent, len(self.encoder.steps()))
        return decoded if size is None else decoded[..., : size[0], : size[1]]

    def steps(self) -> list[nn.Module]:
        """Everything that a forward pass calls one after the other, but the bottleneck."""
        return [*self.encoder.steps(), *self.decoder.steps()]

    def blocks(self) -> list[nn.Module]:
        """The units that are compiled, checkpointed and sharded one by one, in forward order."""
        return [*self.encoder.blocks(), *self.decoder.blocks()]

    def train_only(self, patterns: Sequence[str]) -> None:
        """Trains the parameters whose full name matches one of the regular expressions, and freezes all others.

        Steps before the first trained one run without gradients from now on; batch norms that are not trained keep
        their statistics.

        Args:
            patterns: regular expressions, matched from start to end of a name.

        Raises:
            ValueError: a pattern matches no parameter.
        """
        names = [name for name, _ in self.named_parameters()]
        for pattern in patterns:
            if not any(re.fullmatch(pattern, name) for name in names):
                raise ValueError(
                    f"No parameter of the autoencoder has a name that {pattern!r} matches from start to end; the names "
                    f"look like {names[0]!r} and {names[-1]!r}."
                )
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(any(re.fullmatch(pattern, name) for pattern in patterns))
        for module in self.modules():
            if isinstance(module, BatchNorm):
                module.frozen = not module.weight.requires_grad
        trained = [_is_trained(step) for step in self.steps()]
        if _is_trained(self.bottleneck):
            trained[len(self.encoder.steps())] = True  # its gradient passes through the decoder from the first step on
        self.num_frozen_steps = trained.index(True) if any(trained) else len(trained)

    def init_weights(self) -> None:
        """Fills all parameters and buffers with their starting values."""
        for part in (self.encoder, self.bottleneck, self.decoder):
            part.init_weights()

    def _latent(self, images: Tensor, noise: Tensor | None) -> Latent:
        encoded = self._run(self.encoder.steps(), pad_to_multiple(images, self.config.factor), 0)
        latent: Latent = self.bottleneck(encoded, noise)
        return latent

    def _run(self, steps: list[nn.Module], x: Tensor, first: int) -> Tensor:
        """Calls steps one after the other; `first` is the index of the first of them in `self.steps()`."""
        x = x.contiguous(memory_format=torch.channels_last)
        for number, step in enumerate(steps, first):
            if number < self.num_frozen_steps:
                with torch.no_grad():
                    x = step(x)
            else:
                x = step(x)
        return x


def pad_to_multiple(images: Tensor, factor: int) -> Tensor:
    """Repeats the last row and column of [B, C, H, W] until both sides are multiples of `factor`."""
    down, right = -images.shape[2] % factor, -images.shape[3] % factor
    return F.pad(images, (0, right, 0, down), mode="replicate") if down or right else images


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
