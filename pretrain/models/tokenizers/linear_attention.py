"""ReLU linear attention of EfficientViT (arXiv 2205.14756) as DC-AE uses it: LiteMLA.

Enters and leaves: feature maps [B, C, H, W]. Its weights are relu(k_m) . relu(q_n), normalised over m, so that the sums
over tokens can be taken once for all queries. All of these sums are float32 whatever the autocast: over the 16,384
tokens of a 128 x 128 map they pass float16's largest number, and the epsilon of 1e-15 is below its smallest.
Legend: B batch, C channels, G heads (times scales), d channels of a head, N = H * W tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.losses.reconstruction import at_least_float32
from pretrain.models.norms import RMSNorm
from pretrain.models.precision import without_autocast
from pretrain.models.tokenizers.dc_ae_config import HEAD_WIDTH

ATTENTION_EPS = 1e-15
"""Added to the sum of a query's weights, which is 0 where no key agrees with it."""


class LiteMLA(nn.Module):
    """Linear attention over all pixels, with optional depthwise branches that see a neighbourhood (multi-scale)."""

    def __init__(self, width: int, scales: tuple[int, ...] = ()) -> None:
        """Makes the layers with torch's starting values.

        Args:
            width: C, a multiple of 32.
            scales: odd kernel sizes of the depthwise branches; none in DC-AE, (5,) in SANA's.
        """
        super().__init__()
        heads = width // HEAD_WIDTH
        self.qkv = nn.Conv2d(width, 3 * width, 1, bias=False)
        self.aggregate = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(3 * width, 3 * width, scale, padding=scale // 2, groups=3 * width, bias=False),
                nn.Conv2d(3 * width, 3 * width, 1, groups=3 * heads, bias=False),
            )
            for scale in scales
        )
        self.proj = nn.Conv2d(width * (1 + len(scales)), width, 1, bias=False)
        self.norm = RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Mixes the pixels of a map [B, C, H, W] into one of the same shape, without the residual connection."""
        qkv = self.qkv(x)
        if len(self.aggregate):
            qkv = torch.cat([qkv, *(branch(qkv) for branch in self.aggregate)], dim=1)
        with without_autocast(x.device):
            mixed = attend(qkv.flatten(2)).unflatten(2, x.shape[2:]).to(qkv.dtype)
        normed: Tensor = self.norm(self.proj(mixed))
        return normed


def attend(qkv: Tensor) -> Tensor:
    """The attention itself: linear in N, or for at most 32 tokens quadratic, whichever multiplies less.

    Call it outside of autocast, which would cast the products down.

    Args:
        qkv: [B, G * 3 * 32, N], channels interleaved per head: 32 of the query, 32 of the key, 32 of the value, and so
            on.

    Returns:
        [B, G * 32, N], at least float32.
    """
    heads = at_least_float32(qkv).unflatten(1, (-1, 3 * HEAD_WIDTH))
    query, key, value = heads.split(HEAD_WIDTH, dim=2)  # [B, G, d, N] each
    form = linear_attention if qkv.shape[2] > HEAD_WIDTH else quadratic_attention
    return form(query.relu(), key.relu(), value).flatten(1, 2)


def linear_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(V K^T) Q with a row of ones below V, which sums the weights (arXiv 2205.14756).

    Args:
        query: [B, G, d, N], not negative.
        key: as `query`.
        value: [B, G, d, N].

    Returns:
        [B, G, d, N].
    """
    sums = F.pad(value, (0, 0, 0, 1), value=1.0) @ key.transpose(-1, -2)  # [B, G, d + 1, d]
    mixed = sums @ query
    return mixed[..., :-1, :] / (mixed[..., -1:, :] + ATTENTION_EPS)


def quadratic_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """V (K^T Q), the weights normalised over the keys; arguments and result are those of `linear_attention`."""
    weights = key.transpose(-1, -2) @ query  # [B, G, keys, queries]
    return value @ (weights / (weights.sum(dim=-2, keepdim=True) + ATTENTION_EPS))


def attention_flops(channels: int, tokens: int) -> float:
    """Forward FLOPs of `attend` on one sample, whichever form it takes."""
    heads = channels // HEAD_WIDTH
    if tokens > HEAD_WIDTH:
        return 2.0 * heads * 2 * (HEAD_WIDTH + 1) * HEAD_WIDTH * tokens
    return 2.0 * heads * 2 * HEAD_WIDTH * tokens**2
