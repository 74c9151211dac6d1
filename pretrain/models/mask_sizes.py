"""How many tokens masks keep, hide and predict. The masks themselves are in `masking.py` and `video_masking.py`."""

from __future__ import annotations


def num_kept(num_tokens: int, mask_ratio: float) -> int:
    """How many tokens the encoder sees: `int(num_tokens * (1 - mask_ratio))`, as in He et al. (arXiv 2111.06377).

    Raises:
        ValueError: `mask_ratio` is outside [0, 1), or leaves no token.
    """
    if not 0.0 <= mask_ratio < 1.0:
        raise ValueError(f"mask_ratio is {mask_ratio}; expected a share of hidden tokens in [0, 1).")
    kept = int(num_tokens * (1.0 - mask_ratio))
    if kept < 1:
        raise ValueError(
            f"mask_ratio {mask_ratio} leaves int({num_tokens} * (1 - {mask_ratio})) = 0 tokens to the encoder; "
            f"expected at least 1. Lower mask_ratio, or use larger images or smaller patches."
        )
    return kept


CELL_TOKENS = 4
"""Tokens of a running cell, 2 x 2."""


def num_masked_of_cell(decoder_mask_ratio: float) -> int:
    """Masked tokens of a running cell: `int(4 * ratio)`, 1 to 3.

    Raises:
        ValueError: another ratio than 0.25, 0.5 and 0.75.
    """
    masked = CELL_TOKENS * decoder_mask_ratio
    if masked not in (1, 2, 3):
        raise ValueError(
            f"decoder_mask_ratio is {decoder_mask_ratio}; expected 0.25, 0.5 or 0.75: a cell has {CELL_TOKENS} tokens."
        )
    return int(masked)


def num_decoded(grid_size: tuple[int, int, int], decoder_mask_ratio: float) -> int:
    """M of dual masks: the tokens that running cells leave."""
    steps, rows, columns = grid_size
    return steps * rows * columns // CELL_TOKENS * (CELL_TOKENS - num_masked_of_cell(decoder_mask_ratio))


def num_tube_kept(tokens_per_step: int, mask_ratio: float) -> int:
    """Places that a tube mask keeps: S - int(S * mask_ratio), as in VideoMAE (20 of 196 at 0.9, where MAE's rule for
    images, int(S * 0.1), would keep 19).

    Raises:
        ValueError: `mask_ratio` is outside [0, 1).
    """
    if not 0.0 <= mask_ratio < 1.0:
        raise ValueError(f"mask_ratio is {mask_ratio}; expected a share of hidden tokens in [0, 1).")
    return tokens_per_step - int(tokens_per_step * mask_ratio)


def num_tube_tokens_kept(grid_size: tuple[int, int, int], mask_ratio: float) -> int:
    """K of tube masks: the places of `num_tube_kept` at all times."""
    steps, rows, columns = grid_size
    return steps * num_tube_kept(rows * columns, mask_ratio)


def check_running_cells(grid_size: tuple[int, int, int], decoder_mask_ratio: float) -> int:
    """Checks that running cells fill a grid; returns the number of masked tokens in each cell.

    Args:
        grid_size: tokens along time, height and width.
        decoder_mask_ratio: share of the tokens that the cells mask.

    Raises:
        ValueError: another ratio than 0.25, 0.5 and 0.75, or a grid that 2 x 2 cells do not fill.
    """
    _, rows, columns = grid_size
    masked = num_masked_of_cell(decoder_mask_ratio)
    if rows % 2 or columns % 2:
        raise ValueError(
            f"The grid has {rows} x {columns} tokens; running cells are 2 x 2 and need even numbers. Choose an image "
            "size that is an even multiple of the patch size, or decoder_mask_ratio 0 by way of video_mae."
        )
    return masked
