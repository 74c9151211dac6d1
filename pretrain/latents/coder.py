"""A tokenizer on a device, from pictures as they are stored to latents, and back to stored pictures.

Enters: uint8 or uint16 pictures of any size. Leaves: float32 latents on the CPU, or uint8 pictures. Why it exists:
encoding a data set, decoding it, looking at reconstructions and measuring them must all do the same to a pixel:
the run's statistics, rounding, precision, and tiles for what is too large.
Legend: B batch, C image channels, L latent channels, H/W pixels, h/w latent pixels.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pretrain.models.normalise import Normalise
from pretrain.models.tokenizers.dc_ae_tiling import check_tiles, decode_tiled, encode_tiled
from pretrain.weights.tokenizer import LoadedTokenizer

Precision = Literal["fp32", "bf16"]
"""Of a forward pass."""


class PictureCoder:
    """Encodes and decodes on one device, without gradients."""

    def __init__(
        self,
        tokenizer: LoadedTokenizer,
        device: torch.device,
        *,
        precision: Precision = "fp32",
        tile: int | None = None,
    ) -> None:
        """Moves the model to the device.

        Args:
            tokenizer: the model, with the statistics of its pixels.
            device: where it runs.
            precision: of the forward passes.
            tile: pictures with a longer side go through the model in tiles of so many pixels, which overlap by a
                quarter; None: always whole.

        Raises:
            ValueError: the tile is no multiple of 4 times the model's factor.
        """
        self.config = tokenizer.model.config
        self.normalise = Normalise(tokenizer.mean, tokenizer.std)
        self.device, self.precision, self.tile = device, precision, tile
        self._model = tokenizer.model.eval().to(device)
        if tile is not None:
            if tile % 4:
                raise ValueError(f"tile is {tile} pixels; expected a multiple of {4 * self.config.factor}")
            check_tiles(tile, tile // 4, self.config.factor)

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Encodes uint8 or uint16 pictures [B, C, H, W] to unscaled latents, float32 [B, L, h, w] on the device."""
        images = self.normalise(pictures.to(self.device))
        with self._autocast():
            if self.tile is None:
                latents: Tensor = self._model.encode(images)
            else:
                latents = encode_tiled(self._model, images, self.tile, self.tile // 4)
        return latents.float()

    @torch.no_grad()
    def decode(self, latents: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Decodes latents to pictures, rounded and clipped.

        Args:
            latents: unscaled, [B, L, h, w].
            size: (height, width) of the pictures; None: h and w times the model's factor.

        Returns:
            uint8 [B, C, *size] on the device.
        """
        latents = latents.to(self.device, torch.float32)
        with self._autocast():
            if self.tile is None:
                images = self._model.decode(latents, size)
            else:
                images = decode_tiled(self._model, latents, size, self.tile, self.tile // 4)
        return self.normalise.to_uint8(images.float())

    def reconstruct(self, pictures: Tensor) -> Tensor:
        """Encodes and decodes stored pictures [B, C, H, W]; the result is uint8 of the same shape, on the device."""
        return self.decode(self.encode(pictures), (pictures.shape[2], pictures.shape[3]))

    def to_uint8(self, pictures: Tensor) -> Tensor:
        """Stored pictures as uint8 on the device, as reconstructions are compared with them."""
        on_device = pictures.to(self.device)
        return on_device if pictures.dtype == torch.uint8 else self.normalise.to_uint8(self.normalise(on_device))

    def _autocast(self) -> torch.autocast:
        """The precision of a forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")
