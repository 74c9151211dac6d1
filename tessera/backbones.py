"""A trained encoder as a module: pictures of any size in, features out.

Legend: B batch, C channels, T frames, H/W pixels, N tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipes.transforms.image import EvalTransform
from pretrain.evaluation.encoder.views import make_prepare, view_ratio
from pretrain.weights.backbone import Backbone
from pretrain.weights.backbone import load_backbone as load
from tessera.pictures import Pictures, as_list


@dataclass(frozen=True)
class Features:
    """What an encoder sees in pictures, after its final norm; float32, on the encoder's device."""

    summary: Tensor
    """[B, D]: the class token, or the mean of the tokens where the encoder has none."""
    average: Tensor
    """[B, D]: the mean of the tokens."""
    tokens: Tensor
    """[B, N, D]: one per patch, row by row (of clips: frames first)."""


class FeatureExtractor(nn.Module):
    """An encoder with the preprocessing that it was trained with."""

    def __init__(self, source: Backbone) -> None:
        """Takes an encoder and its statistics.

        Args:
            source: with where it is from, its step and its digest.
        """
        super().__init__()
        self.model: nn.Module = source.model
        self.source = source
        self._normalise = make_prepare(source, "all")

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width, in pixels, of what the encoder sees."""
        return self.source.interface.image_size

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def preprocess(self, pictures: Pictures) -> Tensor:
        """What evaluation does to a picture: the short side is resized, the centre cut out, the pixels normalised. A
        picture of the encoder's size is left whole.

        Args:
            pictures: uint8 or uint16, of any size, in any form of `tessera.pictures.Pictures`. For an encoder of clips
                a tensor [B, C, T, H, W] of its own size.

        Returns:
            float32 [B, C, H, W] or [B, C, T, H, W], on the encoder's device.

        Raises:
            ValueError: another form, type or number of channels.
        """
        interface = self.source.interface
        if interface.num_frames is not None:
            if not isinstance(pictures, Tensor) or tuple(pictures.shape[1:]) != interface.input_shape:
                raise ValueError(
                    f"this encoder takes clips; expected a tensor [B, {', '.join(map(str, interface.input_shape))}]"
                )
            return self._normalise(pictures[:, None].to(self.device))
        short_side = round(max(self.image_size) * view_ratio(self.image_size))
        transform = EvalTransform(self.image_size, short_side)
        views = [transform(picture) for picture in as_list(pictures, interface.in_channels)]
        return self._normalise(torch.stack(views).to(self.device))

    @torch.no_grad()
    def features(self, pictures: Pictures) -> Features:
        """The last block's features; no gradients. Pictures as for `preprocess`."""
        summary, tokens = self._last(self.preprocess(pictures))
        return Features(summary.float(), tokens.float().mean(dim=1), tokens.float())

    def forward(self, inputs: Tensor) -> Tensor:
        """Preprocessed inputs to the summary [B, D], with gradients where they are wanted."""
        return self._last(inputs)[0]

    def _last(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The summary and the tokens of the last block."""
        features: Any = self.model.features(inputs, 1)  # type: ignore[operator]
        summary, tokens = features[-1]
        return summary, tokens


def load_backbone(
    where: str | Path,
    *,
    ema: bool = False,
    untrained: bool = False,
    architecture: str | None = None,
    device: str | torch.device = "cpu",
) -> FeatureExtractor:
    """An encoder in evaluation mode, with its preprocessing.

    Args:
        where: a run (its newest complete checkpoint), a checkpoint, an exported folder, or a weights file.
        ema: the moving average of the weights; only checkpoints have one.
        untrained: the weights of step 0 instead, from the run's own seed: the baseline of every comparison.
        architecture: timm name or size; required for a weights file, refused otherwise.
        device: where it computes.

    Raises:
        FileNotFoundError: nothing at `where`.
        ValueError: no such model there, a damaged checkpoint, or an option that cannot apply.
    """
    source = load(where, ema=ema, untrained=untrained, architecture=architecture)
    return FeatureExtractor(source).eval().to(device)
