"""What goes into an encoder and what comes out of it, whoever wrote it.

Enters: an encoder of this package, or one of others with the objective that trained it. Leaves: sizes. It exists so
that evaluation and export ask one place for them, and an encoder of others needs no configuration of a certain form.

Legend: B batch, C channels, T frames, H/W pixels, N tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pretrain.models.video_vit import VideoViT
from pretrain.models.vit import ViT

if TYPE_CHECKING:
    from pretrain.objectives.base import Objective


@dataclass(frozen=True)
class Interface:
    """The sizes of an encoder's input and output."""

    image_size: tuple[int, int]
    """H and W, in pixels"""
    in_channels: int
    """C"""
    num_frames: int | None
    """T of a clip; None: it takes images"""
    width: int
    """D"""
    num_tokens: int
    """N, without a class token"""
    depth: int | None
    """how many last blocks it gives features of; None: only the encoder knows"""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(C, H, W), or (C, T, H, W) of clips."""
        frames = () if self.num_frames is None else (self.num_frames,)
        return (self.in_channels, *frames, *self.image_size)


def encoder_interface(model: ViT | VideoViT) -> Interface:
    """That of an encoder of this package."""
    if isinstance(model, VideoViT):
        clip = model.config
        return Interface(clip.image_size, clip.in_channels, clip.num_frames, clip.width, clip.num_tokens, clip.depth)
    config = model.config
    return Interface(config.image_size, config.in_channels, None, config.width, config.num_patches, config.depth)


@torch.no_grad()
def probed_interface(model: nn.Module, objective: Objective, what: str) -> Interface:
    """That of an encoder of others, by its objective and one forward pass.

    Args:
        model: with a method `features`, see `Objective.build_backbone`.
        objective: that trained it; may be on the meta device.
        what: begins a message.

    Raises:
        ValueError: `features` does not give what `Objective.build_backbone` says.
    """
    (height, width), channels, frames = objective.image_size, objective.in_channels, objective.num_frames
    shape = (1, channels, height, width) if frames is None else (1, channels, frames, height, width)
    features: Any = model.features(torch.zeros(shape), 1)  # type: ignore[operator]
    found = _shapes(features)
    fits = len(found) == 1 and [len(part) for part in found[0]] == [2, 3] and found[0][0][1] == found[0][1][2]
    if not fits:
        raise ValueError(
            f"{what}: {type(model).__name__}.features(inputs, 1) gives {found or type(features).__name__} for inputs "
            f"{list(shape)}; expected a list of one pair, a summary [1, D] and tokens [1, N, D]"
        )
    _, num_tokens, features_width = found[0][1]
    return Interface((height, width), channels, frames, features_width, num_tokens, depth=None)


def _shapes(features: Any) -> list[list[list[int]]]:
    """The shapes of pairs of tensors; empty where it is something else."""
    if not isinstance(features, list | tuple) or not all(isinstance(pair, list | tuple) for pair in features):
        return []
    if not all(isinstance(part, Tensor) for pair in features for part in pair):
        return []
    return [[list(part.shape) for part in pair] for pair in features]
