"""Shapes of deep compression autoencoders: DC-AE (arXiv 2410.10733), SANA's (2410.10629) and DC-AE 1.5 (2508.00413)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from data_pipes.bounds import bounded

HEAD_WIDTH = 32
"""Channels of a head, d."""
BLOCKS = ("res", "attention", "multiscale")
"""Kinds of blocks; see `DCAEConfig.blocks`."""
NORMS = ("rms", "batch")
"""Kinds of norms; see `DCAEConfig.decoder_norms`."""


@dataclass(frozen=True)
class DCAEConfig:
    """A deep compression autoencoder. The defaults are DC-AE f32c32. Stages go from full resolution to the latent's."""

    in_channels: int = bounded(3, least=1)
    """Channels of the images."""
    latent_channels: int = bounded(32, least=1)
    """Channels of the latent."""
    widths: tuple[int, ...] = bounded((128, 256, 512, 512, 1024, 1024), least=1)
    """Channels per stage; each stage but the first halves height and width."""
    encoder_depths: tuple[int, ...] = bounded((0, 4, 8, 2, 2, 2), least=0)
    """Encoder blocks per stage. A first stage of 0 is left out: the convolution from pixels halves the map itself."""
    decoder_depths: tuple[int, ...] = bounded((0, 5, 10, 2, 2, 2), least=0)
    """Decoder blocks per stage, in the order of `widths`; the first may be 0 as in the encoder."""
    blocks: tuple[str, ...] = ("res", "res", "res", "attention", "attention", "attention")
    """Per stage: "res", "attention" (linear attention and a gated convolution), or "multiscale" (the same, whose
    attention has a 5 x 5 branch beside it)."""
    decoder_norms: tuple[str, ...] = ("batch", "batch", "batch", "rms", "rms", "rms")
    """Per stage of the decoder: "rms" (with SiLU) or, for "res" blocks, "batch" (with ReLU). The encoder has "rms"."""
    output_act: Literal["relu", "silu"] = "relu"
    """Activation before the convolution to pixels."""
    resampling: Literal["shuffle", "interpolate"] = "shuffle"
    """Between stages: pixel (un)shuffle, or strided convolutions down and nearest neighbours up (SANA)."""
    shortcuts: bool = True
    """Residual shortcuts around each change of resolution, the paper's first idea; false only for comparison."""
    latent_shortcuts: bool = True
    """Shortcuts around the two convolutions next to the latent; DC-AE 1.5 has none."""
    gaussian: bool = False
    """The encoder predicts a mean and a log-variance per latent value (a KL autoencoder); false: the latent itself."""
    scaling_factor: float = bounded(1.0, above=0)
    """What a diffusion model multiplies latents with: 1 / their root mean square over a data set. Not used here."""

    def __post_init__(self) -> None:
        for name in ("widths", "encoder_depths", "decoder_depths", "blocks", "decoder_norms"):
            values = tuple(getattr(self, name))  # a YAML file gives lists
            object.__setattr__(self, name, values)
            if len(values) != len(self.widths):
                raise ValueError(
                    f"{name} has {len(values)} values and widths {len(self.widths)}; expected one per stage."
                )
        if len(self.widths) < 2 or self.in_channels < 1 or self.latent_channels < 1:
            raise ValueError(
                f"There are {len(self.widths)} stages, {self.in_channels} image channels and {self.latent_channels} "
                "latent channels; expected at least 2 stages and 1 channel of each."
            )
        for name, depths in (("encoder_depths", self.encoder_depths), ("decoder_depths", self.decoder_depths)):
            if depths[0] < 0 or min(depths[1:]) < 1:
                raise ValueError(
                    f"{name} is {list(depths)}; expected at least 1 block per stage (the first may have 0)."
                )
        self._check_kinds()
        self._check_shortcuts()

    def _check_kinds(self) -> None:
        for stage, (block, norm, width) in enumerate(zip(self.blocks, self.decoder_norms, self.widths, strict=True)):
            if block not in BLOCKS or norm not in NORMS:
                raise ValueError(
                    f"Stage {stage} has the block {block!r} and the norm {norm!r}; expected one of "
                    f"{', '.join(BLOCKS)} and one of {', '.join(NORMS)}."
                )
            if block != "res" and (norm == "batch" or width % HEAD_WIDTH):
                raise ValueError(
                    f"Stage {stage} has {block} blocks, the norm {norm!r} and width {width}; "
                    f'expected the norm "rms" and a width that is a multiple of {HEAD_WIDTH}.'
                )

    def _check_shortcuts(self) -> None:
        for depths, name in ((self.encoder_depths, "encoder"), (self.decoder_depths, "decoder")):
            first = 0 if depths[0] else 1
            for wide, narrow in zip(self.widths[first + 1 :], self.widths[first:], strict=False):
                if self.resampling == "shuffle" and wide % 4:
                    raise ValueError(f"widths holds {wide}; expected multiples of 4, as 2 x 2 pixels become channels.")
                if self.shortcuts and (4 * narrow) % wide:
                    raise ValueError(
                        f"The {name}'s widths {narrow} and {wide} follow each other; expected {wide} to divide "
                        f"4 x {narrow}, because the shortcut averages or repeats channels. Change widths."
                    )
        if self.resampling == "shuffle" and self.encoder_depths[0] == 0 and self.widths[1] % 4:
            raise ValueError(f"widths holds {self.widths[1]}; expected a multiple of 4.")
        encoded = self.latent_channels * (2 if self.gaussian else 1)
        if self.latent_shortcuts and (self.widths[-1] % encoded or self.widths[-1] % self.latent_channels):
            raise ValueError(
                f"The last width is {self.widths[-1]} and the encoder gives {encoded} channels; expected a divisor "
                "of the width, because the shortcut averages channels. Change latent_channels or latent_shortcuts."
            )

    @property
    def factor(self) -> int:
        """Pixels of the image per pixel of the latent, in each direction."""
        return 1 << (len(self.widths) - 1)

    @property
    def stage_names(self) -> dict[str, str]:
        """Prefixes of parameter names by place; see `AutoencoderConfig`."""
        deepest, finest = f"stages.{len(self.widths) - 1}", f"stages.{0 if self.decoder_depths[0] else 1}"
        return {"encoder_deepest": deepest, "decoder_deepest": deepest, "decoder_finest": finest}


def _dc_ae_1_5(latent_channels: int, num_stages: int) -> DCAEConfig:
    """DC-AE 1.5: residual blocks alone, no shortcuts at the latent."""
    depths = (0, 5, 10) + (4,) * (num_stages - 3)
    return DCAEConfig(
        latent_channels=latent_channels,
        widths=(128, 256, 512, 512, 1024, 1024, 1024)[:num_stages],
        encoder_depths=depths,
        decoder_depths=depths,
        blocks=("res",) * num_stages,
        decoder_norms=("rms",) * num_stages,
        output_act="silu",
        latent_shortcuts=False,
    )


def _with_deeper_stages(latent_channels: int, more: int, scaling_factor: float) -> DCAEConfig:
    """DC-AE f32c32 with `more` stages of 2048 channels behind it."""
    base = DCAEConfig()
    return DCAEConfig(
        latent_channels=latent_channels,
        widths=(*base.widths, *(2048,) * more),
        encoder_depths=(*base.encoder_depths, *(2,) * more),
        decoder_depths=(*base.decoder_depths, *(2,) * more),
        blocks=(*base.blocks, *("attention",) * more),
        decoder_norms=(*base.decoder_norms, *("rms",) * more),
        scaling_factor=scaling_factor,
    )


DCAE_PRESETS: dict[str, DCAEConfig] = {
    "f32c32": DCAEConfig(scaling_factor=0.3189),
    "f64c128": _with_deeper_stages(128, 1, 0.2889),
    "f128c512": _with_deeper_stages(512, 2, 0.4883),
    "f32c32-sana": DCAEConfig(
        encoder_depths=(2, 2, 2, 3, 3, 3),
        decoder_depths=(3,) * 6,
        blocks=("res", "res", "res", "multiscale", "multiscale", "multiscale"),
        decoder_norms=("rms",) * 6,
        resampling="interpolate",
        scaling_factor=0.41407,
    ),
    "1.5-f32c128": _dc_ae_1_5(128, 6),
    "1.5-f64c128": _dc_ae_1_5(128, 7),
    "tiny": DCAEConfig(
        latent_channels=8,
        widths=(16, 32, 64),
        encoder_depths=(0, 1, 1),
        decoder_depths=(0, 1, 1),
        blocks=("res", "res", "attention"),
        decoder_norms=("batch", "batch", "rms"),
    ),
}
"""Configurations by name. The scaling factors belong to the weights that the authors trained on ImageNet, SANA's to
those that were trained on its own mixture."""


def dc_ae_config(preset: str, **changes: Any) -> DCAEConfig:
    """A named configuration, with fields changed: `dc_ae_config("f32c32", in_channels=1)`.

    Args:
        preset: a key of `DCAE_PRESETS`.
        **changes: fields of `DCAEConfig`.

    Raises:
        ValueError: there is no such preset.
    """
    if preset not in DCAE_PRESETS:
        raise ValueError(f"There is no DC-AE called {preset!r}; expected one of {', '.join(DCAE_PRESETS)}.")
    return replace(DCAE_PRESETS[preset], **changes)
