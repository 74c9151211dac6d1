"""The settings of losses, apart from the losses: a configuration is read and checked without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from data_pipes.bounds import bounded


@dataclass(frozen=True)
class AdversarialConfig:
    """When and how the discriminator plays. The generator's loss counts `weight * generator_share(step)`."""

    weight: float = bounded(0.0, least=0)
    """Weight of the generator's loss, beside a reconstruction loss that is a mean over values; 0 = no discriminator."""
    kind: Literal["hinge", "non_saturating"] = "hinge"
    """Loss of both players: hinge as in VQGAN (arXiv 2012.09841), non_saturating as in the first GAN (1406.2661)."""
    adaptive: bool = False
    """Scale each sample's adversarial gradient at its pixels to its reconstruction gradient there, then by `weight`."""
    adaptive_max: float = bounded(1e4, above=0)
    """Largest factor that `adaptive` may give."""
    start_step: int = bounded(0, least=0)
    """Optimizer step of the run at which the discriminator starts to learn."""
    warmup_steps: int = bounded(0, least=0)
    """Optimizer steps that it learns alone, before its loss counts for the autoencoder."""
    ramp_steps: int = bounded(0, least=0)
    """Optimizer steps over which the weight then rises linearly from 0."""
    r1_weight: float = bounded(0.0, least=0)
    """Gamma of the penalty gamma / 2 * |gradient at images|**2 (R1, arXiv 1801.04406); 0 = none."""
    r1_every: int = bounded(16, least=1)
    """Optimizer steps between R1 penalties, each counted that many times (StyleGAN2's lazy regularisation)."""
    lecam_weight: float = bounded(0.0, least=0)
    """Weight of LeCam's penalty (arXiv 2104.03310); 0 = none. Published: 0.001 to 0.3."""
    lecam_decay: float = bounded(0.999, least=0, below=1)
    """Decay of LeCam's averages of the logits, per optimizer step."""

    def __post_init__(self) -> None:
        for name in ("weight", "start_step", "warmup_steps", "ramp_steps", "r1_weight", "lecam_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 or more.")
        if self.r1_every < 1 or self.adaptive_max <= 0.0 or not 0.0 <= self.lecam_decay < 1.0:
            raise ValueError(
                f"r1_every is {self.r1_every}, adaptive_max {self.adaptive_max} and lecam_decay {self.lecam_decay}; "
                "expected at least 1, more than 0, and a decay in [0, 1)."
            )

    def discriminator_learns(self, step: int) -> bool:
        """Whether the discriminator moves in this optimizer step."""
        return self.weight > 0.0 and step >= self.start_step

    def generator_share(self, step: int) -> float:
        """How much of `weight` counts in this optimizer step: 0 while the discriminator warms up, then a ramp to 1."""
        done = step - self.start_step - self.warmup_steps
        if self.weight == 0.0 or done < 0:
            return 0.0
        return min(1.0, (done + 1) / (self.ramp_steps + 1))

    def r1_factor(self, step: int) -> float:
        """What R1's squared gradient is multiplied with in this optimizer step; 0 in steps without the penalty."""
        due = self.r1_weight > 0.0 and (step - self.start_step) % self.r1_every == 0
        return 0.5 * self.r1_weight * self.r1_every if due else 0.0


SMALLEST_SIDE = {"vgg": 16, "alex": 31}
"""Smallest height and width in pixels that a network's poolings allow."""


@dataclass(frozen=True)
class PerceptualConfig:
    """Which LPIPS, and where its weights are."""

    weight: float = bounded(0.0, least=0)
    """Weight of the distance, beside a reconstruction loss that is a mean over values; 0 = none. DC-AE has 0.25."""
    network: Literal["vgg", "alex"] = "vgg"
    """VGG-16 is usual as a loss, AlexNet as a metric."""
    backbone_path: str | None = None
    """torchvision's weights of the network (.pth or .safetensors); null: torchvision's cache or download."""
    backbone_sha256: str | None = None
    """SHA-256 of that file or its first digits; null: that of torchvision's published file."""
    linear_path: str | None = None
    """The weightings of the layers (lin0 to lin4) of LPIPS 0.1; null: those that torchmetrics ships."""
    linear_sha256: str | None = None
    """SHA-256 of that file or its first digits; null: that of the published file."""
    channels: tuple[int, ...] = bounded((), least=0)
    """The 3 channels of the images that are shown as red, green and blue; empty: the first 3, or 1 three times."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))
        if self.weight < 0.0 or len(self.channels) not in (0, 3):
            raise ValueError(
                f"weight is {self.weight} and channels is {list(self.channels)}; expected 0 or more, and 3 or none."
            )
