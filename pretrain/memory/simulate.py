"""Memory of one forward and backward pass, found by running it on tensors that have shapes and no values.

Enters: an objective's builder, a micro-batch's shapes, precision and checkpointing mode. Leaves: bytes. The operations
are those of a real step, so new models need no formulas; nothing is allocated and no accelerator is touched.
What an operator allocates inside (matrix library workspaces) is not seen, and compiled blocks may keep less.
Legend: B batch, C channels, H/W pixels.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data_pipes.batch import Batch
from pretrain.models import attention
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
    """Follows the bytes of all tensors that are made inside, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def ignore(self, tensors: list[Tensor]) -> None:
        """Takes tensors from before as known, so that they never count."""
        for tensor in tensors:
            self._sizes[tensor.untyped_storage()._cdata] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._see(value.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        weakref.finalize(storage, self._forget, key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
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
    """One micro-batch of shape [B, C, H, W] through all turns of an objective.

    device_type: "cpu" or "cuda", whose arithmetic is imitated. bf16: under autocast. bf16_weights: with gathered
    weights that are bf16, as FSDP2 hands them out. gradients: "grow" = allocated in the backward pass and kept, in the
    peak; "apart" = each is added to memory that the caller counts.
    """
    with FakeTensorMode(), torch.device("cpu"), _arithmetic_of(device_type, bf16):
        objective = build()
        for player, module in objective.players.items():
            if bf16_weights and player == objective.backbone_player:
                _weights_to_bf16(module, objective.blocks(player))
            checkpoint_blocks(module, objective.blocks(player), checkpointing, preserve_rng_state=False)
            if gradients == "apart":
                for parameter in module.parameters():
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
    """Runs all turns; returns the bytes that the largest forward pass keeps."""
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
    return tuple(
        value.to(torch.bfloat16) if isinstance(value, Tensor) and value.is_floating_point() else value
        for value in inputs
    )


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


@contextmanager
def _arithmetic_of(device_type: str, bf16: bool) -> Iterator[None]:
    """Tensors without values pretend to be on a CPU, where alone they can be differentiated without an accelerator.

    Two things differ on CUDA under bf16: attention computes in bf16 (ours is in fp32 on a CPU), and autocast runs
    LayerNorm in fp32.
    """
    if device_type == "cpu" or not bf16:
        yield
        return
    with patch.object(attention, "attend", _attend), _LayerNormInFloat32():
        yield


def _attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, is_causal=is_causal)


class _LayerNormInFloat32(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.layer_norm:
            args = tuple(value.float() if isinstance(value, Tensor) else value for value in args)
        return func(*args, **(kwargs or {}))
