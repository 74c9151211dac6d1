"""Multi-head self-attention with timm's parameter names, arranged to copy less than timm's.

Enters and leaves: tokens [B, N, D]. timm stacks query, key and value into one [3, B, heads, N, D/heads] tensor, whose
gradient is copied twice on the way back; slices of the last axis need one copy. Measured on two CPU cores, forward and
backward of one layer: 1 to 2% faster in float32 at 50 and 197 tokens.
Legend: B batch, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """Stands in for `timm.layers.Attention(width, heads, qkv_bias=True)`: `qkv` and `proj`, bidirectional."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.attend: Callable[[Tensor, Tensor, Tensor], Tensor] = attend
        """How this layer computes attention; `pretrain/memory` sets what it would do on another device."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Mixes the tokens of each sample.

        Args:
            tokens: [B, N, D].

        Returns:
            [B, N, D], without the residual connection.
        """
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, N, D/heads]
            for part in self.qkv(tokens).chunk(3, dim=-1)
        )
        mixed = self.attend(query, key, value)
        projected: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return projected


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Scaled dot-product attention (Vaswani et al., arXiv 1706.03762, equation 1).

    On a CPU in bfloat16 it computes in float32: more exact, and the layer's forward and backward take 14% less time
    (56.7 against 65.9 ms for 8 x 197 tokens, 512 wide, 16 heads, two cores), as torch's bfloat16 kernel is slow there.

    Args:
        query: [B, heads, N, D/heads].
        key: as `query`.
        value: as `query`.

    Returns:
        [B, heads, N, D/heads], in the type of `query`.
    """
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        with torch.autocast("cpu", enabled=False):
            mixed = F.scaled_dot_product_attention(query.float(), key.float(), value.float())
        return mixed.to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value)
