"""An objective's pictures as one labelled PNG, its films as one GIF: what the model saw, what was hidden, what it made
of it.

In: name -> uint8 [B, C, H, W] (B samples, C channels, H x W pixels), or [B, T, C, H, W] of T frames. Out: a strip with
one row per name, one column per sample; a film is a strip that moves. The label of `oracle_denormalised` says what it
is: patches that were predicted normalised are shown with the mean and deviation of the true patch, which the model does
not know. Without that label the picture looks better than the model is.
"""

import io
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data_pipes.store.files import write_atomically
from pretrain.report.embedded import FRAME_MS, animation

LABELS = {
    "input": "input",
    "masked": "masked: what the encoder sees",
    "prediction": "prediction",
    "oracle_denormalised": (
        "oracle-denormalised: with the true mean and deviation of each patch, which the model does not know"
    ),
}
"""Name of a picture -> what stands above its row; other names stand for themselves."""
MIN_TILE_PIXELS = 96
"""Images with a shorter side are enlarged by a whole factor, so that their pixels stay visible."""
PADDING_PIXELS = 2
"""Between images."""
LABEL_PIXELS = 18
"""Height of a row's label."""
LABEL_FONT_PIXELS = 12
"""Height of its letters."""
MIN_WIDTH_PIXELS = 620
"""Of a strip; the longest label fits."""


def picture_strip(pictures: Mapping[str, Tensor], max_samples: int = 8) -> Image.Image:
    """Tiles pictures into one RGB image: a labelled row per name in the given order, the same samples in every row.

    One channel is shown grey, three as RGB; of two the first is shown and of more than three the first three, and the
    label says so.

    Args:
        pictures: name -> uint8 [B, C, H, W]; names share B, sizes and channels may differ.
        max_samples: the first of the B that are shown.

    Raises:
        ValueError: there is nothing to show, or a tensor has another shape or dtype.
    """
    if not pictures:
        raise ValueError("no pictures: expected at least one uint8 tensor [B, C, H, W]")
    rows = [(_label(name, images), _tile_row(name, images, max_samples)) for name, images in pictures.items()]
    width = max(MIN_WIDTH_PIXELS, *(row.width for _, row in rows))
    strip = Image.new("RGB", (width, sum(LABEL_PIXELS + row.height for _, row in rows)), "white")
    draw, font, top = ImageDraw.Draw(strip), ImageFont.load_default(size=LABEL_FONT_PIXELS), 0
    for label, row in rows:
        draw.text((PADDING_PIXELS, top + 2), label, fill="black", font=font)
        strip.paste(row, (0, top + LABEL_PIXELS))
        top += LABEL_PIXELS + row.height
    return strip


def save_pictures(pictures: Mapping[str, Tensor], path: Path, max_samples: int = 8) -> Path:
    """Writes a `picture_strip` as a PNG, complete or not at all.

    Args:
        pictures: name -> uint8 [B, C, H, W].
        path: of the file.
        max_samples: the first of the B that are shown.

    Returns:
        `path`.

    Raises:
        ValueError: as `picture_strip`.
    """
    buffer = io.BytesIO()
    picture_strip(pictures, max_samples).save(buffer, format="PNG", optimize=True)
    write_atomically(path, buffer.getvalue())
    return path


def save_films(films: Mapping[str, Tensor], path: Path, max_samples: int = 4) -> Path:
    """Writes films as an endless GIF whose frames are `picture_strip`s, complete or not at all.

    A frame that equals the one before is not stored again, but shown for twice the time.

    Args:
        films: name -> uint8 [B, T, C, H, W]; names share B and T.
        path: of the file.
        max_samples: the first of the B that are shown.

    Returns:
        `path`.

    Raises:
        ValueError: a tensor is no film, or films differ in length.
    """
    lengths = {name: film.shape[1] for name, film in films.items() if film.ndim == 5}
    if len(lengths) < len(films) or len(set(lengths.values())) != 1:
        shapes = ", ".join(f"{name} {list(film.shape)}" for name, film in films.items()) or "none"
        raise ValueError(f"expected films [B, T, C, H, W] of one length T, found {shapes}")
    frames = [
        picture_strip({name: film[:, time] for name, film in films.items()}, max_samples)
        for time in range(next(iter(lengths.values())))
    ]
    write_atomically(path, animation(frames, "GIF", [FRAME_MS] * len(frames)))
    return path


def _label(name: str, images: Tensor) -> str:
    """What stands above a row."""
    label = LABELS.get(name, name.replace("_", " "))
    if images.ndim == 4 and images.shape[1] not in (1, 3):
        shown = "channel 0" if images.shape[1] == 2 else "channels 0-2"
        label += f" ({shown} of {images.shape[1]})"
    return label


def _tile_row(name: str, images: Tensor, max_samples: int) -> Image.Image:
    """One row of at most `max_samples` images, of uint8 [B, C, H, W].

    Raises:
        ValueError: the tensor has another shape or dtype, or is empty.
    """
    if images.ndim != 4 or images.dtype != torch.uint8 or 0 in images.shape:
        raise ValueError(
            f"picture {name!r}: expected a non-empty uint8 tensor [B, C, H, W], "
            f"found {images.dtype} {list(images.shape)}"
        )
    from torchvision.utils import make_grid

    images = images[:max_samples].cpu()
    images = images[:, :3] if images.shape[1] >= 3 else images[:, :1]
    factor = -(-MIN_TILE_PIXELS // min(images.shape[-2:]))
    images = images.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)
    grid = make_grid(images, nrow=len(images), padding=PADDING_PIXELS, pad_value=255)
    return Image.fromarray(grid.permute(1, 2, 0).contiguous().numpy())
