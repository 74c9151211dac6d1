"""The preprocessing of our evaluation with Pillow and numpy alone, for targets that bring none of their own.

Enters: a decoded picture or frame. Leaves: pixels on the scale [0, 1]. Model cards print the function as it stands
here, and exports are compared through it, so that what a card tells its reader to do is what was compared.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def preprocess(
    stored: NDArray[Any],
    size: tuple[int, int],
    short_side: int | None,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
    full_scale: int = 255,
) -> NDArray[np.float32]:
    """A picture as evaluation prepares it: resized, its centre cut out.

    Args:
        stored: [H, W] or [H, W, C], as it was decoded.
        size: height and width of the result, in pixels.
        short_side: of the resized picture, in pixels; None: the smallest that `size` fits into.
        resample: of the resizing.
        full_scale: 255, or 65535 for 16 bits.

    Returns:
        float32 [C, *size] on the scale [0, 1].
    """
    height, width = stored.shape[:2]
    if short_side is not None:
        resized = max(short_side, short_side * height // width), max(short_side, short_side * width // height)
    elif size[0] * width >= size[1] * height:
        resized = size[0], size[0] * width // height
    else:
        resized = size[1] * height // width, size[1]
    top, left = (resized[0] - size[0]) // 2, (resized[1] - size[1]) // 2
    channels = []
    values = stored if stored.dtype == np.uint8 else stored.astype(np.float32)  # Pillow resizes no others well
    for channel in np.moveaxis(values.reshape(height, width, -1), 2, 0):
        picture = Image.fromarray(channel).resize((resized[1], resized[0]), resample)
        channels.append(np.asarray(picture)[top : top + size[0], left : left + size[1]])
    pixels: NDArray[np.float32] = np.clip(np.stack(channels), 0, full_scale).astype(np.float32)
    return pixels / np.float32(full_scale)


def source_code() -> str:
    """The function as a card prints it, with its imports and without its explanation."""
    source = inspect.getsource(preprocess)
    head, _, rest = source.partition('    """')
    body = rest.partition('"""\n')[2]
    code = f"import numpy as np\nfrom PIL import Image\n\n\n{head}{body}"
    return code.replace("NDArray[Any]", "np.ndarray").replace("NDArray[np.float32]", "np.ndarray")
