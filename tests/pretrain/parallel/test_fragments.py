"""Ranges of flattened tensors as DCP tensors: they cover every element once, and travel between any two cuts."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.state_dict_saver import save

from pretrain.checkpoint.dcp import read_into
from pretrain.checkpoint.open_folder import open_folder
from pretrain.parallel.fragments import Fragments, boxes_of_range

shapes = st.lists(st.integers(1, 5), min_size=0, max_size=5).map(tuple)


@settings(deadline=None, max_examples=200)
@given(shapes, st.data())
def test_boxes_cover_the_range_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    whole = torch.arange(math.prod(shape)).view(shape)
    start = data.draw(st.integers(0, whole.numel()))
    stop = data.draw(st.integers(start, whole.numel()))
    boxes = boxes_of_range(start, stop, shape)
    found = [
        whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))].flatten() for offsets, sizes in boxes
    ]
    assert torch.cat([*found, whole.flatten()[:0]]).tolist() == list(range(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


def _cut(whole: torch.Tensor, *at: int) -> list[Fragments]:
    bounds = [0, *at, whole.numel()]
    flat = whole.flatten()
    return [Fragments(flat[a:b].clone(), a, whole.shape) for a, b in itertools.pairwise(bounds)]


def _save(values: dict[str, Any], folder: Path) -> None:
    save(values, checkpoint_id=folder, no_dist=True)


def test_a_share_is_saved_under_its_place_in_the_whole(tmp_path: Path) -> None:
    """One process cannot play two ranks, so each half goes into a checkpoint of its own; two ranks: test_deepspeed."""
    whole = torch.randn(3, 5, 2)
    shares = _cut(whole, 13)
    for index, share in enumerate(shares):
        items = share.__create_write_items__("w", share)
        assert {item.tensor_data.size for item in items if item.tensor_data} == {whole.shape}
        for item in items:
            assert item.tensor_data is not None
            box = item.tensor_data.chunk
            place = tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))
            assert torch.equal(share.__get_tensor_shard__(item.index), whole[place]), index


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("at", [0, 1, 7, 10, 13, 29, 30])
def test_any_cut_reads_a_whole_tensor(tmp_path: Path, at: int) -> None:
    whole = torch.randn(3, 5, 2)
    _save({"w": whole, "scalar": torch.tensor(2.5)}, tmp_path)
    for share in _cut(whole, at):
        empty = Fragments(torch.zeros_like(share.piece), share.start, share.shape)
        scalar = Fragments(torch.zeros(1), 0, ())
        read_into(open_folder(tmp_path), {"w": empty, "scalar": scalar}, None)
        assert torch.equal(empty.piece, share.piece)
        assert scalar.piece.item() == 2.5


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_whole_share_reads_as_an_ordinary_tensor(tmp_path: Path) -> None:
    whole = torch.randn(4, 3)
    _save({"w": _cut(whole)[0], "scalar": Fragments(torch.ones(1), 0, ())}, tmp_path)
    read = {"w": torch.zeros(4, 3), "scalar": torch.zeros(())}
    read_into(open_folder(tmp_path), read, None)
    assert torch.equal(read["w"], whole)
    assert read["scalar"].item() == 1.0


def test_it_is_staged_like_a_tensor() -> None:
    whole = torch.randn(4, 3)
    live = _cut(whole, 5)[1]
    staged = live.detach().clone()
    assert isinstance(staged, Fragments)
    live.piece.zero_()
    assert torch.equal(staged.piece, whole.flatten()[5:])
    assert (staged.shape, staged.dtype, staged.device.type, staged.start) == ((4, 3), torch.float32, "cpu", 5)
    assert staged.to(torch.float64).dtype == torch.float64
    live.copy_(staged)
    assert torch.equal(live.piece, staged.piece)


def test_what_needs_the_other_elements_is_refused() -> None:
    first, second = _cut(torch.randn(4, 3), 5)
    with pytest.raises(NotImplementedError, match="gather them first"):
        first.sum()
    with pytest.raises(ValueError, match="different elements"):
        first.copy_(second)
    with pytest.raises(ValueError, match="different elements"):
        first.copy_(torch.zeros(4, 3))
