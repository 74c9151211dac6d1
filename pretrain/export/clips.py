"""Clips that exports of video models are compared on: frames of the usual sizes, which have to be resized.

Enters: the channels and the number of frames of a model. Leaves: files whose picture is larger than the frames, which
are windows that move over it; and what our evaluation makes of them.

Legend: B batch, C channels, T frames, H/W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipes.sequential.clips import cut_crops
from pretrain.export.pictures import PictureFile, detail, encode
from pretrain.models.normalise import Normalise
from pretrain.objectives.clip_target import normalise_clips
from pretrain.weights.backbone import Backbone

FRAME_SIZES = ((320, 240), (426, 240), (352, 288), (454, 256))
"""Width and height of frames whose pixels are compared."""
CLIP_SIZES = ((340, 256), (240, 426), (288, 288))
"""Width and height of frames whose features are compared, too: landscape, portrait and square."""
_STEP = 3
"""Pixels by which each frame's window lies further right and down."""
_ROOM = 32 * _STEP
"""Pixels by which a file's picture is wider and higher than its frames."""


def frame_files(channels: int, sizes: Sequence[tuple[int, int]] = FRAME_SIZES) -> list[PictureFile]:
    """Files of clips of these widths and heights, for `file_frames`."""
    return [
        PictureFile(f"clip of {width} x {height}", encode(detail(height + _ROOM, width + _ROOM, channels), 8), channels)
        for width, height in sizes
    ]


def file_frames(picture: NDArray[Any], num_frames: int) -> NDArray[np.uint8]:
    """The frames of a file's picture [H, W] or [H, W, C]: uint8 [T, H, W, C], windows that go back and forth."""
    stored = picture.reshape(*picture.shape[:2], -1)
    height, width = stored.shape[0] - _ROOM, stored.shape[1] - _ROOM
    places = [_STEP * min(number % 64, 64 - number % 64) for number in range(num_frames)]
    return np.stack([stored[place : place + height, place : place + width] for place in places])


def our_clips(source: Backbone, num_frames: int) -> Callable[[PictureFile], Tensor]:
    """A file to the model's input [1, C, T, H, W], as our evaluation makes it of a video's frames."""
    normalise = Normalise(source.mean, source.std)

    def prepare(file: PictureFile) -> Tensor:
        frames = file_frames(file.decoded().permute(1, 2, 0).numpy(), num_frames)
        stored = torch.from_numpy(frames).permute(0, 3, 1, 2)
        (crop,) = cut_crops(stored, source.interface.image_size, None, 1)
        return normalise_clips(normalise, crop.transpose(0, 1)[None])

    return prepare
