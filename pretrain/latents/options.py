"""What a user chooses when pictures are encoded to latents, and what latents are called in a data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from data_pipes.decode.limits import DEFAULT_MAX_PIXELS
from data_pipes.shards.members import IMAGE_EXTENSIONS
from data_pipes.transforms.image import EvalTransform
from pretrain.latents.coder import Precision

LATENT_MEMBER = "latent.safetensors"
"""Extension of the latents in a sample."""
LATENT_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Name of a stored type -> torch's."""


@dataclass(frozen=True)
class EncodeOptions:
    """What decides the bytes of latent shards, beside the model and the pictures."""

    size: tuple[int, int] | None = None
    """(height, width) of the centre crop in pixels; None: each picture as it is"""
    short_side: int | None = None
    """in pixels, of the resized picture before the crop; None: the crop's longer side"""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """of the stored latents"""
    precision: Precision = "fp32"
    """of the encoder's forward pass"""
    batch_size: int = 32
    """pictures per forward pass"""
    mirrored: bool = False
    """add the latent of the left-right mirrored picture to each sample, as the tensor `mirrored`"""
    carried: tuple[str, ...] = ("cls", "json", "txt", "caption")
    """extensions of the members that are copied from the pictures' shards"""
    skip_unreadable: bool = False
    """leave out samples without a readable picture, and list them; False: they stop the job"""
    tile: int | None = None
    """pictures with a longer side are encoded in tiles of so many pixels"""
    bit_depth: int = 8
    """8 or 16, of the pictures that the model was trained on"""
    max_pixels: int = DEFAULT_MAX_PIXELS
    """height * width of a picture, at most"""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.bit_depth not in (8, 16):
            raise ValueError(f"batch size {self.batch_size}, {self.bit_depth} bits; expected at least 1, and 8 or 16")
        if self.size is None and self.short_side is not None:
            raise ValueError("a short side without a size: give both, or neither to keep each picture as it is")
        pictures = [name for name in self.carried if name in IMAGE_EXTENSIONS or name == LATENT_MEMBER]
        if pictures:
            raise ValueError(f"{pictures[0]!r} cannot be carried over: latents take the place of pictures")
        self.transform()

    def transform(self) -> EvalTransform | None:
        """What is done to a decoded picture before it is encoded; None: nothing."""
        if self.size is None:
            return None
        return EvalTransform(self.size, max(self.size) if self.short_side is None else self.short_side)
