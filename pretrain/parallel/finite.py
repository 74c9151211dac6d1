"""Whether the weights of all ranks are numbers: what is not must never be saved."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pretrain.parallel.fragments import Fragments
from pretrain.parallel.world import World


def are_finite(state: Mapping[str, Mapping[str, Tensor]], world: World) -> bool:
    """Whether every weight is finite, on every rank. A collective.

    Args:
        state: of `Strategy.state`; the groups `model.<player>` are looked at.
        world: the processes that have a part of it.
    """
    weights = [tensor for group, tensors in state.items() if group.startswith("model.") for tensor in tensors.values()]
    local = [_local(tensor) for tensor in weights if tensor.is_floating_point()]
    norms = torch._foreach_norm([tensor for tensor in local if tensor.numel()], float("inf"))
    broken = bool(norms) and not bool(torch.isfinite(torch.stack([norm.float() for norm in norms])).all())
    return not world.any(broken)


def _local(tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    if isinstance(tensor, DTensor):
        return tensor.to_local()
    return tensor.piece if isinstance(tensor, Fragments) else tensor
