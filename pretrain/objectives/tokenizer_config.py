"""What a tokenizer's run is configured with: an autoencoder, what of it is trained, and by which losses."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from pretrain.losses.adversarial import AdversarialConfig
from pretrain.losses.perceptual import SMALLEST_SIDE, PerceptualConfig
from pretrain.models.normalise import fill_statistics
from pretrain.models.tokenizers.dc_ae_config import DCAEConfig
from pretrain.models.tokenizers.discriminator import DiscriminatorConfig
from pretrain.models.vit import check_pixels
from pretrain.objectives.latent_views import ChannelPrefixConfig, EquivarianceConfig

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
class TokenizerConfig:
    """An autoencoder, what of it is trained, and by which losses."""

    model: DCAEConfig = field(default_factory=DCAEConfig)
    """The autoencoder; its in_channels are those of the data."""
    image_size: tuple[int, int] = (256, 256)
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
    kl_weight: float = 0.0
    """Weight of a gaussian latent's divergence from N(0, 1), as for a reconstruction loss that is summed over values
    (Stable Diffusion's: 1e-6)."""
    mean: tuple[float, ...] = ()
    """Per channel, on the scale where the stored range is [0, 1]; empty: 0.5, so that images lie in [-1, 1]."""
    std: tuple[float, ...] = ()
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
