"""Which engine runs a configuration."""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed as dist

from pretrain.optim_config import OptimConfig
from pretrain.parallel.config import ZERO_STAGES, DeepSpeedConfig, ParallelConfig
from pretrain.parallel.deepspeed_config import check_ds_config, require_deepspeed
from pretrain.parallel.launch import Launch
from pretrain.parallel.strategy import Strategy
from pretrain.parallel.world import World


def check_strategy(
    config: ParallelConfig,
    optim: OptimConfig,
    launch: Launch,
    *,
    device_type: str,
    batch: Mapping[str, int] | None = None,
) -> None:
    """Finds what cannot be run as it was launched, before the processes join.

    Args:
        config: the strategy and its settings.
        optim: what a user's DeepSpeed file is compared with.
        launch: what the launcher started.
        device_type: "cpu" or "cuda", where the run will be.
        batch: see `check_ds_config`.

    Raises:
        ValueError: the strategy cannot do what the configuration asks, or the launcher started other processes than it
            needs.
    """
    if config.strategy in ZERO_STAGES:
        require_deepspeed(config.strategy)
        check_ds_config(config, optim, bf16=config.computes_in_bf16(device_type), batch=batch)
    elif config.deepspeed != DeepSpeedConfig():
        raise ValueError(
            f"parallel.deepspeed is set, but parallel.strategy is {config.strategy}, which does not read it; "
            f"set parallel.strategy to {', '.join(ZERO_STAGES)}, or delete parallel.deepspeed"
        )
    _check_processes(config.strategy, launch.size, launch.by_torchrun)


def make_strategy(config: ParallelConfig, optim: OptimConfig, world: World) -> Strategy:
    """DeepSpeed's engine for zero1, zero2 and zero3, torch's own for the others.

    Raises:
        ValueError: the strategy needs other processes than those that joined, or cannot do what the configuration asks.
    """
    _check_processes(config.strategy, world.size, dist.is_initialized())
    if config.strategy in ZERO_STAGES:
        from pretrain.parallel.deepspeed import DeepSpeedStrategy  # after the choice: importing DeepSpeed takes seconds

        return DeepSpeedStrategy(config, optim, world)
    from pretrain.parallel.native import NativeStrategy

    return NativeStrategy(config, optim, world)


def _check_processes(strategy: str, num_processes: int, has_process_group: bool) -> None:
    """Compares a strategy with the processes that were started.

    Raises:
        ValueError: it is for one process alone, or needs a process group that is not there.
    """
    if strategy == "single" and num_processes > 1:
        raise ValueError(f"parallel.strategy is single, but {num_processes} processes were started; use ddp or fsdp2")
    if strategy not in ("auto", "single") and not has_process_group:
        raise ValueError(
            f"parallel.strategy is {strategy}, but this process was not started by torchrun; run "
            "`torchrun --nproc-per-node N -m pretrain CONFIG`, or set parallel.strategy=auto"
        )
