"""How a step is spread over processes: the `parallel` part of a run's configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from data_pipes.bounds import bounded

ZERO_STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}
"""Names of `parallel.strategy` that DeepSpeed runs."""


@dataclass(frozen=True)
class DeepSpeedConfig:
    """What only the strategies zero1, zero2 and zero3 have."""

    ds_config: str | None = None
    """Path of a DeepSpeed JSON file that is merged; fields that Tessera decides may not differ. null: no file."""
    offload_optimizer: bool = False
    """Keep fp32 master weights and AdamW's moments in host memory, and step there."""
    offload_param: bool = False
    """zero3 only: keep each rank's share of the weights in host memory between uses."""


@dataclass(frozen=True)
class ParallelConfig:
    """How a step is spread over processes."""

    strategy: Literal["auto", "single", "ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3"] = "auto"
    """auto = single with one process, ddp with several. zero1, zero2 and zero3 need the extra `deepspeed`."""
    shards: int | None = bounded(None, least=1)
    """Processes per shard group under hsdp; null = those of one node. The world size must be a multiple of it."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto = bf16 on CUDA, fp32 on CPU. Weights, optimizer and losses stay fp32."""
    compile: Literal["auto", "off", "blocks"] = "auto"
    """torch.compile of each transformer block; auto = on CUDA only (on CPU it needs a C++ compiler)."""
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """What a block computes again in the backward pass, to keep less in memory: full = everything (about a third more
    compute), selective = all but matrix products and attention (which cost the most to repeat)."""
    reshard_after_forward: Literal["auto", "always", "never"] = "auto"
    """fsdp2 and hsdp: which blocks free their gathered weights between forward and backward. auto = all but the last
    one, whose backward comes at once; none where a model's gathered weights are small (1 GiB)."""
    prefetch: int = bounded(1, least=0)
    """fsdp2 and hsdp: blocks whose weights are gathered ahead of the one that computes; 0 = torch's implicit rule."""
    timeout_s: float = bounded(1800.0, above=0)
    """Seconds that a collective may take before the run is given up."""
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    """What only zero1, zero2 and zero3 read."""

    def __post_init__(self) -> None:
        for name, known in (
            ("activation_checkpointing", ("none", "full", "selective")),
            ("reshard_after_forward", ("auto", "always", "never")),
        ):
            value = getattr(self, name)
            if value not in known:  # a YAML file's values are checked by their type; these two were once true or false
                raise ValueError(f"parallel.{name} is {value!r}; expected one of {', '.join(known)}")
        if self.prefetch < 0:
            raise ValueError(f"parallel.prefetch is {self.prefetch}; expected 0 or more blocks")

    def computes_in_bf16(self, device_type: str) -> bool:
        """Whether forward passes run under bf16 autocast on a device of this type ("cpu" or "cuda")."""
        return self.precision == "bf16" or (self.precision == "auto" and device_type == "cuda")

    def compiles_blocks(self, device_type: str) -> bool:
        """Whether blocks are compiled on a device of this type ("cpu" or "cuda")."""
        return self.compile == "blocks" or (self.compile == "auto" and device_type == "cuda")
