"""A rank's range of a flattened tensor, as a tensor of the whole shape that DCP can save and read.

ZeRO keeps each parameter's fp32 master and its moments as one range [start, start + length) of the C-contiguous
flattening, cut without regard to rows. DCP knows boxes (offsets, sizes). A range of an N-dimensional tensor is at most
2N - 1 boxes, each contiguous in the flattening, so every rank writes and reads exactly the elements that it owns, with
no collective and no copy, and a checkpoint of any ZeRO stage is one of ordinary sharded tensors: FSDP2, DDP and a
single process read it, and ZeRO reads theirs.

`Fragments` is a tensor subclass because DCP looks up shards of tensors only. It can be staged, copied and averaged;
anything that would need the other ranks' elements raises.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes, one number per dimension."""

_aten = torch.ops.aten
"""torch's operations below autograd, which a tensor subclass sees."""
_ELEMENTWISE = {
    _aten.detach.default,
    _aten.clone.default,
    _aten._to_copy.default,
    _aten.copy_.default,
    _aten.empty_like.default,
    _aten.isfinite.default,
}
"""Operations that need no other rank's elements."""


def boxes_of_range(start: int, stop: int, shape: Sequence[int]) -> list[Box]:
    """Cuts elements [start, stop) of a C-contiguous tensor of `shape` into boxes, in the order of the elements."""
    if start >= stop:
        return []
    if not shape:
        return [((), ())]
    inner_shape = tuple(shape[1:])
    row = math.prod(inner_shape)  # elements per index of the first dimension
    first, last = -(-start // row), stop // row  # whole indices are [first, last)
    if first > last:  # within one index
        return _nest(last, boxes_of_range(start - last * row, stop - last * row, inner_shape))
    boxes = _nest(first - 1, boxes_of_range(start - (first - 1) * row, row, inner_shape)) if start < first * row else []
    if first < last:
        boxes.append(((first, *(0 for _ in inner_shape)), (last - first, *inner_shape)))
    return boxes + _nest(last, boxes_of_range(0, stop - last * row, inner_shape))


def _nest(index: int, inner: list[Box]) -> list[Box]:
    """Boxes of the inner dimensions as boxes within one index of a dimension in front of them."""
    return [((index, *offsets), (1, *sizes)) for offsets, sizes in inner]


class Fragments(Tensor):
    """Elements [start, start + piece.numel()) of a tensor whose other elements the other ranks hold.

    `shape` is the whole tensor's.
    """

    piece: Tensor
    """1-D: this rank's elements, shared with their owner and not copied."""
    start: int
    """Index of the first of them in the flattened tensor."""

    @staticmethod
    def __new__(cls, piece: Tensor, start: int, shape: Sequence[int]) -> Fragments:
        assert piece.ndim == 1, piece.shape
        assert 0 <= start <= start + piece.numel() <= math.prod(shape), (start, piece.numel(), tuple(shape))
        self: Fragments = torch.Tensor._make_wrapper_subclass(
            cls, torch.Size(shape), dtype=piece.dtype, device=piece.device
        )
        self.piece = piece.detach()
        self.start = start
        return self

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        stop = self.start + self.piece.numel()
        return f"Fragments([{self.start}, {stop}) of {tuple(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Element-wise operations act on the pieces; all others would need the elements of other ranks."""
        if func not in _ELEMENTWISE:
            raise NotImplementedError(f"{func} needs all elements of {args[0]!r}; gather them first (Strategy.export)")
        whole = next(argument for argument in args if isinstance(argument, Fragments))
        for other in args:
            if isinstance(other, Tensor) and not whole._matches(other):
                raise ValueError(f"{func} of {whole!r} and {other!r}: they hold different elements")
        pieces = [argument.piece if isinstance(argument, Fragments) else argument for argument in args]
        result = func(*pieces, **(kwargs or {}))
        if func is _aten.copy_.default:
            return args[0]
        return Fragments(result, whole.start, whole.shape)

    def _matches(self, other: Tensor) -> bool:
        return isinstance(other, Fragments) and (self.start, self.piece.numel(), self.shape) == (
            other.start,
            other.piece.numel(),
            other.shape,
        )

    def _boxes(self) -> list[Box]:
        return boxes_of_range(self.start, self.start + self.piece.numel(), self.shape)

    # -- the protocol of torch.distributed.checkpoint (`_Checkpointable`) --------------------------------------------

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk, properties=TensorProperties.create_from_tensor(self.piece), size=self.shape
                ),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in self._boxes()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """The box at `index.offset`, as a view of the piece."""
        begin = 0
        for offsets, sizes in self._boxes():
            length = math.prod(sizes)
            if index.offset is not None and tuple(index.offset) == offsets:
                return self.piece[begin : begin + length].view(sizes)
            begin += length
        raise ValueError(f"{index.fqn}: no box at {index.offset} in {self!r}")
