"""What the loop asks of an engine, whatever shards it: the abstract `Strategy` and its configuration.

A strategy prepares an objective's players, runs backward and optimizer steps, and gives and takes state under
canonical names (no wrapper prefixes), so that a checkpoint of one strategy loads in another. A strategy that cannot do
what the configuration asks raises; it never degrades silently.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from pretrain.parallel.deepspeed_config import DeepSpeedConfig

if TYPE_CHECKING:
    from pretrain.objectives.base import Objective

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class ParallelConfig:
    """How a step is spread over processes."""

    strategy: Literal["auto", "single", "ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3"] = "auto"
    """auto = single with one process, ddp with several. zero1, zero2 and zero3 need the extra `deepspeed`."""
    shards: int | None = None
    """Processes per shard group under hsdp; null = those of one node. World size must be a multiple of it."""
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
    prefetch: int = 1
    """fsdp2 and hsdp: blocks whose weights are gathered ahead of the one that computes; 0 = torch's implicit rule."""
    timeout_s: float = 1800.0
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


class Strategy(ABC):
    """Runs one objective on one or many processes. Methods are collectives: every rank calls them in the same order."""

    objective: Objective
    bf16: bool
    """Whether forward passes compute in bf16."""

    @abstractmethod
    def prepare(self, build: Callable[[], Objective], initialize: Callable[[Objective], None]) -> Objective:
        """Builds the objective, with the same weights in every strategy, wraps its players and makes their optimizers.

        `build` makes the objective on the current default device (meta included); `initialize` fills the weights of
        one that was built on the CPU.
        """

    @abstractmethod
    def accumulate(self, last: bool) -> None:
        """Announces a micro-batch; gradients are reduced over ranks in the last one of a step."""

    @abstractmethod
    def autocast(self) -> AbstractContextManager[None]:
        """The precision context of forward passes."""

    @abstractmethod
    def backward(self, loss: Tensor, player: str) -> None:
        """Adds the gradients of `loss` to the player's parameters."""

    @abstractmethod
    def step(self, player: str, lr: float) -> Tensor:
        """Clips, steps the player's optimizer and its moving average, and clears gradients.

        Returns the global gradient norm before clipping, 0-d float32 on the device; the host has not waited for it.
        Where it is not finite every rank leaves weights and optimizer as they are.
        """

    @abstractmethod
    def state(self) -> dict[str, Tensors]:
        """The training state as flat maps of canonical names to (sharded) tensors: `model.<player>`,
        `optimizer.<player>` and, with a moving average, `ema.<player>`. The tensors are the live ones."""

    @abstractmethod
    def load_state(self, state: dict[str, Tensors]) -> None:
        """Takes over what `state` gave, after a checkpoint was read into it."""

    @abstractmethod
    def export(self, player: str, *, ema: bool = False) -> Tensors:
        """Full fp32 weights on the CPU of rank 0, under canonical names; empty on other ranks."""
