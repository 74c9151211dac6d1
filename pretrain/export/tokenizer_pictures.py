"""Pictures that exports of tokenizers are compared on, from the file on.

Enters: a `LoadedTokenizer`. Leaves: files of pictures whose sides its factor divides, and what our own commands make of
them. Nothing is resized: a tokenizer takes a picture as it is.

Legend: B batch, C channels, H/W pixels.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pretrain.export.pictures import PictureFile, detail, encode
from pretrain.models.normalise import Normalise

if TYPE_CHECKING:
    from pretrain.weights.tokenizer import LoadedTokenizer

_SHORT_SIDE = 64
"""Pixels of the shorter side, at least."""


def bit_depth_of(tokenizer: LoadedTokenizer) -> int:
    """Of the pictures that it was trained on: 8 or 16; 8 where no run tells."""
    return 8 if tokenizer.config is None else tokenizer.config.data.bit_depth


def tokenizer_files(tokenizer: LoadedTokenizer, size: tuple[int, int] | None = None) -> list[PictureFile]:
    """One landscape, one portrait and one square picture.

    Args:
        tokenizer: what is exported.
        size: height and width of the only pictures that the export takes, if any: then there is one.
    """
    factor, channels = tokenizer.model.config.factor, tokenizer.model.config.in_channels
    unit = factor * math.ceil(_SHORT_SIDE / (2 * factor))
    sizes = {"landscape": (2 * unit, 3 * unit), "portrait": (3 * unit, 2 * unit), "square": (2 * unit, 2 * unit)}
    return [
        PictureFile(
            f"{name} of {width} x {height}",
            encode(detail(height, width, channels), bit_depth_of(tokenizer)),
            channels,
        )
        for name, (height, width) in (sizes if size is None else {"picture": size}).items()
    ]


def our_input(tokenizer: LoadedTokenizer, file: PictureFile) -> Tensor:
    """The model's input [1, C, H, W], as our commands and evaluations make it."""
    return Normalise(tokenizer.mean, tokenizer.std)(file.decoded()[None])


def unit_array(file: PictureFile, bit_depth: int) -> NDArray[np.float32]:
    """A file's pixels as others read them, float32 [1, H, W, C] on the scale [0, 1]."""
    stored = file.array()
    values: NDArray[np.float32] = stored.reshape(1, *stored.shape[:2], -1).astype(np.float32)
    return values / np.float32(2**bit_depth - 1)
