"""What the loop asks of an engine, whatever shards it: the abstract `Strategy` and its configuration.

A strategy prepares an objective's players, runs backward and optimizer steps, and gives and takes state under
canonical names (no wrapper prefixes), so that a checkpoint of one strategy loads in another. A strategy that cannot do
what the configuration asks raises; it never degrades silently.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from pretrain.objectives.base import Objective

Tensors = dict[str, Tensor]
"""Tensors by their canonical names, without wrapper prefixes."""


class Strategy(ABC):
    """Runs one objective on one or many processes. Methods are collectives: every rank calls them in the same order."""

    objective: Objective
    """With the prepared players; there after `prepare`."""
    bf16: bool
    """Whether forward passes compute in bf16."""

    @abstractmethod
    def prepare(self, build: Callable[[], Objective], initialize: Callable[[Objective], None]) -> Objective:
        """Builds the objective, with the same weights in every strategy, wraps its players and makes their optimizers.

        Args:
            build: makes the objective on the current default device, meta included.
            initialize: fills the weights of one that was built on the CPU.

        Returns:
            The objective, with prepared players.
        """

    @abstractmethod
    def accumulate(self, last: bool) -> None:
        """Announces a micro-batch; gradients are reduced over ranks in the last one of a step.

        Args:
            last: whether it is the step's last one.
        """

    @abstractmethod
    def autocast(self) -> AbstractContextManager[None]:
        """The precision context of forward passes."""

    @abstractmethod
    def backward(self, loss: Tensor, player: str) -> None:
        """Adds the gradients of `loss` (0-d) to the player's parameters."""

    @abstractmethod
    def step(self, player: str, lr: float) -> Tensor:
        """Clips, steps the player's optimizer and its moving average, and clears gradients.

        Where the gradient norm is not finite every rank leaves weights and optimizer as they are.

        Args:
            player: key of `Objective.players`.
            lr: learning rate of this step.

        Returns:
            The global gradient norm before clipping, 0-d float32 on the device; the host has not waited for it.
        """

    @abstractmethod
    def state(self) -> dict[str, Tensors]:
        """The training state, as the live and possibly sharded tensors.

        Returns:
            Flat maps of canonical names to tensors: `model.<player>`, `optimizer.<player>` and, with a moving average,
            `ema.<player>`.
        """

    @abstractmethod
    def load_state(self, state: dict[str, Tensors]) -> None:
        """Takes over what `state` gave, after a checkpoint was read into it."""

    @abstractmethod
    def export(self, player: str, *, ema: bool = False) -> Tensors:
        """A player's full weights.

        Args:
            player: key of `Objective.players`.
            ema: take the moving average instead of the weights themselves.

        Returns:
            fp32 tensors on the CPU of rank 0, under canonical names; empty on other ranks.
        """
