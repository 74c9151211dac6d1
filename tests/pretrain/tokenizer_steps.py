"""Batches for tokenizer objectives, and what the loop does with their turns."""

from __future__ import annotations

import torch
from torch import Tensor

from data_pipes.batch import Batch
from pretrain.objectives.base import Turn
from pretrain.objectives.tokenizer import TokenizerObjective


def batch(
    channels: int = 3,
    positions: tuple[int, ...] = (0, 1, 2, 3),
    dtype: torch.dtype = torch.uint8,
    size: tuple[int, int] = (24, 32),
) -> Batch:
    """Images that are a function of their positions, as the loader's are."""
    images = torch.stack(
        [
            torch.randint(0, 256, (channels, *size), generator=torch.Generator().manual_seed(position))
            for position in positions
        ]
    )
    return Batch(
        images=(images * 257 if dtype == torch.uint16 else images).to(dtype),
        labels=torch.full((len(positions),), -1),
        positions=torch.tensor(positions),
        keys=[str(position) for position in positions],
    )


def play(objective: TokenizerObjective, data: Batch, step: int, lr: float = 0.0) -> dict[str, Turn]:
    """The loop's part: backward, and a step of plain gradient descent where `lr` is not 0."""
    turns: dict[str, Turn] = {}
    for turn in objective.turns(data, step):
        turn.loss.backward()
        turns[turn.player] = turn
        if lr:
            with torch.no_grad():
                for parameter in objective.players[turn.player].parameters():
                    if parameter.grad is not None:
                        parameter.sub_(lr * parameter.grad)
                        parameter.grad = None
    return turns


def gradients(objective: TokenizerObjective, player: str) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in objective.players[player].named_parameters() if p.grad is not None}
