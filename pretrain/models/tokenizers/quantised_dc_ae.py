"""DC-AE with a quantised latent: images to integers and back.

Enters: normalised images of any size. Leaves: reconstructions, latents made of codes, and the codes' numbers.
Legend: B batch, C image channels, L latent channels, H/W pixels, h/w latent pixels, K codes, G codes per place.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from pretrain.models.tokenizers.autoencoder import Autoencoder, pad_to_multiple
from pretrain.models.tokenizers.dc_ae import Decoder, Encoder
from pretrain.models.tokenizers.dc_ae_config import DCAEConfig
from pretrain.models.tokenizers.quantisers import Quantiser, QuantiserConfig, build_quantiser


@dataclass(frozen=True)
class QuantisedDCAEConfig:
    """A DC-AE and the codebook between its halves."""

    autoencoder: DCAEConfig = field(default_factory=DCAEConfig)
    """Encoder and decoder; its latent is not gaussian."""
    quantiser: QuantiserConfig = field(default_factory=QuantiserConfig)
    """The codebook."""

    def __post_init__(self) -> None:
        if self.autoencoder.gaussian:
            raise ValueError("autoencoder.gaussian is true; expected false, as the codes take the gaussian's place.")
        self.quantiser.check(self.autoencoder.latent_channels)

    @property
    def in_channels(self) -> int:
        """Channels of the images."""
        return self.autoencoder.in_channels

    @property
    def latent_channels(self) -> int:
        """Channels of the latent."""
        return self.autoencoder.latent_channels

    @property
    def factor(self) -> int:
        """Pixels of the image per pixel of the latent, in each direction."""
        return self.autoencoder.factor

    @property
    def gaussian(self) -> bool:
        """False: the latent is made of codes."""
        return False

    @property
    def stage_names(self) -> dict[str, str]:
        """Prefixes of parameter names by place; see `AutoencoderConfig`."""
        return self.autoencoder.stage_names


class QuantisedDCAE(Autoencoder):
    """DC-AE's encoder and decoder around a codebook; parameters as DCAE's, and `bottleneck.`."""

    config: QuantisedDCAEConfig
    bottleneck: Quantiser

    def __init__(self, config: QuantisedDCAEConfig) -> None:
        quantiser = build_quantiser(config.quantiser, config.latent_channels)
        super().__init__(config, Encoder(config.autoencoder), quantiser, Decoder(config.autoencoder))

    def to_codes(self, images: Tensor) -> Tensor:
        """The codes of images.

        Args:
            images: float [B, C, H, W], any size.

        Returns:
            int64 [B, G, h, w] in [0, K).
        """
        encoded = self._run(self.encoder.steps(), pad_to_multiple(images, self.config.factor), 0)
        return self.bottleneck.to_codes(encoded)

    def from_codes(self, codes: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """The images of codes.

        Args:
            codes: int64 [B, G, h, w] in [0, K).
            size: height and width to crop to, in pixels; None crops nothing.

        Returns:
            [B, C, H, W].
        """
        return self.decode(self.bottleneck.from_codes(codes), size)
