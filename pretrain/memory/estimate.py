"""How much memory each rank of a run will need, before anything is started.

Enters: a configuration and a number of processes. Leaves: a `MemoryEstimate`. Sizes of weights and of what belongs to
them are counted on the meta device; activations come from running a micro-batch on tensors without values. Not counted:
the allocator's fragmentation (plan 10%), CUDA's context (about 0.5 GB), communication buffers of NCCL, data workers.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pretrain.config import RunConfig
from pretrain.memory.simulate import PassMemory, simulate
from pretrain.objectives.base import Objective
from pretrain.parallel.batches import fit_micro_batch
from pretrain.parallel.fsdp2 import blocks_resharding, num_shards

_FP32 = 4
"""Bytes of a number."""
_REDUCE_BUCKET = 25_000_000
"""Numbers in DeepSpeed's gradient bucket, as our strategy sets it."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of the rank that needs most. What is 0 is not there, or counted under another name."""

    strategy: str
    """What `parallel.strategy` stands for with this number of processes."""
    world_size: int
    """Number of processes."""
    device: str
    """cpu or cuda, which the precision and the arithmetic follow."""
    precision: str
    """fp32 or bf16."""
    micro_batch: int
    """Samples per rank and forward pass."""
    accumulate: int
    """Micro-batches per optimizer step."""
    num_parameters: int
    """Of the whole model, trained or not."""
    weights: int
    """fp32 weights and buffers, or this rank's share of them."""
    gradients: int
    """fp32; under fsdp2 with accumulation also the whole ones, which wait for their reduction."""
    optimizer: int
    """AdamW's two moments; under zero1 to zero3 also the fp32 masters."""
    average: int
    """The moving average of the weights."""
    gathered: int
    """fsdp2, hsdp, zero3: whole weights of the blocks in use, and their gradients before reduction."""
    batch: int
    """The micro-batch as it is stored."""
    activations: int
    """Kept from the forward pass for the backward pass."""
    peak: int
    """Highest sum over a step; gradients and activations are not both whole at one time, so it is not the sum."""
    host_offload: int
    """On the host: what DeepSpeed keeps there."""
    host_staging: int
    """On the host: the copy of the state that a checkpoint is written from."""

    @property
    def host(self) -> int:
        """Bytes of host memory beside the process itself; on a CPU they come on top of the peak."""
        return self.host_offload + self.host_staging

    def as_dict(self) -> dict[str, Any]:
        """Every field by its name, and `host`."""
        return dataclasses.asdict(self) | {"host": self.host}


@dataclass
class _Parts:
    """What the strategies fill in, in bytes."""

    weights: int = 0
    """As in `MemoryEstimate`."""
    gradients: int = 0
    """As in `MemoryEstimate`."""
    growing: int = 0
    """The part of the gradients that the last backward pass of a step allocates as it goes."""
    optimizer: int = 0
    """As in `MemoryEstimate`."""
    average: int = 0
    """As in `MemoryEstimate`."""
    gathered: int = 0
    """As in `MemoryEstimate`."""
    host_offload: int = 0
    """As in `MemoryEstimate`."""


def estimate(
    config: RunConfig, world_size: int, *, ranks_per_node: int | None = None, device: str | None = None
) -> MemoryEstimate:
    """What one rank of a run needs.

    Args:
        config: of the run.
        world_size: number of processes, over all nodes.
        ranks_per_node: None: all processes are on one node.
        device: "cpu" or "cuda"; None: what `config.device` stands for on this machine.

    Raises:
        ValueError: the processes do not fit the configuration.
    """
    parallel = config.parallel
    device = device or _device_type(config.device)
    kind = parallel.strategy if parallel.strategy != "auto" else ("single" if world_size == 1 else "ddp")
    bf16 = parallel.precision == "bf16" or (parallel.precision == "auto" and device == "cuda")
    micro_batch = fit_micro_batch(config.train.global_batch, world_size, config.train.micro_batch)
    accumulate = config.train.global_batch // (world_size * micro_batch)
    with torch.device("meta"):
        objective = config.build_objective()
    sharded = kind in ("fsdp2", "hsdp")
    growing = kind == "single" and accumulate == 1
    shape, dtype = _batch(config, objective, micro_batch)
    one_pass = simulate(
        config.build_objective,
        shape,
        image_dtype=dtype,
        device_type=device,
        bf16=bf16,
        bf16_weights=bf16 and sharded,
        checkpointing=parallel.activation_checkpointing,
        gradients="grow" if growing else "apart",
    )
    parts = _Parts()
    for player, module in objective.players.items():
        has_average = config.optim.of(player).ema_decay is not None
        if sharded and player == objective.backbone_player:
            shards = num_shards(kind, parallel, world_size, ranks_per_node or world_size)
            _add_fsdp2(parts, module, objective.blocks(player), config, shards, bf16, accumulate)
            parts.average += _weights_bytes(module, shards) if has_average else 0
        elif kind.startswith("zero") and player == objective.backbone_player:
            _add_zero(parts, module, config, kind, world_size)
        else:
            # DDP's buckets last from start to end, and gradients that are not reduced yet lie beside them.
            _add_whole(parts, module, 2 if kind != "single" and accumulate > 1 else 1, growing)
            parts.average += _weights_bytes(module, 1) if has_average else 0
    batch_bytes = torch.Size(shape).numel() * dtype.itemsize
    return MemoryEstimate(
        strategy=kind,
        world_size=world_size,
        device=device,
        precision="bf16" if bf16 else "fp32",
        micro_batch=micro_batch,
        accumulate=accumulate,
        num_parameters=sum(p.numel() for module in objective.players.values() for p in module.parameters()),
        weights=parts.weights,
        gradients=parts.gradients,
        optimizer=parts.optimizer,
        average=parts.average,
        gathered=parts.gathered,
        batch=batch_bytes,
        activations=one_pass.activations,
        peak=_peak(parts, one_pass, batch_bytes),
        host_offload=parts.host_offload,
        host_staging=_state_bytes(objective, config) // world_size,
    )


def _peak(parts: _Parts, one_pass: PassMemory, batch_bytes: int) -> int:
    """The highest sum: gradients that grow do so while activations go, and the optimizer steps with all of them."""
    lasting = parts.weights + parts.gradients - parts.growing + parts.optimizer + parts.average
    return lasting + parts.gathered + batch_bytes + max(one_pass.peak, parts.growing)


def _add_whole(parts: _Parts, module: nn.Module, gradient_copies: int, growing: bool) -> None:
    """Adds a module of `single` or `ddp`: everything lies on every rank."""
    trained = _FP32 * sum(p.numel() for p in module.parameters() if p.requires_grad)
    parts.weights += _weights_bytes(module, 1)
    parts.gradients += gradient_copies * trained
    parts.growing += trained if growing else 0
    parts.optimizer += 2 * trained


def _add_fsdp2(
    parts: _Parts,
    module: nn.Module,
    blocks: list[nn.Module],
    config: RunConfig,
    shards: int,
    bf16: bool,
    accumulate: int,
) -> None:
    """Adds a module of `fsdp2` or `hsdp`: shares along the first dimension, and whole weights of a few blocks."""
    trained = [p for p in module.parameters() if p.requires_grad]
    share = _FP32 * sum(_share(p, shards) for p in trained)
    parts.weights += _weights_bytes(module, shards)
    parts.gradients += share
    parts.growing += share
    parts.optimizer += 2 * share
    if accumulate > 1:  # without a reduction, whole gradients wait in the precision of the reduction
        parts.gradients += _FP32 * sum(p.numel() for p in trained)
    item = 2 if bf16 else _FP32
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    root = sum(p.numel() for p in module.parameters()) - sum(sizes)
    resharding = blocks_resharding(blocks, config.parallel, bf16)
    kept = root + sum(size for size, frees in zip(sizes, resharding, strict=True) if not frees)
    flying = sorted((size for size, frees in zip(sizes, resharding, strict=True) if frees), reverse=True)
    # The block that computes, those ahead of it, and the buffer that the next is gathered into.
    whole = kept + sum(flying[: 1 + max(1, config.parallel.prefetch)])
    largest = max([*sizes, 0])
    # Of one block: gradients of its whole weights, and their copy in the order of the shares that is reduced in fp32.
    parts.gathered += item * (whole + largest) + (item + _FP32) * largest + item * root


def _add_zero(parts: _Parts, module: nn.Module, config: RunConfig, kind: str, world_size: int) -> None:
    """Adds a module of `zero1` to `zero3`, by formula: flat fp32 ranges, on the host where they are offloaded."""
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    share = _FP32 * -(-trained // world_size)
    masters_and_moments = 3 * share
    bucket = _FP32 * min(_REDUCE_BUCKET, trained)
    gradients = _FP32 * trained if kind == "zero1" else share
    weights = _weights_bytes(module, 1)
    if kind == "zero3":
        weights = weights - _FP32 * trained + share
        parts.gathered += _FP32 * trained  # up to DeepSpeed's 1e9 live parameters, which no ViT here exceeds
    if config.parallel.deepspeed.offload_param:
        weights -= share
        parts.host_offload += share
    if config.parallel.deepspeed.offload_optimizer:
        parts.host_offload += masters_and_moments + share  # the reduced gradients go there too
        masters_and_moments = 0
        gradients = gradients if kind == "zero1" else 0
    parts.weights += weights
    parts.gradients += gradients
    parts.gathered += bucket
    parts.optimizer += masters_and_moments
    if config.optim.ema_decay is not None:
        if config.parallel.deepspeed.offload_optimizer:
            parts.host_offload += share
        else:
            parts.average += share


def _weights_bytes(module: nn.Module, shards: int) -> int:
    """Bytes of the parameters, or of the largest share of each, and of the whole buffers."""
    parameters = _FP32 * sum(_share(p, shards) for p in module.parameters())
    return parameters + sum(b.numel() * b.element_size() for b in module.buffers())


def _share(parameter: nn.Parameter, shards: int) -> int:
    """How many numbers of a parameter lie on the rank that has most; only whole rows are divided."""
    rows = parameter.shape[0] if parameter.ndim else 1
    return -(-rows // shards) * (parameter.numel() // max(1, rows))


def _state_bytes(objective: Objective, config: RunConfig) -> int:
    """Bytes that a checkpoint holds; each rank stages an equal part of them."""
    total = 0
    for player, module in objective.players.items():
        has_average = config.optim.of(player).ema_decay is not None
        weights = _weights_bytes(module, 1)
        moments = 2 * _FP32 * sum(p.numel() for p in module.parameters() if p.requires_grad)
        total += weights * (2 if has_average else 1) + moments
    return total


def _batch(config: RunConfig, objective: Objective, micro_batch: int) -> tuple[tuple[int, ...], torch.dtype]:
    """The shape and the type of a micro-batch as it is stored."""
    height, width = objective.image_size
    dtype = torch.uint8 if config.data.bit_depth == 8 else torch.uint16
    if (clips := config.data.video) is not None:
        return (micro_batch, clips.repeats, objective.in_channels, clips.num_frames, height, width), dtype
    return (micro_batch, objective.in_channels, height, width), dtype


def _device_type(name: str) -> str:
    """What `device` stands for: "cuda" where the driver lists a device, which it is asked without opening one."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name
