"""DeepSpeed's configuration: what Tessera sets, merged with a user's own ds_config.json.

Enters: the run's configuration and the path of a JSON file. Leaves: the dictionary that `deepspeed.initialize` takes.
Every field of the file is either decided by Tessera (then an equal value is accepted, and another one is an error),
passed through (communication, bucket sizes, logging), or refused with the reason: none is ignored silently. Nothing
here imports deepspeed or touches a device, so that all of it runs before the processes join.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.parallel.config import ZERO_STAGES

if TYPE_CHECKING:
    from pretrain.optim_config import OptimConfig
    from pretrain.parallel.config import ParallelConfig


_BATCH = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch and train.micro_batch",
}
"""The batch accounting is the loop's; DeepSpeed is told one sample and one pass, and each boundary as it comes."""

_PASSED_THROUGH = {
    "": {
        *("communication_data_type", "prescale_gradients", "gradient_predivide_factor", "steps_per_print"),
        *("wall_clock_breakdown", "memory_breakdown", "dump_state", "comms_logger", "flops_profiler"),
        *("tensorboard", "wandb", "comet", "csv_monitor"),
    },
    "zero_optimization": {
        *("allgather_partitions", "allgather_bucket_size", "overlap_comm", "reduce_scatter", "reduce_bucket_size"),
        *("contiguous_gradients", "use_multi_rank_bucket_allreduce", "ignore_unused_parameters", "sub_group_size"),
        *("stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size"),
        *("stage3_param_persistence_threshold", "stage3_model_persistence_threshold"),
        *("stage3_module_granularity_threshold", "stage3_use_all_reduce_for_fetch_params"),
        *("stage3_allgather_sequential", "stage3_gather_16bit_weights_on_model_save", "memory_efficient_linear"),
        *("log_trace_cache_warnings", "enable_sanity_checks"),
    },
    "zero_optimization.offload_optimizer": {"pin_memory", "buffer_count", "fast_init"},
    "zero_optimization.offload_param": {"pin_memory", "buffer_count", "buffer_size", "max_in_cpu"},
    "torch_autocast": {"lower_precision_safe_modules"},
}
"""Fields that change how fast a step is and not what it computes, by section."""

_REFUSED = {
    "optimizer": "the optimizer is AdamW by `optim`; set optim.lr, optim.betas, optim.eps and optim.weight_decay",
    "scheduler": "the learning rate follows `optim`; set optim.schedule, optim.warmup_steps and optim.min_lr",
    "activation_checkpointing": "it has no effect on these models; set parallel.activation_checkpointing",
    "amp": "Apex is gone from DeepSpeed; set parallel.precision",
    "checkpoint": "Tessera writes the checkpoints; set `checkpoint`",
    "zero_optimization.cpu_offload": "it is an old name; set parallel.deepspeed.offload_optimizer",
    "zero_optimization.cpu_offload_param": "it is an old name; set parallel.deepspeed.offload_param",
    "zero_optimization.offload_optimizer.nvme_path": "NVMe offload is not supported; offload to the CPU",
    "zero_optimization.offload_param.nvme_path": "NVMe offload is not supported; offload to the CPU",
    "zero_optimization.offload_optimizer.ratio": "it needs DeepSpeed's own Adam; all of the optimizer is offloaded",
}
"""Why a field is refused and what to set instead, by its dotted name."""


def require_deepspeed(strategy: str) -> None:
    """Checks that the package is there, without importing it.

    Raises:
        ValueError: DeepSpeed, which `strategy` needs, is not installed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError(
            f"parallel.strategy is {strategy}, which needs DeepSpeed, and it is not installed; "
            "run `pip install 'tessera-pretrain[deepspeed]'`, or use ddp or fsdp2"
        )


def check_ds_config(
    parallel: ParallelConfig, optim: OptimConfig, *, bf16: bool, batch: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """What `deepspeed.initialize` takes: Tessera's decisions and the user's file. A pure function of both.

    Args:
        parallel: the strategy, one of `ZERO_STAGES`, and the user's file.
        optim: what gradient clipping follows.
        bf16: whether forward passes compute in bf16 on the run's device.
        batch: the run's values of DeepSpeed's three batch fields, compared with the file's; None where they were
            compared before.

    Returns:
        DeepSpeed's configuration, nested as its JSON file is.

    Raises:
        ValueError: the file cannot be read or disagrees with the run, or the strategy cannot do what is asked; the
            message names the field, both values and what to do.
    """
    stage = ZERO_STAGES[parallel.strategy]
    if parallel.deepspeed.offload_param and stage != 3:
        raise ValueError(
            f"parallel.deepspeed.offload_param is true, but parallel.strategy is {parallel.strategy}; only zero3 "
            "partitions the parameters. Use zero3, or offload_optimizer alone"
        )
    if parallel.compile == "blocks" and stage == 3:
        raise ValueError(
            "parallel.compile is blocks, but zero3 gathers weights by hooks inside of the blocks, which torch.compile "
            "cannot trace; set parallel.compile=off, or use zero2 or fsdp2"
        )
    decided = _decided_fields(stage, parallel, optim, bf16=bf16)
    path = parallel.deepspeed.ds_config
    user = {} if path is None else _flatten(_read(Path(path)))
    for name, value in user.items():
        if name in _BATCH:
            if batch is not None and value != batch[name]:
                raise _conflict(path, name, value, batch[name], f"set {_BATCH[name]} and delete the field")
        elif name in decided:
            wanted, remedy = decided[name]
            if value != wanted:
                raise _conflict(path, name, value, wanted, remedy)
        else:
            _check_passed_through(path, name, value, known=[*decided, *_BATCH])
    merged: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    for name, (value, _) in decided.items():
        _set_nested(merged, name, value)
    for name, value in user.items():
        if name not in decided and name not in _BATCH:
            _set_nested(merged, name, value)
    return merged


def _decided_fields(
    stage: int, parallel: ParallelConfig, optim: OptimConfig, *, bf16: bool
) -> dict[str, tuple[Any, str]]:
    """Tessera's value of each field that it decides, and what to do about another one."""
    precision = "set parallel.precision to fp32 or bf16 (fp32 weights under autocast) and delete the field"
    decided: dict[str, tuple[Any, str]] = {
        "zero_optimization.stage": (stage, "set parallel.strategy to zero1, zero2 or zero3"),
        "gradient_clipping": (optim.clip_norm or 0.0, "set optim.clip_norm (null = 0)"),
        "fp16.enabled": (False, precision),
        "bf16.enabled": (False, precision),
        "torch_autocast.enabled": (bf16, precision),
        "zero_allow_untested_optimizer": (True, "delete the field"),
        "zero_force_ds_cpu_optimizer": (False, "delete the field; the optimizer is torch's fused AdamW"),
        "managed_gradient_accumulation": (True, "delete the field"),
    }
    if stage == 3 and parallel.activation_checkpointing == "selective":
        # It adds the bias in place to a product that selective checkpointing keeps, and adds it again in the
        # recomputation: wrong gradients, and no error.
        decided["zero_optimization.memory_efficient_linear"] = (
            False,
            "delete it, or use full activation checkpointing",
        )
    if bf16:
        decided["torch_autocast.dtype"] = ("bfloat16", precision)
    for name, wanted in (
        ("offload_optimizer", parallel.deepspeed.offload_optimizer),
        ("offload_param", parallel.deepspeed.offload_param),
    ):
        device = "cpu" if wanted else "none"
        decided[f"zero_optimization.{name}.device"] = (device, f"set parallel.deepspeed.{name}; other devices than cpu "
            "are not supported")  # fmt: skip
    return decided


def _check_passed_through(path: str | None, name: str, value: Any, known: list[str]) -> None:
    """Checks a field of the user's file that Tessera does not decide; `known` are the names that it does.

    Raises:
        ValueError: the field is refused or not supported; the message says why.
    """
    for refused, reason in _REFUSED.items():
        if name == refused or name.startswith(f"{refused}."):
            raise ValueError(f"{path}: {refused} is set, but {reason}, and delete the field")
    section, _, key = name.rpartition(".")
    if key in _PASSED_THROUGH.get(section, ()) or name.split(".")[0] in _PASSED_THROUGH[""]:
        return
    every = known + [f"{s}.{k}" if s else k for s, keys in _PASSED_THROUGH.items() for k in keys]
    close = difflib.get_close_matches(name, every, n=1, cutoff=0.6)
    raise ValueError(
        f"{path}: {name} is {value!r}; Tessera does not support this field of DeepSpeed"
        + (f" (did you mean {close[0]}?)" if close else "")
        + ". Delete it"
    )


def _conflict(path: str | None, name: str, value: Any, wanted: Any, remedy: str) -> ValueError:
    return ValueError(f"{path}: {name} is {json.dumps(value)}, but this run has {json.dumps(wanted)}; {remedy}")


def _read(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"parallel.deepspeed.ds_config is {path}, which cannot be read: {error}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"parallel.deepspeed.ds_config: {path} is not valid JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"parallel.deepspeed.ds_config: {path} holds {type(loaded).__name__}; expected an object")
    return loaded


def _flatten(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted names; "auto" (transformers' word for "as the trainer decides") counts as not given."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        elif value != "auto":
            flat[f"{prefix}{key}"] = value
    return flat


def _set_nested(nested: dict[str, Any], name: str, value: Any) -> None:
    """Sets a dotted name."""
    *sections, key = name.split(".")
    for section in sections:
        nested = nested.setdefault(section, {})
    nested[key] = value
