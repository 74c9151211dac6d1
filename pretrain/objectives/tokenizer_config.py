"""What a tokenizer's run is configured with: an autoencoder, what of it is trained, and by which losses."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from data_pipes.bounds import bounded
from pretrain.losses.config import SMALLEST_SIDE, AdversarialConfig, PerceptualConfig
from pretrain.models.config import check_pixels
from pretrain.models.statistics import fill_statistics
from pretrain.models.tokenizers.config import (
    DiscriminatorConfig,
    LiteVAEConfig,
    QuantisedDCAEConfig,
    ViTAutoencoderConfig,
)
from pretrain.models.tokenizers.dc_ae_config import DCAEConfig

TRAINED_PARTS: dict[str, tuple[str, ...]] = {
    "all": (r".*",),
    "decoder": (r"decoder\..*",),
    "latent": (r"encoder\.project_out\..*", r"decoder\.project_in\..*"),
    "latent+stage": (
        r"encoder\.(project_out|{encoder_deepest})\..*",
        r"decoder\.(project_in|{decoder_deepest})\..*",
    ),
    "head": (r"decoder\.project_out\..*",),
    "head+stage": (r"decoder\.(project_out|{decoder_finest})\..*",),
}
"""Names for what a phase trains: phase 1 "all", phase 2 "latent", phase 3 "head"; "+stage" adds the stage beside it."""


@dataclass(frozen=True)
class ChannelPrefixConfig:
    """DC-AE 1.5's structured latent (arXiv 2508.00413, section 3.2): decoding from the first channels alone is trained.

    Each sample draws its own count, where the paper draws one per step: a step then holds a mixture of counts, the
    expected gradient is the same, and it does not depend on how a batch is cut into ranks and micro-batches.
    """

    step: int = bounded(0, least=0)
    """Latent channels from one count to the next: step, 2 step, ..., and all; 0 = always all. The paper: 16."""
    always_min_max: bool = False
    """Of every four consecutive samples, one keeps the fewest channels and one keeps all; so both are in each step
    of at least 4 samples. false: all samples draw."""
    validated: tuple[int, ...] = bounded((), least=1)
    """Counts whose PSNR validation reports, each for one forward pass; empty: all of them."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "validated", tuple(self.validated))
        if self.step < 0:
            raise ValueError(f"prefix.step is {self.step}; expected 0 or more.")

    def check(self, latent_channels: int) -> None:
        """Checks the settings against a latent.

        Raises:
            ValueError: a latent with so many channels has no such prefixes, or settings are given that nothing reads.
        """
        if self.step == 0 and (self.always_min_max or self.validated):
            raise ValueError(
                "prefix.always_min_max or prefix.validated is set and prefix.step is 0, which keeps all channels. Set "
                "prefix.step, to 16 for example."
            )
        if self.step >= latent_channels:
            raise ValueError(
                f"prefix.step is {self.step} and the latent has {latent_channels} channels; expected less than that, "
                "or there is only one count."
            )
        unknown = [count for count in self.validated if count not in self.counts(latent_channels)]
        if unknown:
            raise ValueError(
                f"prefix.validated holds {unknown}, which are not trained; expected some of "
                f"{self.counts(latent_channels)}."
            )

    def counts(self, latent_channels: int) -> list[int]:
        """The counts that are trained, ascending; the last one is all channels. Empty where all are always kept."""
        return [*range(self.step, latent_channels, self.step), latent_channels] if self.step else []


@dataclass(frozen=True)
class EquivarianceConfig:
    """EQ-VAE (arXiv 2502.09509): in some steps the latent is scaled and turned, and should decode to the image scaled
    and turned alike; all losses compare with that. One transform per step, for all ranks: its samples share one shape.
    """

    probability: float = bounded(0.0, least=0, most=1)
    """Share of the steps in which the latent is transformed; 0 = never. The paper: 0.5."""
    min_scale: float = bounded(0.25, above=0, most=1)
    """Smallest factor by which a latent's sides shrink, in (0, 1]. Sides are whole latent pixels, evenly drawn from
    this to 1, and images follow them: at a factor of 32 and more, few other scales exist."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.probability <= 1.0 or not 0.0 < self.min_scale <= 1.0:
            raise ValueError(
                f"equivariance.probability is {self.probability} and min_scale {self.min_scale}; expected numbers in "
                "[0, 1] and (0, 1]."
            )

    def sizes(self, latent_size: tuple[int, int]) -> list[tuple[int, int]]:
        """All sizes h, w to which a latent of `latent_size` may shrink, ascending; the last one is its own."""
        height, width = latent_size
        smallest = max(1, math.ceil(self.min_scale * height - 1e-9))
        return [(rows, max(1, round(rows * width / height))) for rows in range(smallest, height + 1)]


@dataclass(frozen=True)
class TokenizerConfig:
    """An autoencoder, what of it is trained, and by which losses."""

    model: DCAEConfig = field(default_factory=DCAEConfig)
    """The autoencoder; its in_channels are those of the data."""
    image_size: tuple[int, int] = bounded((256, 256), least=1)
    """Height and width of the training images, in pixels; need not be multiples of the model's factor."""
    trained: tuple[str, ...] = ("all",)
    """Names of `TRAINED_PARTS`, or regular expressions that match whole parameter names; all else is frozen."""
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    """LPIPS beside the L1 loss; with a weight of 0 there is none."""
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    """The generator's and discriminator's losses; with a weight of 0 there is no discriminator."""
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    """Shape of the discriminator."""
    prefix: ChannelPrefixConfig = field(default_factory=ChannelPrefixConfig)
    """Decoding from the first latent channels alone (DC-AE 1.5)."""
    equivariance: EquivarianceConfig = field(default_factory=EquivarianceConfig)
    """Latents that scale and turn as their images do (EQ-VAE)."""
    init_from: str | None = None
    """Run, checkpoint or weights file whose autoencoder the run starts from; null: random weights."""
    kl_weight: float = bounded(0.0, least=0)
    """Weight of a gaussian latent's divergence from N(0, 1), as for a reconstruction loss that is summed over values
    (Stable Diffusion's: 1e-6)."""
    mean: tuple[float, ...] = bounded(())
    """Per channel, on the scale where the stored range is [0, 1]; empty: 0.5, so that images lie in [-1, 1]."""
    std: tuple[float, ...] = bounded((), above=0)
    """Per channel, on the same scale, > 0; empty: 0.5."""

    def __post_init__(self) -> None:
        channels = self.model.in_channels
        object.__setattr__(self, "image_size", tuple(self.image_size))
        object.__setattr__(self, "trained", tuple(self.trained))
        check_pixels(image_size=self.image_size)
        if not self.trained:
            raise ValueError(f"trained is empty; expected names such as {', '.join(TRAINED_PARTS)}, or patterns.")
        fill_statistics(self, (0.5,) * channels, (0.5,) * channels)
        self.prefix.check(self.model.latent_channels)
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
        needed, smallest = SMALLEST_SIDE[self.perceptual.network], self.smallest_side
        if self.perceptual.weight > 0.0 and smallest < needed:
            raise ValueError(
                f"The losses compare images down to {smallest} pixels: image_size is {list(self.image_size)}, which "
                f"equivariance may shrink; perceptual.network {self.perceptual.network} needs sides of at least "
                f"{needed} pixels. Use larger images or equivariance.min_scale, or set perceptual.weight to 0."
            )
        needed = 3 << self.discriminator.layers  # each layer halves, and two 4 x 4 convolutions need 3 pixels
        if self.adversarial.weight > 0.0 and smallest < needed:
            raise ValueError(
                f"The losses compare images down to {smallest} pixels: image_size is {list(self.image_size)}, which "
                f"equivariance may shrink; a discriminator of {self.discriminator.layers} layers needs sides of at "
                f"least {needed} pixels. Use larger images or equivariance.min_scale, or fewer discriminator.layers."
            )
        if self.adversarial.r1_weight > 0.0 and self.discriminator.norm == "batch":
            raise ValueError(
                "adversarial.r1_weight needs each sample's own gradient, and discriminator.norm is batch, which mixes "
                "samples. Set discriminator.norm to spectral, or r1_weight to 0."
            )

    @property
    def latent_size(self) -> tuple[int, int]:
        """h, w of the latent of a training image, in latent pixels."""
        factor = self.model.factor
        return -(-self.image_size[0] // factor), -(-self.image_size[1] // factor)

    @property
    def smallest_side(self) -> int:
        """Smallest height or width of the images that losses compare, in pixels."""
        smallest = min(self.image_size)
        if self.equivariance.probability > 0.0:
            shrunk = self.equivariance.sizes(self.latent_size)[0]
            smallest = min(smallest, min(shrunk) * self.model.factor)
        return smallest

    def trained_patterns(self) -> list[str]:
        """Regular expressions of what is trained."""
        patterns = [pattern for name in self.trained for pattern in TRAINED_PARTS.get(name, (name,))]
        for place, stage in self.model.stage_names.items():
            patterns = [pattern.replace(f"{{{place}}}", re.escape(stage)) for pattern in patterns]
        return patterns


@dataclass(frozen=True)
class QuantisedTokenizerConfig(TokenizerConfig):
    """As `TokenizerConfig`, with a codebook. What phase 3 freezes keeps its codes: train "head" or "decoder" there."""

    model: QuantisedDCAEConfig = field(default_factory=QuantisedDCAEConfig)  # type: ignore[assignment]
    """The autoencoder and its codebook."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prefix.step or self.equivariance.probability:
            raise ValueError(
                f"prefix.step is {self.prefix.step} and equivariance.probability {self.equivariance.probability}; "
                "expected 0 for both, as neither a part of a code nor a mixture of codes is one."
            )


@dataclass(frozen=True)
class ViTTokenizerConfig(TokenizerConfig):
    """As `TokenizerConfig`; the paper's second stage trains "decoder", with a discriminator."""

    model: ViTAutoencoderConfig = field(default_factory=ViTAutoencoderConfig)  # type: ignore[assignment]
    """The autoencoder."""


@dataclass(frozen=True)
class WaveletTokenizerConfig(TokenizerConfig):
    """As `TokenizerConfig`, with a wavelet encoder."""

    model: LiteVAEConfig = field(default_factory=LiteVAEConfig)  # type: ignore[assignment]
    """The autoencoder."""
