"""The settings of optimizers and learning rates. Read and checked without torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from data_pipes.bounds import bounded, check_bounds, check_given
from pretrain.yaml_values import typed_values


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule. Defaults: MAE's pretraining recipe (He et al., arXiv 2111.06377, table 8)."""

    base_lr: float | None = bounded(1.5e-4, least=0)
    """Learning rate per 256 samples of global batch: lr = base_lr * global_batch / 256. Give this or `lr`."""
    lr: float | None = bounded(None, least=0)
    """Peak learning rate, used as it is. Overrides nothing: set base_lr to null with it."""
    betas: tuple[float, float] = bounded((0.9, 0.95), least=0, below=1)
    """AdamW's decay rates of the first and second moments, per step."""
    eps: float = bounded(1e-8, above=0)
    """Added to AdamW's denominator."""
    weight_decay: float = bounded(0.05, least=0)
    """Decoupled weight decay on every parameter but biases and one-dimensional ones."""
    warmup_epochs: float = bounded(0.0, least=0)
    """Length of the linear warm-up from 0, in epochs. Give this or `warmup_steps`."""
    warmup_steps: int = bounded(0, least=0)
    """Length of the linear warm-up from 0, in optimizer steps at this global batch."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warm-up, per step."""
    min_lr: float = bounded(0.0, least=0)
    """Learning rate at the end of the schedule; a constant one does not fall to it."""
    clip_norm: float | None = bounded(None, above=0)
    """Largest global gradient norm; null = no clipping (the norm is still measured)."""
    ema_decay: float | None = bounded(None, above=0, below=1)
    """Decay per step of the exponential moving average of the weights; null = no average."""
    players: dict[str, Any] = field(default_factory=dict)
    """What differs for an objective's other players, by name: `discriminator: {lr: 1e-4, betas: [0.5, 0.9]}`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        check_bounds(self, "optim")
        if (self.base_lr is None) == (self.lr is None):
            raise ValueError(
                f"optim.base_lr is {self.base_lr} and optim.lr is {self.lr}; give exactly one and set the other to null"
            )
        if self.warmup_epochs and self.warmup_steps:
            raise ValueError("optim.warmup_epochs and optim.warmup_steps are both set; give one")
        for player in self.players:
            self.of(player)

    def of(self, player: str) -> OptimConfig:
        """One player's own settings: these, with what `players` changes for it.

        Raises:
            ValueError: `players` has a key for it that is no setting, or a value outside of the setting's range.
        """
        changes = dict(self.players.get(player) or {})
        known = [entry.name for entry in dataclasses.fields(self) if entry.name != "players"]
        for key in changes:
            if key not in known:
                raise ValueError(f"optim.players.{player} has the key {key!r}; known keys: {', '.join(known)}")
        for given, other in (("lr", "base_lr"), ("base_lr", "lr"), ("warmup_steps", "warmup_epochs")):
            if changes.get(given) is not None:  # one rate for all players must not be unset for one of them by hand
                changes.setdefault(other, 0.0 if given == "warmup_steps" else None)
        typed = typed_values(changes, OptimConfig, f"optim.players.{player}")
        check_given(OptimConfig, typed, f"optim.players.{player}")
        return dataclasses.replace(self, players={}, **typed)

    def peak_lr(self, global_batch: int) -> float:
        """The learning rate after the warm-up, by the linear scaling rule where `base_lr` is given."""
        if self.lr is not None:
            return self.lr
        assert self.base_lr is not None
        return self.base_lr * global_batch / 256
