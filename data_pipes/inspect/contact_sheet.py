"""A sheet of samples as the model gets them: `tessera data peek`.

Enters: a batch of the training data set. Leaves: a PNG with key and label under each picture. Why it exists: wrong
channels, crops that cut everything off, labels shifted by one and a bad shuffle are seen at a glance here, and in no
number.
Legend: B samples, C channels, H/W pixels, T frames, R clips of one video.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data_pipes.transforms.image import resize

_GAP = 8
"""Pixels between cells."""
_LINE = 15
"""Pixels of a line of text."""
_MAX_COLUMNS = 16
"""Cells in a row, at most."""
_INK, _GREY, _PAPER = (20, 20, 20), (110, 110, 110), (255, 255, 255)


def contact_sheet(title: str, images: Tensor, captions: Sequence[tuple[str, str]], cell: int = 128) -> bytes:
    """Draws the sheet.

    Args:
        title: the line above all pictures.
        images: uint8 or uint16 [B, C, H, W], or [B, R, C, T, H, W], of which the first frame is shown.
        captions: [B], two lines below each picture.
        cell: the longer side of a picture on the sheet, in pixels.

    Returns:
        The bytes of a PNG.
    """
    if images.ndim == 6:
        images = images[:, 0, :, 0]
    height, width = images.shape[2:]
    scale = cell / max(height, width)
    size = max(1, round(height * scale)), max(1, round(width * scale))
    columns = min(_MAX_COLUMNS, math.ceil(math.sqrt(len(images) * 1.3)))
    step = cell + _GAP, size[0] + 2 * _LINE + _GAP
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * step[0] + _GAP, rows * step[1] + _LINE + 2 * _GAP), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    draw.text((_GAP, _GAP // 2), _fit(draw, font, title, sheet.width - 2 * _GAP), _INK, font)
    for i, (image, lines) in enumerate(zip(images, captions, strict=True)):
        left, top = _GAP + i % columns * step[0], _LINE + _GAP + i // columns * step[1]
        sheet.paste(Image.fromarray(_displayable(image, size)), (left, top))
        for number, (line, colour) in enumerate(zip(lines, (_INK, _GREY), strict=True)):
            draw.text((left, top + size[0] + 1 + number * _LINE), _fit(draw, font, line, cell), colour, font)
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()


def _displayable(image: Tensor, size: tuple[int, int]) -> NDArray[np.uint8]:
    """A picture [C, H, W] as uint8 [*size, 3]: the first three of many channels, the upper eight of 16 bits."""
    if image.dtype == torch.uint16:
        image = (image.to(torch.int32) >> 8).to(torch.uint8)
    image = image[:3] if image.shape[0] >= 3 else image[:1].expand(3, -1, -1)
    shown: NDArray[np.uint8] = resize(image.contiguous(), size).permute(1, 2, 0).contiguous().numpy()
    return shown


def _fit(draw: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, text: str, width: int) -> str:
    """The text in at most `width` pixels; its beginning gives way to dots where it is too long, as keys differ at their
    ends.
    """
    text = "".join(c if c.isprintable() and ord(c) < 0x250 else "?" for c in text[-200:])
    shown = text
    while shown and draw.textlength(shown, font) > width:
        text = text[max(1, len(text) // 20) :]
        shown = "..." + text
    return shown
