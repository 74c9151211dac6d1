"""Which engine runs a configuration."""

from __future__ import annotations

from collections.abc import Mapping

from pretrain.optim import OptimConfig
from pretrain.parallel.config import ZERO_STAGES, DeepSpeedConfig, ParallelConfig
from pretrain.parallel.deepspeed_config import check_ds_config, require_deepspeed
from pretrain.parallel.strategy import Strategy
from pretrain.parallel.world import Launch, World


def check_strategy(
    config: ParallelConfig,
    optim: OptimConfig,
    launch: Launch,
    *,
    device_type: str,
    batch: Mapping[str, int] | None = None,
) -> None:
    """Finds what cannot be run as it was launched, before the processes join. Raises ValueError.

    device_type: "cpu" or "cuda", where the run will be. batch: see `check_ds_config`.
    """
    if config.strategy == "single" and launch.size > 1:
        raise ValueError(f"parallel.strategy is single, but {launch.size} processes were started; use ddp or fsdp2")
    if config.strategy in ZERO_STAGES:
        require_deepspeed(config.strategy)
        bf16 = config.precision == "bf16" or (config.precision == "auto" and device_type == "cuda")
        check_ds_config(config, optim, bf16=bf16, batch=batch)
    elif config.deepspeed != DeepSpeedConfig():
        raise ValueError(
            f"parallel.deepspeed is set, but parallel.strategy is {config.strategy}, which does not read it; "
            f"set parallel.strategy to {', '.join(ZERO_STAGES)}, or delete parallel.deepspeed"
        )
    if config.strategy not in ("auto", "single") and not launch.by_torchrun:
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
