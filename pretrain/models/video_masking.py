"""Which tokens of a clip the encoder does not see, and which of them the decoder predicts.

Enters: global sample positions and the number of clips of each video. Leaves: token ids. As for images, everything is a
counter-based hash of (seed, position, repeat number, token): no generator's state, the same on every device and rank.
Legend: B videos, R repeats (clips of a video), N tokens of a clip (time-major), S tokens that share their time, K kept
tokens, M predicted tokens. Clips are ordered by video, then by repeat: [B * R].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.models.mask_sizes import (
    CELL_TOKENS,
    check_running_cells,
    num_decoded,
    num_kept,
    num_tube_kept,
)
from pretrain.models.masking import position_noise

_PHASE_SEED = 0x5EED_CE11
"""Added to the seed for the phases of running cells, which must not follow from the noise of the tubes."""


class ClipMask(NamedTuple):
    """What the encoder sees of each clip, and what the decoder predicts."""

    keep_ids: Tensor
    """int64 [B * R, K], ascending: tokens that the encoder sees."""
    predict_ids: Tensor
    """int64 [B * R, M], ascending: tokens that the decoder predicts."""
    counted: Tensor
    """bool [B * R, M]: predictions that count in the loss; the encoder saw the others."""

    def hidden(self, num_tokens: int) -> Tensor:
        """The mask of all N tokens, bool [B * R, N]: True = hidden from the encoder."""
        every = torch.ones(len(self.keep_ids), num_tokens, dtype=torch.bool, device=self.keep_ids.device)
        return every.scatter(1, self.keep_ids, False)


def spacetime_masks(
    positions: Tensor, repeats: int, grid_size: tuple[int, int, int], mask_ratio: float, seed: int
) -> ClipMask:
    """MAE-ST's masks (arXiv 2205.09113): any `int(N * (1 - mask_ratio))` tokens are kept, all hidden ones predicted.

    Args:
        positions: int64 [B], global sample positions of the videos.
        repeats: R.
        grid_size: tokens along time, height and width.
        mask_ratio: share of the tokens that is hidden, in [0, 1).
        seed: any integer.

    Returns:
        The masks of all clips; every prediction counts.

    Raises:
        ValueError: the ratio is outside [0, 1), or leaves no token.
    """
    steps, rows, columns = grid_size
    noise = repeat_noise(positions, repeats, steps * rows * columns, seed)
    keep_ids, predict_ids = _split_by_noise(noise, num_kept(noise.shape[1], mask_ratio))
    return ClipMask(keep_ids, predict_ids, torch.ones_like(predict_ids, dtype=torch.bool))


def tube_masks(
    positions: Tensor, repeats: int, grid_size: tuple[int, int, int], mask_ratio: float, seed: int
) -> ClipMask:
    """VideoMAE's masks (arXiv 2203.12602): the same places are hidden at all times, all hidden tokens are predicted.

    Args:
        positions: int64 [B], global sample positions of the videos.
        repeats: R.
        grid_size: tokens along time, height and width.
        mask_ratio: share of the places that is hidden, in [0, 1); see `num_tube_kept`.
        seed: any integer.

    Returns:
        The masks of all clips; every prediction counts.

    Raises:
        ValueError: the ratio is outside [0, 1).
    """
    steps, rows, columns = grid_size
    noise = repeat_noise(positions, repeats, rows * columns, seed)
    kept, hidden = _split_by_noise(noise, num_tube_kept(rows * columns, mask_ratio))
    keep_ids, predict_ids = (_at_all_times(places, steps, rows * columns) for places in (kept, hidden))
    return ClipMask(keep_ids, predict_ids, torch.ones_like(predict_ids, dtype=torch.bool))


def dual_masks(
    positions: Tensor,
    repeats: int,
    grid_size: tuple[int, int, int],
    mask_ratio: float,
    decoder_mask_ratio: float,
    seed: int,
) -> ClipMask:
    """VideoMAE v2's masks (arXiv 2303.16727): tubes for the encoder, running cells for the decoder.

    The decoder predicts the tokens that its own mask leaves; those among them that the encoder saw do not count.

    Args:
        positions: int64 [B], global sample positions of the videos.
        repeats: R.
        grid_size: tokens along time, height and width.
        mask_ratio: share of the places that is hidden from the encoder, in [0, 1).
        decoder_mask_ratio: share of the tokens that the decoder leaves out; 0.25, 0.5 or 0.75.
        seed: any integer.

    Returns:
        The masks of all clips.

    Raises:
        ValueError: a ratio is not one of these, or 2 x 2 cells do not fill the grid.
    """
    tubes = tube_masks(positions, repeats, grid_size, mask_ratio, seed)
    cells = running_cells(grid_size, decoder_mask_ratio, positions.device)  # [4, N]
    ids_by_phase = cells.to(torch.uint8).argsort(dim=1, stable=True)[:, : num_decoded(grid_size, decoder_mask_ratio)]
    phase = (repeat_noise(positions, repeats, 1, seed + _PHASE_SEED)[:, 0] * CELL_TOKENS).to(torch.int64)
    predict_ids = ids_by_phase[phase]
    return ClipMask(tubes.keep_ids, predict_ids, tubes.hidden(cells.shape[1]).gather(1, predict_ids))


def running_cells(
    grid_size: tuple[int, int, int], decoder_mask_ratio: float, device: torch.device | None = None
) -> Tensor:
    """The decoder's masks of VideoMAE v2 (arXiv 2303.16727), one for each phase of a cell.

    In a cell of 2 x 2 tokens, numbered row by row, `int(4 * ratio)` neighbouring numbers are masked; with each step in
    time they move by one, so that over four steps every place is masked equally often. Phases differ in the first
    step.

    Args:
        grid_size: tokens along time, height and width.
        decoder_mask_ratio: share of the tokens that is masked; 0.25, 0.5 or 0.75.
        device: of the result; None is the default device.

    Returns:
        bool [4, N]: True = not predicted.

    Raises:
        ValueError: another ratio, or a grid that 2 x 2 cells do not fill.
    """
    steps, rows, columns = grid_size
    masked = check_running_cells(grid_size, decoder_mask_ratio)
    phase, step, row, column = torch.meshgrid(
        *(torch.arange(count, device=device) for count in (CELL_TOKENS, steps, rows, columns)), indexing="ij"
    )
    number = row % 2 * 2 + column % 2
    mask: Tensor = (number + phase + step + 1) % CELL_TOKENS < masked
    return mask.flatten(1)


def repeat_noise(positions: Tensor, repeats: int, num_tokens: int, seed: int) -> Tensor:
    """Uniform noise for each token of each clip, a pure function of (seed, position, repeat, token).

    Args:
        positions: int64 [B], global sample positions of the videos.
        repeats: R.
        num_tokens: of a clip.
        seed: any integer.

    Returns:
        float32 [B * R, num_tokens] in [0, 1): `position_noise` of the videos, cut into repeats.
    """
    return position_noise(positions, repeats * num_tokens, seed).view(len(positions) * repeats, num_tokens)


def _split_by_noise(noise: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Ids of the `kept` least and of the other values in each row of [B, N], both ascending."""
    order = noise.argsort(dim=1, stable=True)
    return order[:, :kept].sort(dim=1).values, order[:, kept:].sort(dim=1).values


def _at_all_times(places: Tensor, steps: int, tokens_per_step: int) -> Tensor:
    """Token ids of the places [B, P] at all times: [B, steps * P]."""
    starts = torch.arange(steps, device=places.device) * tokens_per_step
    return (starts[:, None] + places[:, None]).flatten(1)
