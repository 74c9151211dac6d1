"""`--dry-run`: finds the mistakes of a configuration and says what each rank will need, without starting anything.

Enters: a configuration and a number of processes. Leaves: the batch accounting and a `MemoryEstimate`, as numbers or as
a table. No process group, no accelerator, no run folder.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.table import Table

from pretrain.config import ConfigError, RunConfig
from pretrain.memory.estimate import MemoryEstimate, estimate
from pretrain.parallel.launch import Launch
from pretrain.preflight import check, total_samples


def dry_run(config: RunConfig, processes: int, ranks_per_node: int | None = None) -> dict[str, Any]:
    """Checks the configuration and its data as a run on `processes` would, and estimates the memory.

    Args:
        config: of the run.
        processes: over all nodes.
        ranks_per_node: None: all processes are on one node.

    Returns:
        What was found, ready for JSON: the batch accounting, and `MemoryEstimate.as_dict` as "memory".

    Raises:
        ValueError: a mistake in the configuration or the data, or processes that do not fit them.
    """
    per_node = ranks_per_node or processes
    if processes < 1 or per_node < 1:
        raise ConfigError(f"--processes is {processes}, --processes-per-node {per_node}; expected 1 or more")
    launch = Launch(size=processes, ranks_per_node=per_node, by_torchrun=processes > 1)
    # Whether this machine has the run's device is not asked: a plan is often made elsewhere.
    plan, data = check(dataclasses.replace(config, device="cpu"), launch)
    found = estimate(config, processes, ranks_per_node=per_node)
    samples = total_samples(config, data.num_samples)
    return {
        "run": str(config.run_dir),
        "processes": processes,
        "training_samples": data.num_samples,
        "steps": samples // plan.global_batch,
        "global_batch": plan.global_batch,
        "memory": found.as_dict(),
    }


def table(result: dict[str, Any]) -> Table:
    """The memory of one rank, for people to read.

    Args:
        result: of `dry_run`.
    """
    memory = result["memory"]
    title = (
        f"{memory['strategy']} on {result['processes']} x {memory['device']}, {memory['precision']}: "
        f"{memory['num_parameters'] / 1e6:.1f}M parameters, {result['steps']:,} steps of {result['global_batch']:,} = "
        f"{result['processes']} x {memory['accumulate']} x {memory['micro_batch']}"
    )
    shown = Table("per rank", "bytes", "what it is", title=title, title_justify="left")
    shown.columns[1].justify = "right"
    for field in dataclasses.fields(MemoryEstimate):
        if field.name in _ROWS and memory[field.name]:
            bold = field.name == "peak"
            shown.add_row(field.name, _gigabytes(memory[field.name]), _ROWS[field.name], style="bold" if bold else "")
    return shown


_ROWS = {
    "weights": "fp32 weights and buffers",
    "gradients": "fp32",
    "optimizer": "AdamW's moments; zero: and fp32 masters",
    "average": "moving average of the weights",
    "gathered": "whole weights and gradients of the blocks in use",
    "batch": "the micro-batch",
    "activations": "kept from the forward pass for the backward pass",
    "peak": "highest sum over a step",
    "host_offload": "host memory: what DeepSpeed keeps there",
    "host_staging": "host memory: the copy that a checkpoint is written from",
}
"""Field of `MemoryEstimate` -> what the table says of it."""


def _gigabytes(size_bytes: int) -> str:
    """A size for people; below 0.1 GB in MB."""
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e8 else f"{size_bytes / 1e6:.2f} MB"
