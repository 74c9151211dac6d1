"""DeepSpeed's ZeRO-1, 2 and 3, with optimizer and parameter offload to the CPU, as one more strategy.

The objective's main player (`backbone_player`) is DeepSpeed's engine; every other player, such as a discriminator, runs
under DDP with an AdamW of its own, because two engines in one process break ZeRO-1 and 2. Weights, moments and the
moving average are fp32 ranges of flat buffers; they enter and leave under canonical names as `Fragments`, so a
checkpoint of any stage and world size continues under any other strategy, and back. DeepSpeed's own checkpoints are
not used: they resume on the same world size only.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.objectives.base import Objective
from pretrain.optim import build_adamw, start_adamw, update_ema
from pretrain.optim_config import OptimConfig
from pretrain.parallel.blocks import checkpoint_blocks
from pretrain.parallel.config import ZERO_STAGES, ParallelConfig
from pretrain.parallel.deepspeed_config import check_ds_config, require_deepspeed
from pretrain.parallel.fragments import Fragments
from pretrain.parallel.native import NativeStrategy
from pretrain.parallel.strategy import Strategy, Tensors
from pretrain.parallel.world import World
from pretrain.parallel.zero_masters import (
    find_spans,
    flat_masters,
    frozen_weights,
    publish_masters,
)

_MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state per element, under torch's names."""


class DeepSpeedStrategy(Strategy):
    """One class for zero1, zero2 and zero3."""

    def __init__(self, config: ParallelConfig, optim: OptimConfig, world: World) -> None:
        require_deepspeed(config.strategy)
        self.world = world
        self.optim = optim
        self.config = config
        self.kind = config.strategy
        self.stage = ZERO_STAGES[config.strategy]
        self.bf16 = config.computes_in_bf16(world.device.type)
        self.compile = config.compiles_blocks(world.device.type) and self.stage < 3
        self.ds_config = check_ds_config(config, optim, bf16=self.bf16)
        self.others: NativeStrategy | None = None

    # -- preparation ---------------------------------------------------------------------------------------------

    def prepare(self, build: Callable[[], Objective], initialize: Callable[[Objective], None]) -> Objective:
        deepspeed = _import_deepspeed(self.world)
        self.objective = build()
        initialize(self.objective)
        self.player = self.objective.backbone_player
        self._prepare_others()
        module = self.objective.players[self.player]
        # Taken before anything is wrapped: canonical names, and the objects that keep them.
        parameters = dict(module.named_parameters())
        buffers = list(_persistent_buffers(module))
        checkpoint_blocks(module, self.objective.blocks(self.player), self.config.activation_checkpointing)
        if self.compile:
            for block in self.objective.blocks(self.player):
                block.compile(fullgraph=True)
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=build_adamw(parameters.items(), self.optim),
            config=_with_defaults(self.ds_config, self.stage, self.bf16, self.world.device),
            dist_init_required=False,
        )
        self.objective.players[self.player] = self.engine
        self.zero = self.engine.optimizer
        self.adamw: torch.optim.AdamW = self.zero.optimizer
        self.masters = flat_masters(self.zero, self.stage)
        self.spans = find_spans(self.zero, self.stage, parameters)
        start_adamw(self.adamw, self.masters)
        # What the optimizer does not step on: frozen parameters and buffers.
        self.untrained = frozen_weights(self.stage, parameters) | {b.name: b.tensor for b in buffers}
        self.average: list[Tensor] = []
        if self.optim.ema_decay is not None:
            self.average = [flat.detach().clone() for flat in self.masters]
            self.untrained_average = {name: tensor.clone() for name, tensor in self.untrained.items()}
        return self.objective

    def _prepare_others(self) -> None:
        others = {name: module for name, module in self.objective.players.items() if name != self.player}
        if others:
            view = copy.copy(self.objective)  # the same objective, of which DDP sees its players only
            view.players = others
            self.others = NativeStrategy(replace(self.config, strategy="ddp"), self.optim, self.world)
            self.others.prepare(lambda: view, lambda _: None)
            self.objective.players.update(view.players)

    # -- steps ---------------------------------------------------------------------------------------------------

    def accumulate(self, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        if self.others is not None:
            self.others.accumulate(last)

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.world.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def backward(self, loss: Tensor, player: str) -> None:
        if player == self.player:
            self.engine.backward(loss, scale_wrt_gas=False)
        else:
            assert self.others is not None
            self.others.backward(loss, player)

    def step(self, player: str, lr: float) -> Tensor:
        if player != self.player:
            assert self.others is not None
            return self.others.step(player, lr)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.engine.step()  # clips; where the global norm is not finite, every rank drops the gradients instead
        if self.average:
            assert self.optim.ema_decay is not None
            pairs = [(self.untrained_average[name], tensor) for name, tensor in self.untrained.items()]
            floating = [(_local_piece(a), _local_piece(b)) for a, b in pairs if b.is_floating_point()]
            averages = self.average + [average for average, _ in floating]
            weights = [flat.detach() for flat in self.masters] + [weight for _, weight in floating]
            update_ema(averages, weights, self.optim.ema_decay)
        return torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32, device=self.world.device)

    # -- state ---------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensors]:
        return self._own_state() | (self.others.state() if self.others is not None else {})

    def _own_state(self) -> dict[str, Tensors]:
        result = {f"model.{self.player}": self._weights(), f"optimizer.{self.player}": self._optimizer_state()}
        if self.average:
            result[f"ema.{self.player}"] = self._averages()
        return result

    def _weights(self) -> Tensors:
        return {name: span.fragment_of(self.masters) for name, span in self.spans.items()} | self.untrained

    def _averages(self) -> Tensors:
        return {name: span.fragment_of(self.average) for name, span in self.spans.items()} | self.untrained_average

    def _optimizer_state(self) -> Tensors:
        moments = {key: [self.adamw.state[flat][key] for flat in self.masters] for key in _MOMENTS}
        result: Tensors = {}
        for name, span in self.spans.items():
            result[f"{name}.step"] = self.adamw.state[self.masters[span.flat]]["step"].detach().clone()
            result |= {f"{name}.{key}": span.fragment_of(flats) for key, flats in moments.items()}
        return result

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensors]) -> None:
        for group, live in self._own_state().items():
            for name, tensor in live.items():
                tensor.copy_(state[group][name])
        for index, flat in enumerate(self.masters):
            names = [name for name, span in self.spans.items() if span.flat == index]
            steps = {float(state[f"optimizer.{self.player}"][f"{name}.step"]) for name in names}
            if len(steps) > 1:
                raise ValueError(
                    f"the checkpoint's parameters were stepped {sorted(steps)} times, but {self.kind} keeps one count "
                    f"for all of {names[0]} ... {names[-1]}; continue under the strategy that wrote it, or fsdp2"
                )
            self.adamw.state[flat]["step"].fill_(steps.pop())
        publish_masters(self.zero, self.stage)
        if self.others is not None:
            self.others.load_state(state)

    def export(self, player: str, *, ema: bool = False) -> Tensors:
        if player != self.player:
            assert self.others is not None
            return self.others.export(player, ema=ema)
        full: Tensors = {}
        for name, tensor in (self._averages() if ema else self._weights()).items():
            whole = _gather(tensor) if isinstance(tensor, Fragments) else tensor
            if self.world.is_main:
                full[name] = whole.detach().to("cpu", copy=True)
        return full


@dataclass(frozen=True)
class _Buffer:
    """A persistent buffer by its place, because moving a module to a device replaces the tensor."""

    name: str
    """Canonical, from the player's root."""
    owner: nn.Module
    """The module that registered it."""
    attribute: str
    """Its name there."""

    @property
    def tensor(self) -> Tensor:
        return self.owner.get_buffer(self.attribute)


def _persistent_buffers(module: nn.Module) -> Iterator[_Buffer]:
    for prefix, owner in module.named_modules():
        for attribute, buffer in owner.named_buffers(recurse=False):
            if buffer is not None and attribute not in owner._non_persistent_buffers_set:
                yield _Buffer(f"{prefix}.{attribute}" if prefix else attribute, owner, attribute)


def _local_piece(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.piece if isinstance(tensor, Fragments) else tensor


def _gather(share: Fragments) -> Tensor:
    """The whole tensor on rank 0; what other ranks get is not defined. A collective."""
    whole = torch.zeros(share.numel(), dtype=share.dtype, device=share.device)
    whole[share.start : share.start + share.piece.numel()] = share.piece
    dist.reduce(whole, dst=0)  # each element is one rank's value plus zeros: exact
    return whole.view(share.shape)


def _import_deepspeed(world: World) -> Any:
    """Imports DeepSpeed for the run's device, and joins it to the process group that is there already.

    Raises:
        ValueError: this process has imported DeepSpeed for another kind of device.
    """
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)  # read at import
    with _without_mlflow():
        import deepspeed
    from deepspeed.accelerator import get_accelerator

    found = get_accelerator()._name
    if found != world.device.type:
        raise ValueError(
            f"this process imported DeepSpeed for {found!r}, but the run's device is {world.device.type!r}; unset "
            f"DS_ACCELERATOR, or set it to {world.device.type}"
        )
    for handler in deepspeed.utils.logger.handlers:
        handler.setStream(sys.stderr)  # stdout is Tessera's own
        # Every optimizer but a handful; that this one is right is what our tests show.
        handler.addFilter(lambda record: "untested optimizer" not in record.getMessage())
    # Shared-memory collectives for inference: never used here, and compiling them takes over a minute on a first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if found == "cuda" else "gloo", verbose=False)
    return deepspeed


@contextmanager
def _without_mlflow() -> Iterator[None]:
    """Keeps DeepSpeed from importing MLflow for its autotuner, unused here: 13 of 17 seconds, on every rank."""
    if "mlflow" in sys.modules:
        yield
        return
    sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["mlflow"]


def _with_defaults(ds_config: dict[str, Any], stage: int, bf16: bool, device: torch.device) -> dict[str, Any]:
    """The configuration with Tessera's choice of what neither the run nor the user's file decides."""
    config = copy.deepcopy(ds_config)
    config.setdefault("steps_per_print", 2**31)
    zero = config["zero_optimization"]
    zero.setdefault("reduce_bucket_size", 25_000_000)  # 100 MB, allocated in each backward pass; DeepSpeed's own: 2 GB
    if device.type == "cpu":
        zero.setdefault("overlap_comm", False)
        for section in ("offload_optimizer", "offload_param"):
            zero[section].setdefault("pin_memory", False)
    if bf16 and stage < 3:
        # Gradients are reduced in fp32, as under DDP and FSDP2. Stage 3 gathers weights and reduces gradients of linear
        # and convolution layers in bf16: in fp32 both would take twice the traffic.
        config["torch_autocast"].setdefault("lower_precision_safe_modules", [])
    return config
