"""FSDP2 and HSDP: which process holds which piece of the weights, and when blocks are gathered and freed.

Enters: a module on the meta device and its blocks in forward order. Leaves: the same module, sharded block by block,
then the root, with nothing materialised yet. Why it exists: what is kept between forward and backward decides memory
against communication, and both the engine and the memory estimate must know it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from pretrain.parallel.config import ParallelConfig
from pretrain.parallel.launch import Launch
from pretrain.parallel.world import World

SMALL_BYTES = 2**30
"""Gathered weights of up to this many bytes are kept: 1.3% of an 80 GB device for one all-gather less per block and
step."""


def device_mesh(kind: str, config: ParallelConfig, world: World) -> DeviceMesh:
    """One axis of shards; under hsdp a second one of replicas in front of it.

    Args:
        kind: "fsdp2" or "hsdp".
        config: with the number of shards.
        world: all processes. Under hsdp the launcher's LOCAL_WORLD_SIZE gives the processes of a node.

    Raises:
        ValueError: the shards do not divide the world size.
    """
    if kind == "fsdp2":
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    shards = num_shards(kind, config, world.size, Launch.from_environment().ranks_per_node)
    return init_device_mesh(world.device.type, (world.size // shards, shards), mesh_dim_names=("replicate", "shard"))


def num_shards(kind: str, config: ParallelConfig, world_size: int, ranks_per_node: int) -> int:
    """Into how many pieces a weight is cut.

    Raises:
        ValueError: the shards do not divide the world size.
    """
    shards = world_size if kind == "fsdp2" else config.shards or ranks_per_node
    if world_size % shards:
        raise ValueError(f"parallel.shards is {shards}, which does not divide the world size {world_size}")
    return shards


def shard(module: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh, config: ParallelConfig, bf16: bool) -> None:
    """Shards each block and the root, in place.

    Args:
        module: the root.
        blocks: modules inside of it, in forward order.
        mesh: see `device_mesh`.
        config: when weights are gathered and freed.
        bf16: whether forward passes compute in bf16; gradients are reduced in float32 anyway.
    """
    # Blocks compute in bf16 on gathered bf16 weights. The root's inputs are not cast: mask noise in bf16 would have
    # ties and hide other patches than fp32 does, and targets are taken from full-precision images.
    root_policy = block_policy = MixedPrecisionPolicy()
    if bf16:
        block_policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        root_policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    sharded: list[FSDPModule] = []
    for block, reshards in zip(blocks, blocks_resharding(blocks, config, bf16), strict=True):
        sharded.append(fully_shard(block, mesh=mesh, mp_policy=block_policy, reshard_after_forward=reshards))
    # The root's own weights (embedding, last norm, prediction) are needed again as soon as the backward pass begins.
    fully_shard(
        module, mesh=mesh, mp_policy=root_policy, reshard_after_forward=config.reshard_after_forward == "always"
    )
    if config.prefetch:
        for index, part in enumerate(sharded):
            part.set_modules_to_forward_prefetch(sharded[index + 1 : index + 1 + config.prefetch])
            before = sharded[max(0, index - config.prefetch) : index]
            part.set_modules_to_backward_prefetch(before[::-1])


def blocks_resharding(blocks: Sequence[nn.Module], config: ParallelConfig, bf16: bool) -> list[bool]:
    """Whether each block frees its gathered weights after its forward pass."""
    if config.reshard_after_forward != "auto":
        return [config.reshard_after_forward == "always"] * len(blocks)
    size_bytes = sum(parameter.numel() for block in blocks for parameter in block.parameters()) * (2 if bf16 else 4)
    if size_bytes <= SMALL_BYTES:
        return [False] * len(blocks)
    return [index < len(blocks) - 1 for index in range(len(blocks))]


def free_gathered(module: nn.Module) -> None:
    """Drops gathered weights before an optimizer step.

    A backward pass frees them, a forward pass without one (validation, a player that only looks) does not where blocks
    do not reshard: the gathered weights, which have no gradients, would stand in for the shares in `parameters()`, and
    the next forward pass would use them as they were before the step.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
