"""Pictures in whatever form a user has them, as the stored tensors that everything here takes.

Legend: B batch, C channels, H/W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from data_pipes.decode.picture import decode_image

Picture = Tensor | Image.Image | NDArray[Any] | Path | str | bytes
"""A tensor [C, H, W], a PIL image, an array [H, W] or [H, W, C], a file's path, or a file's bytes."""
Pictures = Tensor | Picture | Sequence[Picture]
"""One picture or several, or a tensor [B, C, H, W]."""
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def as_list(pictures: Pictures, channels: int) -> list[Tensor]:
    """Each picture, as stored.

    Args:
        pictures: of any size, uint8 or uint16.
        channels: C, to which files and PIL images are converted.

    Returns:
        uint8 or uint16 [C, H, W] each.

    Raises:
        ValueError: something else, another type, or another number of channels.
    """
    if isinstance(pictures, Tensor) and pictures.ndim == 4:
        each: list[Any] = list(pictures)
    elif isinstance(pictures, Sequence) and not isinstance(pictures, str | bytes):
        each = list(pictures)
    else:
        each = [pictures]
    if not each:
        raise ValueError("there is no picture; expected at least one")
    return [_stored(picture, channels) for picture in each]


def _stored(picture: Any, channels: int) -> Tensor:
    """One picture as uint8 or uint16 [C, H, W]."""
    if isinstance(picture, str | Path):
        picture = Path(picture).read_bytes()
    if isinstance(picture, bytes):
        return decode_image(picture, channels)
    if isinstance(picture, Image.Image):
        if channels not in _MODES:
            raise ValueError(f"the model takes {channels} channels, which no PIL image has; give tensors or arrays")
        deep = picture.mode.startswith("I;16") and channels == 1
        picture = np.asarray(picture if deep else picture.convert(_MODES[channels]))
    if isinstance(picture, np.ndarray):
        array = np.array(picture[:, :, None] if picture.ndim == 2 else picture)  # a copy: torch wants it writable
        picture = torch.from_numpy(array).permute(2, 0, 1) if array.ndim == 3 else array
    if not isinstance(picture, Tensor):
        raise ValueError(f"a picture is a {type(picture).__name__}; expected one of {Picture}")
    if picture.dtype not in (torch.uint8, torch.uint16):
        raise ValueError(
            f"a picture is {picture.dtype}; expected uint8 or uint16, as stored: it is normalised here, with the "
            "run's own statistics"
        )
    if picture.ndim != 3 or picture.shape[0] != channels:
        raise ValueError(f"a picture has shape {list(picture.shape)}; expected [{channels}, height, width]")
    return picture
