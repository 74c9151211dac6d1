"""Blocks that compute part of their forward pass again in the backward pass instead of keeping all of it.

Enters: a module and its blocks. Leaves: the same module with each block wrapped; names in state dicts and results stay
the same to the bit, because the same operations run again on the same inputs. Order: checkpoint -> compile -> shard.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

aten = torch.ops.aten
"""torch's operations below autograd, which checkpointing sees."""
EXPENSIVE = frozenset(
    {
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten.linear.default,
        aten.convolution.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
    }
)
"""What "selective" keeps: nearly all of a block's FLOPs, about half of its activations' bytes."""


def checkpoint_blocks(
    module: nn.Module,
    blocks: list[nn.Module],
    mode: Literal["none", "full", "selective"],
    *,
    preserve_rng_state: bool = True,
) -> None:
    """Replaces each block, wherever it hangs in `module`, by one that recomputes its activations.

    Args:
        module: changed in place.
        blocks: modules inside of it.
        mode: see `ParallelConfig.activation_checkpointing`.
        preserve_rng_state: draw the same random numbers again, for blocks with dropout.
    """
    if mode == "none":
        return
    options: dict[str, Any] = {"preserve_rng_state": preserve_rng_state}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, keep_expensive)
    wanted = {id(block) for block in blocks}
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if id(child) in wanted:
                setattr(parent, name, checkpoint_wrapper(child, **options))


def keep_expensive(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """What "selective" does with an operation's result: keeps that of an `EXPENSIVE` one, recomputes all others."""
    return CheckpointPolicy.MUST_SAVE if operation in EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE
