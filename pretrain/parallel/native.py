"""Single process, DDP, FSDP2 and HSDP on torch's own parts. FSDP2 and HSDP shard the objective's main player
(`backbone_player`) and replicate every other one.

Order of preparation: activation checkpointing -> compile per block -> shard each block, then the root -> materialise
-> weights -> optimizers. Weights are initialised once, on a CPU copy of the whole model with a seeded generator, so
every strategy and world size starts from the same ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from pretrain.objectives.base import Objective
from pretrain.optim import AdamW, build_adamw, start_adamw, update_ema
from pretrain.optim_config import OptimConfig
from pretrain.parallel import fsdp2
from pretrain.parallel.blocks import checkpoint_blocks
from pretrain.parallel.config import ParallelConfig
from pretrain.parallel.strategy import Strategy, Tensors
from pretrain.parallel.world import World


class NativeStrategy(Strategy):
    """One class for single, DDP, FSDP2 and HSDP."""

    def __init__(self, config: ParallelConfig, optim: OptimConfig, world: World) -> None:
        self.world = world
        self.optim = optim
        self.config = config
        self.kind = config.strategy if config.strategy != "auto" else "single" if world.size == 1 else "ddp"
        self.bf16 = config.computes_in_bf16(world.device.type)
        self.compile = config.compiles_blocks(world.device.type)
        self.settings: dict[str, OptimConfig] = {}
        self.optimizers: dict[str, AdamW] = {}
        self.live: dict[str, Tensors] = {}
        self.averages: dict[str, Tensors] = {}

    # -- preparation ---------------------------------------------------------------------------------------------

    def prepare(self, build: Callable[[], Objective], initialize: Callable[[Objective], None]) -> Objective:
        sharded = self.kind in ("fsdp2", "hsdp")
        if sharded:
            with torch.device("meta"):
                self.objective = build()
        else:
            self.objective = build()
            initialize(self.objective)
        for player, module in self.objective.players.items():
            checkpoint_blocks(module, self.objective.blocks(player), self.config.activation_checkpointing)
            if self.compile:
                for block in self.objective.blocks(player):
                    block.compile(fullgraph=True)
        if sharded:
            self._shard(build, initialize)
        for player, module in self.objective.players.items():
            if not isinstance(module, FSDPModule):
                self.objective.players[player] = self._replicate(module)
        for player in self.objective.players:
            module = self._unwrapped(player)
            optim = self.settings[player] = self.optim.of(player)
            optimizer = build_adamw(module.named_parameters(), optim)
            start_adamw(optimizer, (one for group in optimizer.param_groups for one in group["params"]))
            self.optimizers[player] = optimizer
            if optim.ema_decay is not None:
                self.live[player] = _weights(module)  # shares storage with the parameters
                self.averages[player] = {name: tensor.detach().clone() for name, tensor in self.live[player].items()}
        return self.objective

    def _replicate(self, module: nn.Module) -> nn.Module:
        module = module.to(self.world.device)
        if self.kind == "single":
            return module
        device_ids = [self.world.device.index] if self.world.device.type == "cuda" else None
        # Buffers are constants here; newer versions of torch renamed the argument.
        known = inspect.signature(DistributedDataParallel.__init__).parameters
        unsynced: dict[str, Any] = {
            "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False
        }
        return DistributedDataParallel(module, device_ids=device_ids, gradient_as_bucket_view=True, **unsynced)

    def _shard(self, build: Callable[[], Objective], initialize: Callable[[Objective], None]) -> None:
        """Shards the player that is the backbone. The others, such as a discriminator, are small, are called several
        times in a step, and may be differentiated twice, which FSDP2 cannot: each rank gets them whole.
        """
        mesh = fsdp2.device_mesh(self.kind, self.config, self.world)
        for player, module in self.objective.players.items():
            if player == self.objective.backbone_player:
                fsdp2.shard(module, self.objective.blocks(player), mesh, self.config, self.bf16)
            module.to_empty(device=self.world.device)
            with torch.no_grad():  # a parameter that nothing initialises shows at once
                for tensor in [*module.parameters(), *module.buffers()]:
                    if tensor.is_floating_point():
                        tensor.fill_(float("nan"))
        whole: Objective | None = None
        if self.world.is_main:
            whole = build()
            initialize(whole)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        for player, module in self.objective.players.items():
            full = whole.players[player].state_dict() if whole is not None else {}
            set_model_state_dict(module, full, options=options)

    def _unwrapped(self, player: str) -> nn.Module:
        module = self.objective.players[player]
        return module.module if isinstance(module, DistributedDataParallel) else module

    # -- steps ---------------------------------------------------------------------------------------------------

    def accumulate(self, last: bool) -> None:
        for module in self.objective.players.values():
            if isinstance(module, DistributedDataParallel):
                module.require_backward_grad_sync = last
            elif isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(last)

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.world.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def backward(self, loss: Tensor, player: str) -> None:
        loss.backward()

    def step(self, player: str, lr: float) -> Tensor:
        module, optimizer = self._unwrapped(player), self.optimizers[player]
        if isinstance(module, FSDPModule):
            fsdp2.free_gathered(module)
        parameters = [p for p in module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        clip_norm = self.settings[player].clip_norm
        if clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
        for group in optimizer.param_groups:
            group["lr"] = lr
        # The norm is global, so all ranks skip alike; the kernel reads it where it lies, so the host need not wait.
        optimizer.found_inf = (~torch.isfinite(norm)).float()
        optimizer.step()
        self._update_average(player)
        optimizer.zero_grad(set_to_none=True)
        return norm.float()

    def _update_average(self, player: str) -> None:
        if player not in self.averages:
            return
        decay = self.settings[player].ema_decay
        assert decay is not None
        live, averages = self.live[player], self.averages[player]
        names = [name for name, tensor in live.items() if tensor.is_floating_point()]
        weights = [_local(live[name]) for name in names]
        update_ema([_local(averages[name]) for name in names], weights, decay)

    # -- state ---------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensors]:
        result: dict[str, Tensors] = {}
        for player, optimizer in self.optimizers.items():
            module = self._unwrapped(player)
            result[f"model.{player}"] = _weights(module)
            # Only the tensors: the groups' numbers follow from the configuration and the step.
            per_parameter = cast(dict[str, Tensors], get_optimizer_state_dict(module, optimizer)["state"])
            result[f"optimizer.{player}"] = {
                f"{name}.{key}": tensor for name, tensors in per_parameter.items() for key, tensor in tensors.items()
            }
            if player in self.averages:
                result[f"ema.{player}"] = self.averages[player]
        return result

    def load_state(self, state: dict[str, Tensors]) -> None:
        for player, optimizer in self.optimizers.items():
            module = self._unwrapped(player)
            set_model_state_dict(module, dict(state[f"model.{player}"]))
            current = get_optimizer_state_dict(module, optimizer)
            nested: dict[str, Tensors] = {}
            for full_name, tensor in state[f"optimizer.{player}"].items():
                name, _, key = full_name.rpartition(".")
                nested.setdefault(name, {})[key] = tensor
            set_optimizer_state_dict(
                module,
                optimizer,
                {"state": nested, "param_groups": current["param_groups"]},  # type: ignore[dict-item]
            )
            if player in self.averages:
                self.averages[player] = state[f"ema.{player}"]

    def export(self, player: str, *, ema: bool = False) -> Tensors:
        live = self.averages[player] if ema else _weights(self._unwrapped(player))
        full: Tensors = {}
        for name, tensor in live.items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.world.is_main:
                full[name] = whole.detach().to("cpu", copy=True)
        return full


def _weights(module: nn.Module) -> Tensors:
    """Parameters and persistent buffers under canonical names; they share storage with the module's."""
    return cast(Tensors, dict(get_model_state_dict(module)))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
