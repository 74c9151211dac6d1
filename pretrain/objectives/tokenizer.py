"""Training of image tokenizers (DC-AE, arXiv 2410.10733): what one step computes, in each of the three phases.

Enters: batches of stored images with their global sample positions. Leaves: a turn of the autoencoder and, where there
is one, a turn of the discriminator. The phases are configurations of this one objective: which parts are trained, at
which size, with or without a discriminator.
Legend: B batch, C channels, L latent channels, H/W pixels, h/w latent pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pretrain.losses.adversarial import (
    AdversarialConfig,
    adaptive_factors,
    discriminator_loss,
    generator_loss,
    squared_gradient,
    with_gradient,
)
from pretrain.losses.perceptual import LPIPS, SMALLEST_SIDE, PerceptualConfig, load_lpips
from pretrain.losses.reconstruction import kl_per_value, l1, psnr
from pretrain.models.dc_ae import DCAE, DCAEOutput, dc_ae_flops
from pretrain.models.dc_ae_config import DCAEConfig
from pretrain.models.discriminator import Discriminator, DiscriminatorConfig, Logits
from pretrain.models.masking import position_noise
from pretrain.models.normalise import Normalise, check_statistics
from pretrain.objectives.base import Objective, Turn

if TYPE_CHECKING:
    from data_pipes.loader import Batch

TRAINED_PARTS: dict[str, tuple[str, ...]] = {
    "all": (r".*",),
    "decoder": (r"decoder\..*",),
    "latent": (r"encoder\.project_out\..*", r"decoder\.project_in\..*"),
    "latent+stage": (
        r"encoder\.(project_out|stages\.{deepest})\..*",
        r"decoder\.(project_in|stages\.{deepest})\..*",
    ),
    "head": (r"decoder\.project_out\..*",),
    "head+stage": (r"decoder\.(project_out|stages\.{finest})\..*",),
}
"""Names for what a phase trains: phase 1 "all", phase 2 "latent", phase 3 "head"; "+stage" adds the stage beside it."""


@dataclass(frozen=True)
class TokenizerConfig:
    """An autoencoder, what of it is trained, and by which losses."""

    model: DCAEConfig = field(default_factory=DCAEConfig)
    """The autoencoder; its in_channels are those of the data."""
    image_size: tuple[int, int] = (256, 256)
    """Height and width of the training images, in pixels; need not be multiples of the model's factor."""
    trained: tuple[str, ...] = ("all",)
    """Names of `TRAINED_PARTS`, or regular expressions that match whole parameter names; all else is frozen."""
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    """LPIPS beside the L1 loss."""
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    """The generator's and discriminator's losses; with a weight of 0 there is no discriminator."""
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    """Shape of the discriminator."""
    kl_weight: float = 0.0
    """Of a gaussian latent's divergence, on the scale of a reconstruction that is summed over values (SD: 1e-6)."""
    mean: tuple[float, ...] = ()
    """Per channel, on the scale where the stored range is [0, 1]; empty: 0.5, so that images lie in [-1, 1]."""
    std: tuple[float, ...] = ()
    """Per channel, on the same scale, > 0; empty: 0.5."""
    init_from: str | None = None
    """Weights to start from: a run, a checkpoint, or a weights file; null: the seed's."""

    def __post_init__(self) -> None:
        channels = self.model.in_channels
        object.__setattr__(self, "image_size", tuple(self.image_size))
        object.__setattr__(self, "trained", tuple(self.trained))
        object.__setattr__(self, "mean", tuple(self.mean) or (0.5,) * channels)
        object.__setattr__(self, "std", tuple(self.std) or (0.5,) * channels)
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            raise ValueError(f"image_size is {list(self.image_size)}; expected [height, width], each at least 1 pixel.")
        if not self.trained:
            raise ValueError(f"trained is empty; expected names such as {', '.join(TRAINED_PARTS)}, or patterns.")
        check_statistics(self.mean, self.std, channels)
        self._check_losses()

    def _check_losses(self) -> None:
        channels = self.model.in_channels
        if self.kl_weight < 0.0 or (self.kl_weight > 0.0 and not self.model.gaussian):
            raise ValueError(
                f"kl_weight is {self.kl_weight} and model.gaussian is {self.model.gaussian}; expected 0 or more, and a "
                "gaussian latent where it is not 0. Set model.gaussian to true or kl_weight to 0."
            )
        shown = self.perceptual.channels
        if self.perceptual.weight > 0.0 and (max(shown, default=0) >= channels or (channels == 2 and not shown)):
            raise ValueError(
                f"perceptual.channels is {list(shown)} and the images have {channels} channels; expected 3 of the "
                f"channels 0 to {channels - 1}, the same one more than once if need be."
            )
        smallest = SMALLEST_SIDE[self.perceptual.network]
        if self.perceptual.weight > 0.0 and min(self.image_size) < smallest:
            raise ValueError(
                f"image_size is {list(self.image_size)}, and perceptual.network {self.perceptual.network} needs sides "
                f"of at least {smallest} pixels. Use larger images, or set perceptual.weight to 0."
            )
        if self.adversarial.r1_weight > 0.0 and self.discriminator.norm == "batch":
            raise ValueError(
                "adversarial.r1_weight needs each sample's own gradient, and discriminator.norm is batch, which mixes "
                "samples. Set discriminator.norm to spectral, or r1_weight to 0."
            )

    def trained_patterns(self) -> list[str]:
        """Regular expressions of what is trained."""
        stages = {
            "{deepest}": str(len(self.model.widths) - 1),
            "{finest}": "0" if self.model.decoder_depths[0] else "1",
        }
        patterns = [pattern for name in self.trained for pattern in TRAINED_PARTS.get(name, (name,))]
        for placeholder, stage in stages.items():
            patterns = [pattern.replace(placeholder, stage) for pattern in patterns]
        return patterns


class TokenizerObjective(Objective):
    """Two players: "autoencoder", a `DCAE`, and "discriminator", which is there if its loss has a weight."""

    backbone_player = "autoencoder"
    backbone_prefix = ""

    def __init__(self, config: TokenizerConfig, seed: int) -> None:
        """seed: of a gaussian latent's noise in training, together with each sample's position."""
        self.config = config
        self.seed = seed
        self.autoencoder = DCAE(config.model)
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
        output = self._forward(images, self._noise(batch.positions, images))
        yield self._autoencoder_turn(output, images, step)
        if self.config.adversarial.discriminator_learns(step):
            yield self._discriminator_turn(output.reconstruction.detach().float(), images, step)

    def _autoencoder_turn(self, output: DCAEOutput, images: Tensor, step: int) -> Turn:
        config = self.config
        metrics: dict[str, Tensor] = {}
        reconstruction = output.reconstruction.float()
        weight = config.adversarial.weight * config.adversarial.generator_share(step)
        if weight == 0.0:
            loss = self._distance(reconstruction, images, metrics).mean()
        elif not config.adversarial.adaptive:
            judged = self._judge(reconstruction, metrics)
            loss = (self._distance(reconstruction, images, metrics) + weight * judged).mean()
        else:
            loss = self._balanced(reconstruction, images, weight, metrics)
        if output.kl is not None:
            kl = kl_per_value(output.kl, images)
            metrics["kl"] = kl.mean()
            loss = loss + config.kl_weight * kl.mean()
        metrics["loss"] = loss
        return Turn(loss, "autoencoder", {name: value.detach() for name, value in metrics.items()})

    def _distance(self, reconstruction: Tensor, images: Tensor, metrics: dict[str, Tensor]) -> Tensor:
        """[B]: L1 and LPIPS."""
        distance = l1(reconstruction, images)
        metrics["l1"] = distance.mean()
        if self.config.perceptual.weight > 0.0:
            perceptual = self._lpips(images.device)(self._to_lpips(reconstruction), self._to_lpips(images))
            metrics["perceptual"] = perceptual.mean()
            distance = distance + self.config.perceptual.weight * perceptual
        return distance

    def _judge(self, reconstruction: Tensor, metrics: dict[str, Tensor]) -> Tensor:
        """[B]: the generator's loss. The discriminator's weights are constants here."""
        logits: Logits = self.players["discriminator"](reconstruction)
        judged = generator_loss(logits.fake, self.config.adversarial.kind)
        metrics["adversarial"] = judged.mean()
        return judged

    def _balanced(self, reconstruction: Tensor, images: Tensor, weight: float, metrics: dict[str, Tensor]) -> Tensor:
        """The loss with adaptive weights: both gradients are taken at the pixels, and go on joined."""
        pixels = reconstruction.detach().requires_grad_()
        distance, judged = self._distance(pixels, images, metrics), self._judge(pixels, metrics)
        (wanted,) = torch.autograd.grad(distance.mean(), pixels)
        (given,) = torch.autograd.grad(judged.mean(), pixels)
        factors = adaptive_factors(wanted, given, self.config.adversarial.adaptive_max)
        metrics["adaptive_factor"] = factors.mean()
        value = (distance + weight * factors * judged).mean()
        return with_gradient(value, reconstruction, wanted + weight * factors[:, None, None, None] * given)

    def _discriminator_turn(self, reconstruction: Tensor, images: Tensor, step: int) -> Turn:
        """reconstruction: detached. Runs after the autoencoder's step, with what it made before."""
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
        """Of the latents' means: the distances that training minimises, and PSNR of the rounded picture."""
        images = self.normalise(batch.images)
        output = self._forward(images, None)
        metrics: dict[str, Tensor] = {}
        metrics["loss"] = self._distance(output.reconstruction.float(), images, metrics).mean()
        to_uint8 = self.normalise.to_uint8
        metrics["psnr"] = psnr(to_uint8(output.reconstruction.float()), to_uint8(images)).mean()
        metrics["latent_rms"] = output.latent.float().square().flatten(1).mean(dim=1).sqrt().mean()
        return metrics

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """The "input", its "reconstruction", and their "difference" around grey; of 3 channels, or of the first."""
        images = self.normalise(batch.images)
        shown = [self._show(x) for x in (images, self._forward(images, None).reconstruction.float())]
        difference = (shown[1].int() - shown[0].int() + 128).clamp(0, 255).to(torch.uint8)
        return {"input": shown[0], "reconstruction": shown[1], "difference": difference}

    def flops_per_sample(self) -> float:
        """Of the autoencoder alone, with what is frozen in this phase."""
        return dc_ae_flops(self.config.model, self.image_size, self.config.trained_patterns())

    def build_backbone(self) -> DCAE:  # type: ignore[override]  # the contract still says ViT
        with torch.device("cpu"):
            return DCAE(self.config.model)

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

    def _forward(self, images: Tensor, noise: Tensor | None) -> DCAEOutput:
        output: DCAEOutput = self.players["autoencoder"](images, noise)
        return output

    def _noise(self, positions: Tensor, images: Tensor) -> Tensor | None:
        """Standard normal [B, L, h, w] for a gaussian latent."""
        if not self.config.model.gaussian:
            return None
        factor = self.config.model.factor
        shape = self.config.model.latent_channels, *(-(-side // factor) for side in images.shape[2:])
        noise: Tensor = position_normal(positions, math.prod(shape), self.seed).unflatten(1, shape)
        return noise

    def _lpips(self, device: torch.device) -> LPIPS:
        if self.lpips is None:
            self.lpips = load_lpips(self.config.perceptual)
        return self.lpips.to(device)

    def _to_lpips(self, normalised: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, 3, H, W] in [-1, 1]."""
        channels = self.config.perceptual.channels or ((0, 1, 2) if self.in_channels >= 3 else (0, 0, 0))
        planes = [normalised[:, c] * (2.0 * self.std[c]) + (2.0 * self.mean[c] - 1.0) for c in channels]
        return torch.stack(planes, dim=1)

    def _show(self, images: Tensor) -> Tensor:
        """Normalised [B, C, H, W] -> uint8 [B, 1 or 3, H, W] on the CPU."""
        return self.normalise.to_uint8(images)[:, : 3 if self.in_channels >= 3 else 1].cpu()

    def _check(self, player: str) -> None:
        if player not in self.players:
            raise ValueError(f"There is no player {player!r}; this tokenizer has {', '.join(self.players)}.")


def position_normal(positions: Tensor, count: int, seed: int) -> Tensor:
    """Standard normal noise, a pure function of (seed, position, index), by Box and Muller: float32 [B, count]."""
    uniform = position_noise(positions, 2 * count, seed)
    radius = (-2.0 * torch.log1p(-uniform[:, :count])).sqrt()  # 1 - uniform is never 0
    return radius * torch.cos(2.0 * math.pi * uniform[:, count:])
