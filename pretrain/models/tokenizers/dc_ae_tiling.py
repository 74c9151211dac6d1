"""Encoding and decoding of pictures too large for memory, tile by tile.

Enters: a picture or a latent of any size, and a function that maps one tile. Leaves: what the function would give for
the whole. Tiles overlap, and fade into each other over the middle half of the overlap: what lies within a quarter of
the overlap from a tile's cut is never used. So a purely convolutional model gives the untiled result to rounding
wherever a quarter of the overlap covers its receptive radius. Linear attention sees the whole map, and a tile instead:
such models differ everywhere, by as much as the tile's content differs from the picture's.
Legend: B batch, C channels, H/W pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pretrain.models.tokenizers.autoencoder import Autoencoder, pad_to_multiple


@torch.no_grad()
def encode_tiled(model: Autoencoder, images: Tensor, tile: int = 1024, overlap: int = 256) -> Tensor:
    """`model.encode(images)`, tile by tile.

    Args:
        model: the autoencoder.
        images: float [B, C, H, W].
        tile: side of a tile in pixels, a multiple of the model's factor.
        overlap: of neighbouring tiles, in pixels, a multiple of the factor.

    Returns:
        [B, L, h, w], unscaled.

    Raises:
        ValueError: `tile` or `overlap` is no multiple of the factor, or tiles do not advance.
    """
    factor = model.config.factor
    check_tiles(tile, overlap, factor)
    return map_tiles(model.encode, pad_to_multiple(images, factor), tile, overlap, (1, factor))


@torch.no_grad()
def decode_tiled(
    model: Autoencoder, latent: Tensor, size: tuple[int, int] | None = None, tile: int = 1024, overlap: int = 256
) -> Tensor:
    """`model.decode(latent, size)`, tile by tile.

    Args:
        model: the autoencoder.
        latent: [B, L, h, w], unscaled.
        size: height and width to crop to, in pixels; None crops nothing.
        tile: side of a tile in pixels of the picture, a multiple of the model's factor.
        overlap: of neighbouring tiles, in pixels of the picture, a multiple of the factor.

    Returns:
        [B, C, H, W].

    Raises:
        ValueError: `tile` or `overlap` is no multiple of the factor, or tiles do not advance.
    """
    factor = model.config.factor
    check_tiles(tile, overlap, factor)
    decoded = map_tiles(model.decode, latent, tile // factor, overlap // factor, (factor, 1))
    return decoded if size is None else decoded[..., : size[0], : size[1]]


def check_tiles(tile: int, overlap: int, factor: int) -> None:
    """Checks tiles, all in pixels of the picture.

    Raises:
        ValueError: `tile` or `overlap` is no multiple of `factor`, or tiles do not advance.
    """
    if tile % factor or overlap % factor or not 0 <= overlap < tile:
        raise ValueError(
            f"tile is {tile} and overlap {overlap} pixels; expected multiples of the model's factor {factor}, with an "
            "overlap of at least 0 and less than the tile."
        )


def map_tiles(
    function: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: int, scale: tuple[int, int]
) -> Tensor:
    """Applies a function to overlapping tiles and joins the results.

    Args:
        function: maps a tile [B, C, h, w] to its result.
        x: [B, C, H, W].
        tile: side of a tile, in pixels of `x`.
        overlap: of neighbouring tiles, in pixels of `x`.
        scale: a result has scale[0] pixels for scale[1] of `x`, in each direction.

    Returns:
        The joined results in float32; where one tile covers `x`, the function's own result.
    """
    height, width = x.shape[2:]
    rows, columns = tile_starts(height, tile, overlap), tile_starts(width, tile, overlap)
    if len(rows) == len(columns) == 1:
        return function(x)
    up, down = scale
    joined: Tensor | None = None
    weights = torch.zeros(height * up // down, width * up // down, device=x.device)
    for row in rows:
        for column in columns:
            out = function(x[..., row : row + tile, column : column + tile]).float()
            if joined is None:
                joined = out.new_zeros(*out.shape[:2], *weights.shape)
            fade_row = fade(row, min(tile, height), height, overlap, scale, x.device)
            fade_column = fade(column, min(tile, width), width, overlap, scale, x.device)
            weight = fade_row[:, None] * fade_column
            top, left = row * up // down, column * up // down
            area = (..., slice(top, top + out.shape[2]), slice(left, left + out.shape[3]))
            joined[area] += out * weight
            weights[area] += weight
    assert joined is not None
    return joined / weights


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along one side; the last one ends with the side, so that all have the same size."""
    if length <= tile:
        return [0]
    return [*range(0, length - tile, tile - overlap), length - tile]


def fade(start: int, tile: int, length: int, overlap: int, scale: tuple[int, int], device: torch.device) -> Tensor:
    """Weights along one side of a tile's result: 1, falling to 0 over the middle half of the overlap at each cut.

    Args:
        start: where the tile begins, in pixels of the input.
        tile: its length, in pixels of the input.
        length: of the whole input, in pixels.
        overlap: of neighbouring tiles, in pixels of the input.
        scale: a result has scale[0] pixels for scale[1] of the input.
        device: of the weights.

    Returns:
        float32, one weight in [0, 1] per pixel of the result.
    """
    up, down = scale
    count, width = tile * up // down, max(1.0, overlap * up / down)
    centre = torch.arange(count, device=device, dtype=torch.float32) + 0.5
    weight = torch.ones(count, device=device)
    if start > 0:
        weight = torch.minimum(weight, (centre - width / 4) / (width / 2))
    if start + tile < length:
        weight = torch.minimum(weight, (count - centre - width / 4) / (width / 2))
    return weight.clamp(min=0.0) if overlap else torch.ones(count, device=device)
