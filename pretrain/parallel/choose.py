"""Which engine runs a configuration."""

from __future__ import annotations

import os
from collections.abc import Mapping

from pretrain.optim import OptimConfig
from pretrain.parallel.deepspeed_config import ZERO_STAGES, check_ds_config, require_deepspeed
from pretrain.parallel.dist import World
from pretrain.parallel.strategy import ParallelConfig, Strategy


def check_strategy(
    config: ParallelConfig, optim: OptimConfig, *, device_type: str, batch: Mapping[str, int] | None = None
) -> None:
    """Finds mistakes of a DeepSpeed configuration before the processes join. Raises ValueError.

    device_type: "cpu" or "cuda", where the run will be. batch: see `check_ds_config`.
    """
    if config.strategy not in ZERO_STAGES:
        if config.deepspeed.ds_config or config.deepspeed.offload_optimizer or config.deepspeed.offload_param:
            raise ValueError(
                f"parallel.deepspeed is set, but parallel.strategy is {config.strategy}, which does not read it; "
                f"set parallel.strategy to {', '.join(ZERO_STAGES)}, or delete parallel.deepspeed"
            )
        return
    require_deepspeed(config.strategy)
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device_type == "cuda")
    check_ds_config(config, optim, bf16=bf16, batch=batch)
    if "RANK" not in os.environ:
        raise ValueError(
            f"parallel.strategy is {config.strategy}, but this process was not started by torchrun; run "
            "`torchrun --nproc-per-node N -m pretrain CONFIG`, or set parallel.strategy=auto"
        )


def make_strategy(config: ParallelConfig, optim: OptimConfig, world: World) -> Strategy:
    """DeepSpeed's for zero1, zero2 and zero3, torch's own for the others."""
    if config.strategy in ZERO_STAGES:
        from pretrain.parallel.deepspeed import DeepSpeedStrategy  # after the choice: importing DeepSpeed takes seconds

        return DeepSpeedStrategy(config, optim, world)
    from pretrain.parallel.native import NativeStrategy

    return NativeStrategy(config, optim, world)
