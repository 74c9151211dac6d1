"""DC-AE with a quantised latent: images to integers and back.

Enters: normalised images of any size. Leaves: reconstructions, latents made of codes, and the codes' numbers.
Legend: B batch, C image channels, L latent channels, H/W pixels, h/w latent pixels, K codes, G codes per place.
"""

from __future__ import annotations

from torch import Tensor

from pretrain.models.tokenizers.autoencoder import Autoencoder, pad_to_multiple
from pretrain.models.tokenizers.config import QuantisedDCAEConfig
from pretrain.models.tokenizers.dc_ae import Decoder, Encoder
from pretrain.models.tokenizers.quantisers import Quantiser, build_quantiser


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
