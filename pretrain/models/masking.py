"""Which patches the encoder does not see.

Enters: global sample positions. Leaves: noise, and from it the kept tokens and the mask. The noise is a counter-based
hash of (seed, position, token), not a random generator's stream, so a mask is the same on every device, in every
batch that it is put into, on any rank, and after a resume.
Legend: B batch, N tokens (patches), K kept tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from data_pipes.order.hashing import WEYL_INCREMENT, finalise64
from pretrain.models.mask_sizes import num_kept


class Masking(NamedTuple):
    """A random split of the tokens into kept and hidden ones."""

    keep_ids: Tensor
    """int64 [B, K]: the kept tokens, by ascending noise."""
    restore_ids: Tensor
    """int64 [B, N]: each token's rank by noise; ranks below K are kept."""
    mask: Tensor
    """bool [B, N]: True = hidden from the encoder."""


def position_noise(positions: Tensor, num_tokens: int, seed: int) -> Tensor:
    """Uniform noise for each token of each sample, a pure function of (seed, position, token).

    Args:
        positions: int64 [B], global sample positions.
        num_tokens: N.
        seed: any integer; taken modulo 2**64.

    Returns:
        float32 [B, N] in [0, 1) with 24 random bits, on the device of `positions`, the same bits on every device.
    """
    mixed_seed = finalise64(seed, lambda word, count: word % 2**64 >> count, int)
    sample_key = _finalise(positions[:, None] * _signed(WEYL_INCREMENT) + _signed(mixed_seed))  # [B, 1]
    counter = torch.arange(1, num_tokens + 1, dtype=torch.int64, device=positions.device)
    bits = _finalise(sample_key + counter * _signed(WEYL_INCREMENT))  # [B, N]
    return _shift_right(bits, 40).to(torch.float32) * 2.0**-24


def random_masking(noise: Tensor, mask_ratio: float) -> Masking:
    """Keeps the tokens with the least noise.

    Args:
        noise: float32 or float64 [B, N].
        mask_ratio: share of hidden tokens, in [0, 1); 0 keeps (and reorders) all.

    Returns:
        Which tokens are kept, and the mask.

    Raises:
        ValueError: the ratio leaves no token, or the noise is of lower precision: in bfloat16 the noise of 196 tokens
            has many ties, which the sort resolves towards the first patches.
    """
    if noise.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"The mask noise is {noise.dtype}; expected float32. "
            "Keep mixed precision from casting the inputs of forward (FSDP2: cast_forward_inputs=False on the root)."
        )
    kept = num_kept(noise.shape[1], mask_ratio)
    shuffle_ids = noise.argsort(dim=1, stable=True)
    restore_ids = shuffle_ids.argsort(dim=1)
    return Masking(keep_ids=shuffle_ids[:, :kept], restore_ids=restore_ids, mask=restore_ids >= kept)


def _signed(value: int) -> int:
    """The int64 with the same 64 bits as `value` modulo 2**64; torch multiplies int64 modulo 2**64 too."""
    value %= 2**64
    return value - 2**64 if value >= 2**63 else value


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Logical right shift of int64: torch's own shift copies the sign bit in, so those copies are cleared."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _finalise(bits: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014) on int64 tensors."""
    finalised: Tensor = finalise64(bits, _shift_right, _signed)
    return finalised
