"""Training of image tokenizers (DC-AE, arXiv 2410.10733): what one step computes, in each of the three phases.

Enters: batches of stored images with their global sample positions. Leaves: a turn of the autoencoder and, where there
is one, a turn of the discriminator. The phases are configurations of this one objective: which parts are trained, at
which size, with or without a discriminator.
Legend: B batch, C channels, L latent channels, H/W pixels, h/w latent pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pretrain.losses.adversarial import (
    adaptive_factors,
    discriminator_loss,
    generator_loss,
    squared_gradient,
    with_gradient,
)
from pretrain.losses.perceptual import LPIPS, load_lpips
from pretrain.losses.reconstruction import kl_per_value, l1, psnr
from pretrain.models.masking import position_noise
from pretrain.models.normalise import Normalise
from pretrain.models.tokenizers.autoencoder import Autoencoder, AutoencoderOutput, pad_to_multiple
from pretrain.models.tokenizers.autoencoder_flops import training_flops
from pretrain.models.tokenizers.dc_ae import DCAE
from pretrain.models.tokenizers.discriminator import Discriminator, Logits
from pretrain.models.tokenizers.latent_view import LatentView
from pretrain.models.tokenizers.quantisers import code_metrics
from pretrain.objectives.base import Objective, Turn
from pretrain.objectives.collapse_alarms import collapse_alarms
from pretrain.objectives.latent_views import draw_prefix, draw_transform
from pretrain.objectives.tokenizer_config import TokenizerConfig

if TYPE_CHECKING:
    from data_pipes.batch import Batch


class TokenizerObjective(Objective):
    """Two players: "autoencoder", and "discriminator", which is there if its loss has a weight."""

    backbone_player = "autoencoder"
    backbone_prefix = ""

    def __init__(self, config: TokenizerConfig, seed: int, build: Callable[[Any], Autoencoder] = DCAE) -> None:
        """Builds the players on the current default device, and reads LPIPS' weights where a device is given.

        Args:
            config: the autoencoder, what of it is trained, and the losses.
            seed: of a gaussian latent's noise and of the views in training, with each sample's position and the step.
            build: makes the autoencoder of `config.model`.

        Raises:
            PerceptualWeightsError: a file of LPIPS is missing, or another one than expected.
        """
        self.config = config
        self.seed = seed
        self.build: Callable[[], Autoencoder] = partial(build, config.model)
        self.autoencoder = self.build()
        self.autoencoder.train_only(config.trained_patterns())
        self.players: dict[str, nn.Module] = {"autoencoder": self.autoencoder}
        adversarial = config.adversarial
        if adversarial.weight > 0.0:
            self.discriminator = Discriminator(config.discriminator, config.model.in_channels, adversarial.lecam_decay)
            self.players["discriminator"] = self.discriminator
        self.normalise = Normalise(config.mean, config.std)
        self.lpips: LPIPS | None = None
        # Read now, so that a missing file stops the run before anything else; what is built on meta only has a shape.
        if config.perceptual.weight > 0.0 and torch.get_default_device().type != "meta":
            self.lpips = load_lpips(config.perceptual)

    def turns(self, batch: Batch, step: int) -> Iterator[Turn]:
        images = self.normalise(batch.images)
        view = self._view(batch.positions, images, step)
        output = self._forward(images, self._noise(batch.positions, images), view)
        if not view.keeps_geometry:
            images = view.apply_to_images(pad_to_multiple(images, self.config.model.factor), self.config.model.factor)
        yield self._autoencoder_turn(output, images, step)
        if self.config.adversarial.discriminator_learns(step):
            yield self._discriminator_turn(output.reconstruction.detach().float(), images, step)

    def _autoencoder_turn(self, output: AutoencoderOutput, images: Tensor, step: int) -> Turn:
        config = self.config
        metrics: dict[str, Tensor] = {}
        reconstruction = output.reconstruction.float()
        weight = config.adversarial.weight * config.adversarial.generator_share(step)
        if weight == 0.0:
            loss = self._distance(reconstruction, images, metrics).mean()
        elif not config.adversarial.adaptive:
            adversarial = self._generator_loss(reconstruction, metrics)
            loss = (self._distance(reconstruction, images, metrics) + weight * adversarial).mean()
        else:
            loss = self._adaptive_loss(reconstruction, images, weight, metrics)
        if output.kl is not None:
            kl = kl_per_value(output.kl, images)
            metrics["kl"] = kl.mean()
            loss = loss + config.kl_weight * kl.mean()
        if output.commitment is not None:
            metrics["commitment"] = output.commitment
            loss = loss + output.commitment
        if output.code_counts is not None:
            metrics |= code_metrics(output.code_counts)
        metrics["loss"] = loss
        return Turn(loss, "autoencoder", {name: value.detach() for name, value in metrics.items()})

    def _distance(self, reconstruction: Tensor, images: Tensor, metrics: dict[str, Tensor]) -> Tensor:
        """L1 and LPIPS of each sample, weighted: float32 [B]. Puts their means into `metrics`."""
        distance = l1(reconstruction, images)
        metrics["l1"] = distance.mean()
        if self.config.perceptual.weight > 0.0:
            perceptual = self._lpips(images.device)(self._to_lpips(reconstruction), self._to_lpips(images))
            metrics["perceptual"] = perceptual.mean()
            distance = distance + self.config.perceptual.weight * perceptual
        return distance

    def _generator_loss(self, reconstruction: Tensor, metrics: dict[str, Tensor]) -> Tensor:
        """The adversarial loss of each reconstruction, float32 [B]; the discriminator's weights are constants here."""
        logits: Logits = self.players["discriminator"](reconstruction)
        adversarial = generator_loss(logits.fake, self.config.adversarial.kind)
        metrics["adversarial"] = adversarial.mean()
        return adversarial

    def _adaptive_loss(
        self, reconstruction: Tensor, images: Tensor, weight: float, metrics: dict[str, Tensor]
    ) -> Tensor:
        """The loss with adaptive weights, 0-d: both gradients are taken at the pixels, and go on joined."""
        pixels = reconstruction.detach().requires_grad_()
        distance, adversarial = self._distance(pixels, images, metrics), self._generator_loss(pixels, metrics)
        (of_distance,) = torch.autograd.grad(distance.mean(), pixels)
        (of_adversarial,) = torch.autograd.grad(adversarial.mean(), pixels)
        factors = adaptive_factors(of_distance, of_adversarial, self.config.adversarial.adaptive_max)
        metrics["adaptive_factor"] = factors.mean()
        value = (distance + weight * factors * adversarial).mean()
        gradient = of_distance + weight * factors[:, None, None, None] * of_adversarial
        return with_gradient(value, reconstruction, gradient)

    def _discriminator_turn(self, reconstruction: Tensor, images: Tensor, step: int) -> Turn:
        """The discriminator's loss. Runs after the autoencoder's step, with what that made before.

        Args:
            reconstruction: float32 [B, C, H, W], detached.
            images: float32 [B, C, H, W], normalised.
            step: optimizer steps done so far.
        """
        config = self.config.adversarial
        r1_factor = config.r1_factor(step)
        shown = images.detach().requires_grad_(r1_factor > 0.0)
        logits: Logits = self.players["discriminator"](reconstruction, shown)
        assert logits.real is not None
        losses = discriminator_loss(logits.real, logits.fake, config.kind)
        real, fake = logits.real.detach().float().mean(), logits.fake.detach().float().mean()
        metrics = {"logit_real": real, "logit_fake": fake, "logit_gap": real - fake, "game": losses.detach().mean()}
        if r1_factor > 0.0:
            losses = losses + r1_factor * squared_gradient(logits.real, shown)
        if config.lecam_weight > 0.0:
            losses = losses + config.lecam_weight * self.discriminator.lecam.penalty(logits.real, logits.fake)
            self.discriminator.lecam.collect(logits.real, logits.fake, step)
        loss = losses.mean()
        return Turn(loss, "discriminator", {"discriminator_loss": loss.detach(), **metrics})

    def blocks(self, player: str) -> list[nn.Module]:
        self._check(player)
        return self.autoencoder.blocks() if player == "autoencoder" else []

    def init_weights(self, player: str) -> None:
        self._check(player)
        (self.autoencoder if player == "autoencoder" else self.discriminator).init_weights()

    @torch.no_grad()
    def validate(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Distances between images and the reconstructions of their latents' means.

        Returns:
            "loss", what training minimises, without adversarial and latent terms; "psnr" of the rounded pictures in dB;
            "latent_rms"; for a codebook `code_metrics` of the batch; and for each count of channels that is trained
            "psnr_<count>", from the first channels alone.
        """
        images = self.normalise(batch.images)
        output = self._forward(images, None)
        metrics: dict[str, Tensor] = {}
        metrics["loss"] = self._distance(output.reconstruction.float(), images, metrics).mean()
        metrics["psnr"] = self._psnr(output, images)
        metrics["latent_rms"] = output.latent.float().square().flatten(1).mean(dim=1).sqrt().mean()
        if output.code_counts is not None:
            metrics |= code_metrics(output.code_counts)
        prefix = self.config.prefix
        for count in prefix.validated or prefix.counts(self.config.model.latent_channels):
            view = LatentView(channels=torch.full_like(batch.positions, count))
            metrics[f"psnr_{count}"] = self._psnr(self._forward(images, None, view), images)
        return metrics

    def _psnr(self, output: AutoencoderOutput, images: Tensor) -> Tensor:
        to_uint8 = self.normalise.to_uint8
        return psnr(to_uint8(output.reconstruction.float()), to_uint8(images)).mean()

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """The "input", its "reconstruction", and their "difference" around grey; of 3 channels, or of the first.

        Args:
            batch: of stored images.

        Returns:
            Views by name, uint8 [B, 1 or 3, H, W] on the CPU.
        """
        images = self.normalise(batch.images)
        shown = self.normalise.to_picture(images)
        reconstruction = self.normalise.to_picture(self._forward(images, None).reconstruction.float())
        difference = (reconstruction.int() - shown.int() + 128).clamp(0, 255).to(torch.uint8)
        return {"input": shown, "reconstruction": reconstruction, "difference": difference}

    def alarms(self, metrics: Mapping[str, float], step: int) -> list[str]:
        return collapse_alarms(metrics, self.config.adversarial, step)

    def flops_per_sample(self) -> float:
        """Model FLOPs of the autoencoder alone, forward and backward, with what is frozen in this phase."""
        return training_flops(self.build, self.image_size, self.config.trained_patterns())

    def build_backbone(self) -> Autoencoder:
        with torch.device("cpu"):
            return self.build()

    @property
    def image_size(self) -> tuple[int, int]:
        return self.config.image_size

    @property
    def in_channels(self) -> int:
        return self.config.model.in_channels

    @property
    def mean(self) -> tuple[float, ...]:
        return self.config.mean

    @property
    def std(self) -> tuple[float, ...]:
        return self.config.std

    def _forward(self, images: Tensor, noise: Tensor | None, view: LatentView | None = None) -> AutoencoderOutput:
        output: AutoencoderOutput = self.players["autoencoder"](images, noise, view)
        return output

    def _view(self, positions: Tensor, images: Tensor, step: int) -> LatentView:
        """What of the latent the decoder sees in this training step."""
        model = self.config.model
        view = draw_transform(self.config.equivariance, step, latent_size(images, model.factor), self.seed)
        return replace(view, channels=draw_prefix(self.config.prefix, positions, model.latent_channels, self.seed))

    def _noise(self, positions: Tensor, images: Tensor) -> Tensor | None:
        """Standard normal [B, L, h, w] for a gaussian latent."""
        if not self.config.model.gaussian:
            return None
        shape = self.config.model.latent_channels, *latent_size(images, self.config.model.factor)
        noise: Tensor = position_normal(positions, math.prod(shape), self.seed).unflatten(1, shape)
        return noise

    def _lpips(self, device: torch.device) -> LPIPS:
        if self.lpips is None:
            self.lpips = load_lpips(self.config.perceptual)
        return self.lpips.to(device)

    def _to_lpips(self, normalised: Tensor) -> Tensor:
        """What LPIPS sees of normalised images [B, C, H, W]: [B, 3, H, W] in [-1, 1]."""
        channels = self.config.perceptual.channels or ((0, 1, 2) if self.in_channels >= 3 else (0, 0, 0))
        planes = [normalised[:, c] * (2.0 * self.std[c]) + (2.0 * self.mean[c] - 1.0) for c in channels]
        return torch.stack(planes, dim=1)

    def _check(self, player: str) -> None:
        if player not in self.players:
            raise ValueError(f"There is no player {player!r}; this tokenizer has {', '.join(self.players)}.")


def latent_size(images: Tensor, factor: int) -> tuple[int, int]:
    """Height and width of the latents of images [B, C, H, W], in latent pixels."""
    return -(-images.shape[2] // factor), -(-images.shape[3] // factor)


def position_normal(positions: Tensor, count: int, seed: int) -> Tensor:
    """Standard normal noise, a pure function of (seed, position, index), by Box and Muller's transform.

    Args:
        positions: int64 [B], global sample positions.
        count: numbers per sample.
        seed: any integer.

    Returns:
        float32 [B, count], on the device of `positions`.
    """
    uniform = position_noise(positions, 2 * count, seed)
    radius = (-2.0 * torch.log1p(-uniform[:, :count])).sqrt()  # 1 - uniform is never 0
    return radius * torch.cos(2.0 * math.pi * uniform[:, count:])
