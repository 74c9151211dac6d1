"""Masks of clips: against loops, against the definition of running cells taken literally, and their independence."""

from __future__ import annotations

import pytest
import torch

from pretrain.models.mask_sizes import num_decoded, num_tube_kept
from pretrain.models.masking import position_noise
from pretrain.models.video_masking import ClipMask, dual_masks, repeat_noise, running_cells, spacetime_masks, tube_masks

GRID = (8, 14, 14)
POSITIONS = torch.tensor([3, 0, 2**40, 17])


def literal_cells(phase: int, steps: int, rows: int, columns: int, masked: int) -> list[list[list[bool]]]:
    """VideoMAE v2's running cells, one token at a time: a ring of four, `masked` of them set, moves by one per step."""
    ring = [True] * masked + [False] * (4 - masked)
    pointer = phase
    steps_of_mask = []
    for _ in range(steps):
        pointer += 1
        cell = [ring[(number + pointer) % 4] for number in range(4)]
        steps_of_mask.append([[cell[2 * (row % 2) + column % 2] for column in range(columns)] for row in range(rows)])
    return steps_of_mask


@pytest.mark.parametrize(("ratio", "masked"), [(0.25, 1), (0.5, 2), (0.75, 3)])
@pytest.mark.parametrize("grid", [(8, 4, 6), (3, 2, 2)])
def test_running_cells_are_the_literal_ones(ratio: float, masked: int, grid: tuple[int, int, int]) -> None:
    cells = running_cells(grid, ratio).unflatten(1, grid)
    for phase in range(4):
        assert cells[phase].tolist() == literal_cells(phase, *grid, masked)
    assert (~cells[0]).sum() == num_decoded(grid, ratio)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_running_cells_cover_each_place_evenly(ratio: float) -> None:
    cells = running_cells(GRID, ratio).unflatten(1, GRID).double()
    assert (cells.mean(dim=1) == ratio).all()  # over eight steps, in every phase
    assert (cells.mean(dim=(2, 3)) == ratio).all()  # over the places, in every step
    assert (cells.mean(dim=0) == ratio).all()  # over the phases, for every token
    changed = (cells[:, 1:] != cells[:, :-1]).any(dim=-1).any(dim=-1)
    assert changed.all()  # the pattern moves in every step


def test_phases_are_drawn_evenly_and_apart_from_the_tubes() -> None:
    mask = dual_masks(torch.arange(2000), 2, (2, 2, 2), 0.5, 0.5, seed=0)
    ids_by_phase = (~running_cells((2, 2, 2), 0.5)).nonzero()[:, 1].view(4, 4)
    phase = (mask.predict_ids[:, None] == ids_by_phase).all(-1).float().argmax(1)
    assert (torch.bincount(phase, minlength=4) / 4000 - 0.25).abs().max() < 0.03  # standard error 0.007
    tube = mask.keep_ids[:, 0] * 2 + mask.keep_ids[:, 1]
    for pattern in tube.unique():
        share = torch.bincount(phase[tube == pattern], minlength=4).float()
        assert (share / share.sum() - 0.25).abs().max() < 0.07  # standard error 0.017


def test_dual_masks_equal_a_loop() -> None:
    mask = dual_masks(POSITIONS, 2, GRID, 0.9, 0.5, seed=5)
    tubes = tube_masks(POSITIONS, 2, GRID, 0.9, seed=5)
    assert torch.equal(mask.keep_ids, tubes.keep_ids)
    cells = running_cells(GRID, 0.5)
    for clip in range(8):
        left = mask.predict_ids[clip].tolist()
        assert left in [(~cells[phase]).nonzero()[:, 0].tolist() for phase in range(4)]
        kept = set(mask.keep_ids[clip].tolist())
        assert mask.counted[clip].tolist() == [token not in kept for token in left]
        # Over eight steps each place is left four times: a clip's count does not depend on its phase.
        assert mask.counted[clip].sum() == 176 * 4


def test_tube_masks_are_constant_over_time() -> None:
    mask = tube_masks(POSITIONS, 3, GRID, 0.9, seed=5)
    hidden = mask.hidden(8 * 196).view(12, 8, 196)
    assert torch.equal(hidden, hidden[:, :1].expand_as(hidden))
    assert (hidden[:, 0].sum(1) == 176).all()
    noise = repeat_noise(POSITIONS, 3, 196, 5)
    for clip in range(12):
        places = sorted(range(196), key=lambda place: noise[clip, place].item())[:20]
        assert mask.keep_ids[clip].tolist() == [196 * step + p for step in range(8) for p in sorted(places)]


def test_spacetime_masks_equal_a_loop() -> None:
    mask = spacetime_masks(POSITIONS, 2, (3, 4, 5), 0.9, seed=1)
    noise = repeat_noise(POSITIONS, 2, 60, 1)
    for clip in range(8):
        order = sorted(range(60), key=lambda token: noise[clip, token].item())
        assert mask.keep_ids[clip].tolist() == sorted(order[:5])  # int(60 * (1 - 0.9)) is 5 in floating point
        assert mask.predict_ids[clip].tolist() == sorted(order[5:])
    hidden = spacetime_masks(POSITIONS, 1, GRID, 0.9, seed=1).hidden(8 * 196).view(4, 8, 196)
    assert (hidden != hidden[:, :1]).any()


@pytest.mark.parametrize("make", [spacetime_masks, tube_masks], ids=["spacetime", "tube"])
def test_kept_and_predicted_tokens_are_a_partition(make: object) -> None:
    mask: ClipMask = make(POSITIONS, 2, (4, 4, 6), 0.75, 9)
    every = torch.cat((mask.keep_ids, mask.predict_ids), dim=1).sort(dim=1).values
    assert torch.equal(every, torch.arange(96).expand(8, -1))
    assert mask.counted.all()
    assert torch.equal(mask.hidden(96).sum(1), torch.full((8,), 72))


@pytest.mark.parametrize(
    "make",
    [
        lambda positions, repeats, seed: spacetime_masks(positions, repeats, GRID, 0.9, seed),
        lambda positions, repeats, seed: tube_masks(positions, repeats, GRID, 0.9, seed),
        lambda positions, repeats, seed: dual_masks(positions, repeats, GRID, 0.9, 0.5, seed),
    ],
    ids=["spacetime", "tube", "dual"],
)
def test_masks_are_a_function_of_seed_position_and_repeat(make: object) -> None:
    together = make(POSITIONS, 4, 7)
    for row, position in enumerate(POSITIONS):
        alone = make(position[None], 4, 7)
        fewer = make(position[None], 2, 7)  # the first repeats do not depend on how many follow
        for whole, one, first in zip(together, alone, fewer, strict=True):
            assert torch.equal(whole[4 * row : 4 * row + 4], one)
            assert torch.equal(one[:2], first)
    assert len({tuple(ids.tolist()) for ids in together.keep_ids}) == 16  # repeats of a video differ
    assert not torch.equal(make(POSITIONS, 4, 8).keep_ids, together.keep_ids)


def test_one_repeat_has_the_noise_of_images() -> None:
    assert torch.equal(repeat_noise(POSITIONS, 1, 49, 3), position_noise(POSITIONS, 49, 3))


def test_masks_are_pinned() -> None:
    # Masks of a resumed run must be those of the interrupted one, also across releases.
    mask = dual_masks(torch.tensor([123456789012]), 2, (2, 2, 4), 0.75, 0.5, seed=7)
    assert mask.keep_ids.tolist() == [[6, 7, 14, 15], [1, 2, 9, 10]]
    assert mask.predict_ids.tolist() == [[0, 1, 2, 3, 8, 10, 13, 15], [0, 1, 2, 3, 8, 10, 13, 15]]


def test_tubes_keep_what_the_paper_keeps() -> None:
    assert 8 * num_tube_kept(196, 0.9) == 160
    assert num_tube_kept(196, 0.0) == 196


@pytest.mark.parametrize(
    ("ratio", "grid", "message"),
    [
        (0.0, (2, 4, 4), "expected 0.25, 0.5 or 0.75"),
        (0.6, (2, 4, 4), "expected 0.25, 0.5 or 0.75"),
        (0.5, (2, 3, 4), "3 x 4 tokens; running cells are 2 x 2"),
    ],
)
def test_impossible_cells_are_refused(ratio: float, grid: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        running_cells(grid, ratio)


def test_impossible_ratios_are_refused() -> None:
    with pytest.raises(ValueError, match="in \\[0, 1\\)"):
        tube_masks(POSITIONS, 1, GRID, 1.0, 0)
    with pytest.raises(ValueError, match=r"leaves .* 0 tokens"):
        spacetime_masks(POSITIONS, 1, (1, 2, 2), 0.9, 0)
