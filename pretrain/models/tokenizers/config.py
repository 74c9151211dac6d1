"""Shapes of tokenizers' networks beside DC-AE's (`dc_ae_config.py`). Read and checked without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from data_pipes.bounds import bounded
from pretrain.models.config import check_width
from pretrain.models.tokenizers.dc_ae_config import DCAEConfig


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Shape of a patch discriminator. The defaults see patches of 70 x 70 pixels."""

    width: int = bounded(64, least=1)
    """Channels after the first layer; doubled by each further layer, to at most 8 times."""
    layers: int = bounded(3, least=1)
    """Layers that halve the resolution; two that do not follow. 1, 2, 3, 4 see 16, 34, 70, 142 pixels."""
    norm: Literal["spectral", "batch", "none"] = "spectral"
    """spectral: of the weights, so that samples stay independent (arXiv 1802.05957); batch: by the statistics of the
    rank's micro-batch, as in VQGAN; none."""

    def __post_init__(self) -> None:
        if self.width < 1 or self.layers < 1:
            raise ValueError(f"width is {self.width} and layers {self.layers}; expected at least 1 of each.")


@dataclass(frozen=True)
class LiteVAEConfig:
    """A wavelet encoder and DC-AE's decoder. The defaults are f8, 12 channels and an encoder of 0.9M parameters."""

    in_channels: int = bounded(3, least=1)
    """Channels of the images."""
    latent_channels: int = bounded(12, least=1)
    """Channels of the latent."""
    gaussian: bool = False
    """The encoder predicts a mean and a log-variance per latent value (the paper's); false: the latent itself."""
    level_width: int = bounded(32, least=1)
    """Channels of the network of each wavelet level."""
    level_depth: int = bounded(3, least=0)
    """Residual blocks of the network of each wavelet level."""
    width: int = bounded(96, least=1)
    """Channels of the network that joins the levels."""
    depth: int = bounded(4, least=0)
    """Residual blocks of the network that joins the levels."""
    decoder_widths: tuple[int, ...] = bounded((128, 256, 512, 512), least=1)
    """Channels per stage of the decoder, from full resolution; each but the first halves it: 4 stages for 3 levels."""
    decoder_depths: tuple[int, ...] = bounded((2, 2, 2, 2), least=0)
    """Blocks per stage of the decoder; the first may be 0 as in DC-AE."""
    decoder_blocks: tuple[str, ...] = ("res", "res", "res", "res")
    """Per stage of the decoder: "res", "attention", "multiscale", as in DC-AE."""
    decoder_norms: tuple[str, ...] = ("rms", "rms", "rms", "rms")
    """Per stage of the decoder: "rms" or, for "res" blocks, "batch"."""

    def __post_init__(self) -> None:
        for name in ("decoder_widths", "decoder_depths", "decoder_blocks", "decoder_norms"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("in_channels", "latent_channels", "level_width", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1.")
        if self.level_depth < 1 or self.depth < 1:
            raise ValueError(f"level_depth is {self.level_depth} and depth {self.depth}; expected at least 1 of each.")
        try:
            self.decoder_shape()
        except ValueError as error:
            raise ValueError(f"The decoder of this LiteVAE cannot be built: {error}") from error

    @property
    def levels(self) -> int:
        """How often the Haar transform halves the picture."""
        return len(self.decoder_widths) - 1

    @property
    def factor(self) -> int:
        """Pixels of the image per pixel of the latent, in each direction."""
        return 1 << self.levels

    @property
    def stage_names(self) -> dict[str, str]:
        """Prefixes of parameter names by place; see `AutoencoderConfig`."""
        return {"encoder_deepest": f"joined.{self.depth - 1}", **self._decoder_stages()}

    def decoder_shape(self) -> DCAEConfig:
        """A DC-AE with this decoder."""
        return DCAEConfig(
            in_channels=self.in_channels,
            latent_channels=self.latent_channels,
            widths=self.decoder_widths,
            encoder_depths=self.decoder_depths[:1] + (1,) * self.levels,
            decoder_depths=self.decoder_depths,
            blocks=self.decoder_blocks,
            decoder_norms=self.decoder_norms,
            latent_shortcuts=False,
        )

    def _decoder_stages(self) -> dict[str, str]:
        return {name: stage for name, stage in self.decoder_shape().stage_names.items() if name.startswith("decoder")}


@dataclass(frozen=True)
class QuantiserConfig:
    """A codebook."""

    kind: Literal["sim_vq", "fsq"] = "sim_vq"
    """sim_vq: a frozen gaussian codebook times a trained matrix; fsq: rounding to a grid, nothing to train."""
    num_codes: int = bounded(16384, least=2)
    """sim_vq's number of codes, K."""
    commitment_weight: float = bounded(1.0, least=0)
    """Weight of sim_vq's loss (mean squared distance of codes and features, per value) beside the reconstruction's."""
    commitment_share: float = bounded(0.25, least=0, most=1)
    """Within that loss, how much the encoder is pulled to the codes; the codes are pulled to the encoder by 1."""
    rotation_trick: bool = False
    """Whether sim_vq's gradient to the encoder is rotated with the code (arXiv 2410.06424); false copies it, as in the
    paper."""
    levels: tuple[int, ...] = bounded((8, 8, 8, 5, 5, 5), least=2)
    """fsq's values per channel, each at least 3; a code spans as many channels as there are levels."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        if self.num_codes < 2 or self.commitment_weight < 0.0 or self.commitment_share < 0.0:
            raise ValueError(
                f"num_codes is {self.num_codes}, commitment_weight {self.commitment_weight} and commitment_share "
                f"{self.commitment_share}; expected at least 2 codes, and 0 or more."
            )
        if not self.levels or min(self.levels) < 3:
            raise ValueError(f"levels is {list(self.levels)}; expected at least 3 per channel.")

    def check(self, latent_channels: int) -> None:
        """Checks whether a latent falls into whole codes.

        Raises:
            ValueError: fsq's levels do not divide the channels.
        """
        if self.kind == "fsq" and latent_channels % len(self.levels):
            raise ValueError(
                f"The latent has {latent_channels} channels and levels has {len(self.levels)} values; expected a "
                "number of channels that is a multiple of it, as each code spans one channel per level."
            )

    @property
    def codebook_size(self) -> int:
        """Number of codes, K."""
        return self.num_codes if self.kind == "sim_vq" else math.prod(self.levels)


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


@dataclass(frozen=True)
class ViTAutoencoderConfig:
    """Shape of both transformers. The defaults are the paper's S-B/16 with 16 channels: 4,096 latent values at 256."""

    in_channels: int = bounded(3, least=1)
    """Channels of the images."""
    patch_size: int = bounded(16, least=1)
    """Side of a patch, in pixels; also the latent's factor."""
    latent_channels: int = bounded(16, least=1)
    """Latent values per patch."""
    gaussian: bool = False
    """The encoder predicts a mean and a log-variance per latent value (the paper's); false: the latent itself."""
    encoder_width: int = bounded(768, least=1)
    """Features per token; divisible by encoder_heads and by 4."""
    encoder_depth: int = bounded(6, least=1)
    """Transformer blocks."""
    encoder_heads: int = bounded(12, least=1)
    """Attention heads per block."""
    decoder_width: int = bounded(768, least=1)
    """Features per token; divisible by decoder_heads and by 4."""
    decoder_depth: int = bounded(12, least=1)
    """Transformer blocks."""
    decoder_heads: int = bounded(12, least=1)
    """Attention heads per block."""
    mlp_ratio: float = bounded(4.0, above=0)
    """Hidden features of a block's MLP / width."""

    def __post_init__(self) -> None:
        numbers = {
            name: getattr(self, name)
            for name in ("in_channels", "patch_size", "latent_channels", "encoder_depth", "decoder_depth")
        }
        if min(numbers.values()) < 1:
            found = ", ".join(f"{name} {number}" for name, number in numbers.items())
            raise ValueError(f"The ViT autoencoder has {found}; expected at least 1 of each.")
        check_width("encoder_width", self.encoder_width, "encoder_heads", self.encoder_heads)
        check_width("decoder_width", self.decoder_width, "decoder_heads", self.decoder_heads)

    @property
    def factor(self) -> int:
        """Pixels of the image per pixel of the latent, in each direction."""
        return self.patch_size

    @property
    def stage_names(self) -> dict[str, str]:
        """Prefixes of parameter names by place; see `AutoencoderConfig`."""
        return {
            "encoder_deepest": f"layers.{self.encoder_depth - 1}",
            "decoder_deepest": "layers.0",
            "decoder_finest": f"layers.{self.decoder_depth - 1}",
        }
