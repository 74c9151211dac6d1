"""Memory of one forward and backward pass, found by running it on tensors that have shapes and no values.

Enters: an objective's builder, a micro-batch's shapes, precision and checkpointing mode. Leaves: bytes. The operations
are those of a real step, so new models need no formulas; nothing is allocated and no accelerator is touched.
What an operator allocates inside (matrix library workspaces) is not seen, and compiled blocks may keep less.

torch's own `torch.distributed._tools.mem_tracker.MemTracker` counts the same bytes, but is private, takes 2 to 9 times
as long, fails on parameters that are not trained, and replaces a method of torch while it runs.

Legend: B batch, C channels, H/W pixels, N tokens, D width.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data_pipes.batch import Batch
from pretrain.models.attention import SelfAttention
from pretrain.objectives.base import Objective
from pretrain.parallel.blocks import checkpoint_blocks


@dataclass(frozen=True)
class PassMemory:
    """Bytes of one micro-batch's forward and backward passes beside weights, buffers and the batch itself."""

    activations: int
    """Kept between the forward and the backward pass."""
    peak: int
    """Highest of both passes: activations, what is computed with, and gradients as `simulate` was told."""


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of all tensors that are made inside, from their first operation until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        """Bytes that are alive."""
        self.peak = 0
        """The highest `now` so far."""
        self._sizes: dict[int, int] = {}
        """Address of a living storage -> its bytes."""

    def ignore(self, tensors: list[Tensor]) -> None:
        """Takes tensors from before as known, so that they never count."""
        for tensor in tensors:
            self._sizes[tensor.untyped_storage()._cdata] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        """Adds a storage that was not seen before, until it is freed."""
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        weakref.finalize(storage, self._forget, key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        """Takes off a storage that was freed."""
        self.now -= self._sizes.pop(key)


def simulate(
    build: Callable[[], Objective],
    batch_shape: tuple[int, ...],
    *,
    image_dtype: torch.dtype = torch.uint8,
    device_type: str,
    bf16: bool,
    bf16_weights: bool,
    checkpointing: Literal["none", "full", "selective"],
    gradients: Literal["grow", "apart"],
) -> PassMemory:
    """The memory of one micro-batch that goes through all turns of an objective.

    Args:
        build: makes the objective; called once, on tensors without values.
        batch_shape: of the stored images, [B, C, H, W], or clips.
        image_dtype: of the stored images.
        device_type: "cpu" or "cuda", whose arithmetic is imitated.
        bf16: run the forward pass under autocast.
        bf16_weights: with gathered weights that are bf16, as FSDP2 hands them out.
        checkpointing: what blocks keep, see `checkpoint_blocks`.
        gradients: "grow" allocates them in the backward pass and keeps them, within the peak; "apart" adds each to
            memory that the caller counts.
    """
    # Tensors without values lie on a CPU, where alone they can be differentiated without an accelerator.
    with FakeTensorMode(), torch.device("cpu"):
        objective = build()
        for player, module in objective.players.items():
            if bf16 and device_type == "cuda":
                _compute_as_cuda(module)
            if bf16_weights and player == objective.backbone_player:
                _weights_to_bf16(module, objective.blocks(player))
            checkpoint_blocks(module, objective.blocks(player), checkpointing, preserve_rng_state=False)
            if gradients == "apart":
                for parameter in filter(lambda one: one.requires_grad, module.parameters()):
                    parameter.register_post_accumulate_grad_hook(_drop_gradient)
        batch = Batch(
            images=torch.zeros(batch_shape, dtype=image_dtype),
            labels=torch.zeros(batch_shape[0], dtype=torch.int64),
            positions=torch.zeros(batch_shape[0], dtype=torch.int64),
            keys=[""] * batch_shape[0],
        )
        state = [t for module in objective.players.values() for t in (*module.parameters(), *module.buffers())]
        with LiveBytes() as live:
            live.ignore([*state, batch.images, batch.labels, batch.positions])
            activations = _run(objective, batch, live, bf16)
        return PassMemory(activations, live.peak)


def _run(objective: Objective, batch: Batch, live: LiveBytes, bf16: bool) -> int:
    """Runs all turns of a batch.

    Returns:
        The bytes that the largest forward pass keeps.
    """
    activations = 0
    turns = objective.turns(batch, 0)
    while True:
        autocast: AbstractContextManager[object] = torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()
        with autocast:
            turn = next(turns, None)
        if turn is None:
            return activations
        activations = max(activations, live.now)
        turn.loss.backward()


def _weights_to_bf16(module: nn.Module, blocks: list[nn.Module]) -> None:
    """What FSDP2's mixed precision does: bf16 weights everywhere, bf16 inputs of blocks."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    for block in blocks:
        block.register_forward_pre_hook(_inputs_to_bf16)


def _inputs_to_bf16(module: nn.Module, inputs: Any) -> Any:
    """Casts the floating-point inputs of a block, as a forward pre-hook."""
    return tuple(
        value.to(torch.bfloat16) if isinstance(value, Tensor) and value.is_floating_point() else value
        for value in inputs
    )


def _drop_gradient(parameter: Tensor) -> None:
    """Frees a gradient that was added to memory which the caller counts."""
    parameter.grad = None


def _compute_as_cuda(module: nn.Module) -> None:
    """Gives layers the arithmetic of CUDA under bf16, where it differs from that of a CPU.

    Attention computes in bf16, which ours does in fp32 on a CPU, and autocast runs LayerNorm in fp32.
    """
    for layer in list(module.modules()):
        if isinstance(layer, SelfAttention):
            layer.attend = _attend_in_bf16
        for name, child in list(layer.named_children()):
            if isinstance(child, nn.LayerNorm):
                setattr(layer, name, _LayerNormInFloat32(child))


def _attend_in_bf16(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`models.attention.attend` as it computes on CUDA."""
    return F.scaled_dot_product_attention(query, key, value)


class _LayerNormInFloat32(nn.Module):
    """A LayerNorm whose input and weights become fp32 first."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, N, D] of any type to fp32 of the same shape."""
        shape, eps = self.norm.normalized_shape, self.norm.eps
        return F.layer_norm(tokens.float(), shape, self.norm.weight.float(), self.norm.bias.float(), eps)
