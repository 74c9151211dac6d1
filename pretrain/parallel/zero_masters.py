"""Where DeepSpeed's ZeRO optimizers keep what they train: the one module that knows their insides.

Each rank owns some flat fp32 buffers (one per parameter group, in stage 3 one per sub-group), and every trainable
parameter owns one range of one of them, possibly empty. The names used here are not public; tests/pretrain/parallel/
test_deepspeed.py fails where a new version of DeepSpeed moves them. Seen with 0.19.8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.parallel.fragments import Fragments


@dataclass(frozen=True)
class Span:
    """A rank's share of one parameter: `length` elements of a flat buffer and of the flattened parameter."""

    flat: int
    """Index of the flat buffer."""
    begin: int
    """First element in the flat buffer."""
    start: int
    """First element in the flattened parameter."""
    length: int
    """Number of elements; 0 where the other ranks hold all of it."""
    shape: tuple[int, ...]
    """Shape of the whole parameter."""

    def fragment_of(self, flats: list[Tensor]) -> Fragments:
        """This share, taken out of buffers that are laid out like the masters; it shares their memory."""
        piece = flats[self.flat].detach()[self.begin : self.begin + self.length]
        return Fragments(piece, self.start, self.shape)


def flat_masters(optimizer: Any, stage: int) -> list[Tensor]:
    """The fp32 weights that this rank's optimizer steps on."""
    flats = optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
    return list(flats)


def find_spans(optimizer: Any, stage: int, parameters: Mapping[str, nn.Parameter]) -> dict[str, Span]:
    """This rank's share of each trainable parameter."""
    if stage == 3:
        return {name: _span_of_partition(optimizer, p) for name, p in parameters.items() if p.requires_grad}
    spans: dict[str, Span] = {}
    group_of = {id(p): index for index, group in enumerate(optimizer.bit16_groups) for p in group}
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
            begin, start, length = 0, 0, 0
            if mapping is not None:
                begin, length = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
                start = mapping.lp_fragment_address.start
            spans[name] = Span(group_of[id(parameter)], begin, start, length, tuple(parameter.shape))
    return spans


def _span_of_partition(optimizer: Any, parameter: Any) -> Span:
    flat, begin, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start, length = _partition(parameter)
    return Span(flat, begin, start, length, tuple(parameter.ds_shape))


def _partition(parameter: Any) -> tuple[int, int]:
    """Start and length of this rank's elements under stage 3: equal partitions, padded behind the last element."""
    size = parameter.partition_numel()
    start = min(size * dist.get_rank(parameter.ds_process_group), parameter.ds_numel)
    return start, min(size, parameter.ds_numel - start)


def frozen_weights(stage: int, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """What this rank holds of the parameters that are not trained."""
    frozen: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            if stage == 3:
                held: Any = parameter
                start, length = _partition(held)
                frozen[name] = Fragments(held.ds_tensor.detach().view(-1)[:length], start, held.ds_shape)
            else:
                frozen[name] = parameter.detach()
    return frozen


@torch.no_grad()
def publish_masters(optimizer: Any, stage: int) -> None:
    """Copies the masters to the weights that the forward pass reads, as the end of a step does. A collective.

    Without it the model would silently go on with the old weights after a load.
    """
    if stage != 3:
        optimizer.update_lp_params()
        return
    optimizer._partition_all_parameters()
    for sub_group in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    optimizer.invalidate_secondary_tensor()
