"""Which views of the latent a tokenizer is trained with: channel prefixes (DC-AE 1.5), scaled and turned (EQ-VAE).

Enters: the step and the samples' global positions. Leaves: a `LatentView` for the decoder. Everything is a hash of
(seed, step) or (seed, position), so that a resume, the number of ranks and micro-batches change nothing.
Legend: B batch, L latent channels, H/W pixels, h/w latent pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.models.masking import position_noise
from pretrain.models.tokenizers.latent_view import LatentView

_PREFIX_SEED = 0x51CE
"""Keeps the draws of prefixes apart from those of transforms and of a gaussian's noise, which uses the seed itself."""
_EQUIVARIANCE_SEED = 0xE9
"""Keeps the draws of transforms apart from those of prefixes and of a gaussian's noise."""


@dataclass(frozen=True)
class ChannelPrefixConfig:
    """DC-AE 1.5's structured latent (arXiv 2508.00413, section 3.2): decoding from the first channels alone is trained.

    Each sample draws its own count, where the paper draws one per step: a step then holds a mixture of counts, the
    expected gradient is the same, and it does not depend on how a batch is cut into ranks and micro-batches.
    """

    step: int = 0
    """Latent channels from one count to the next: step, 2 step, ..., and all; 0 = always all. The paper: 16."""
    always_min_max: bool = False
    """Of every four consecutive samples, one keeps the fewest channels and one keeps all; so both are in each step
    of at least 4 samples. false: all samples draw."""
    validated: tuple[int, ...] = ()
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

    def draw(self, positions: Tensor, latent_channels: int, seed: int) -> Tensor | None:
        """How many channels each sample keeps in this step.

        Args:
            positions: int64 [B], global sample positions.
            latent_channels: channels of the latent.
            seed: of the run.

        Returns:
            int64 [B], on the same device; None where all samples keep all channels.
        """
        num_counts = len(self.counts(latent_channels))
        if not num_counts:
            return None
        number = (position_noise(positions, 1, seed ^ _PREFIX_SEED)[:, 0] * num_counts).long()
        if self.always_min_max:
            place = positions % 4
            number = torch.where(place == 0, 0, torch.where(place == 1, num_counts - 1, number))
        return ((number + 1) * self.step).clamp(max=latent_channels)


@dataclass(frozen=True)
class EquivarianceConfig:
    """EQ-VAE (arXiv 2502.09509): in some steps the latent is scaled and turned, and should decode to the image scaled
    and turned alike; all losses compare with that. One transform per step, for all ranks: its samples share one shape.
    """

    probability: float = 0.0
    """Share of the steps in which the latent is transformed; 0 = never. The paper: 0.5."""
    min_scale: float = 0.25
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

    def draw(self, step: int, latent_size: tuple[int, int], seed: int) -> LatentView:
        """The transform of an optimizer step, drawn without reading from a device.

        Args:
            step: optimizer steps done so far.
            latent_size: h, w of the latent.
            seed: of the run.
        """
        if self.probability == 0.0:
            return LatentView()
        applies, size, turns = position_noise(torch.tensor([step]), 3, seed ^ _EQUIVARIANCE_SEED)[0].tolist()
        if applies >= self.probability:
            return LatentView()
        sizes = self.sizes(latent_size)
        drawn = sizes[int(size * len(sizes))]
        return LatentView(size=None if drawn == latent_size else drawn, quarter_turns=int(turns * 4))
