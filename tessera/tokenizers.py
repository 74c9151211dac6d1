"""A trained tokenizer: pictures to latents and back.

Legend: B batch, C channels, L latent channels, H/W pixels, h/w latent pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pretrain.latents.coder import PictureCoder
from pretrain.weights.tokenizer import LoadedTokenizer
from pretrain.weights.tokenizer import load_tokenizer as load
from tessera.pictures import Pictures, as_list


class Tokenizer:
    """Encodes and decodes on one device, without gradients."""

    def __init__(self, source: LoadedTokenizer, coder: PictureCoder) -> None:
        """Takes a tokenizer and what runs it.

        Args:
            source: the model, in `source.model`, with where it is from, its step and its digest.
            coder: of the same.
        """
        self.source = source
        self._coder = coder

    @property
    def factor(self) -> int:
        """Pixels of a picture per pixel of the latent, in each direction."""
        return self.source.model.config.factor

    def encode(self, pictures: Pictures) -> Tensor:
        """Encodes pictures of one size, in any form of `tessera.pictures.Pictures`, to unscaled latents.

        Returns:
            float32 [B, L, h, w], on the device.

        Raises:
            ValueError: another form, type or number of channels, or several sizes.
        """
        stored = as_list(pictures, self.source.model.config.in_channels)
        sizes = {tuple(picture.shape) for picture in stored}
        if len(sizes) > 1:
            raise ValueError(f"the pictures have the shapes {sorted(sizes)}; expected one size for all of a batch")
        return self._coder.encode(torch.stack(stored))

    def decode(self, latents: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Decodes unscaled latents.

        Args:
            latents: [B, L, h, w].
            size: (height, width) of the pictures; None: h and w times `factor`.

        Returns:
            uint8 [B, C, H, W], rounded and clipped, on the device.
        """
        return self._coder.decode(latents, size)


def load_tokenizer(
    where: str | Path,
    *,
    ema: bool | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    tile: int | None = None,
    device: str | torch.device = "cpu",
) -> Tokenizer:
    """A tokenizer in evaluation mode.

    Args:
        where: a run (its newest complete checkpoint), a checkpoint, or a folder in diffusers' layout.
        ema: whether the moving average of the weights; None: where there is one.
        precision: of the forward passes.
        tile: pictures with a longer side go through the model in tiles of so many pixels; None: always whole.
        device: where it computes.

    Raises:
        FileNotFoundError: nothing at `where`.
        ValueError: no tokenizer there, a damaged checkpoint, or no moving average.
    """
    source = load(where, ema=ema)
    return Tokenizer(source, PictureCoder(source, torch.device(device), precision=precision, tile=tile))
