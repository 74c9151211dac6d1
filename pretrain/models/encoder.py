"""What transformer encoders of images (`ViT`) and of clips (`VideoViT`) share: blocks over the patches that are kept.

Enters: normalised images or clips and, for masked training, the ids of the patches to look at. Leaves: tokens. The
parameter names are those of timm and of the original MAE, so their checkpoints load without renaming.
Legend: B batch, N patches, K kept patches, D width, V values of a patch, C channels, T frames, H/W pixels, t/p/q a
patch's frames (of clips) and its height/width in pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.attention import SelfAttention

LAYER_NORM_EPS = 1e-6
"""Of all layer norms, as in the original MAE; torch's default is 1e-5."""
TOKEN_STD = 0.02
"""Standard deviation of the starting values of class and mask tokens."""


class EncoderConfig(Protocol):
    """What the configurations of both encoders have."""

    @property
    def in_channels(self) -> int:
        """Channels of the input, C."""

    @property
    def width(self) -> int:
        """Features per token, D."""

    @property
    def depth(self) -> int:
        """Number of transformer blocks."""

    @property
    def heads(self) -> int:
        """Attention heads per block."""

    @property
    def mlp_ratio(self) -> float:
        """Hidden features of a block's MLP / width."""


class Encoder(nn.Module, ABC):
    """What the encoders of images (`ViT`) and of clips (`VideoViT`) share: blocks over the patches that are kept.

    A subclass cuts the input into patches and says where they lie. It calls `init_weights` when it is complete.
    """

    cls_token: nn.Parameter
    """[1, 1, D]; not there where the encoder has no class token."""
    positions: nn.Module
    """The module that gives positions; not there where they are no module."""

    def __init__(
        self,
        config: EncoderConfig,
        input_size: tuple[int, ...],
        patch_size: tuple[int, ...],
        *,
        has_class_token: bool,
        positions: nn.Module | None = None,
    ) -> None:
        """Makes the modules, in the order that their names have in state dicts.

        Args:
            config: the shape of the transformer.
            input_size: (H, W) in pixels, or (T, H, W) for clips.
            patch_size: (p, q) in pixels, or (t, p, q) for clips; divides `input_size`.
            has_class_token: whether a class token stands in front of the patches' tokens.
            positions: the module that gives positions; None where they are no module.
        """
        super().__init__()
        self.input_shape = (config.in_channels, *input_size)
        self.has_class_token = has_class_token
        self.patch_embed = nn.Sequential(  # for the sake of timm's name, patch_embed.proj
            OrderedDict(proj=PatchProjection(config.in_channels, patch_size, config.width))
        )
        if has_class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        if positions is not None:
            self.positions = positions
        self.blocks = transformer_blocks(config.width, config.depth, config.heads, config.mlp_ratio)
        self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)

    def forward(self, inputs: Tensor, keep_ids: Tensor | None = None) -> Tensor:
        """Encodes the kept patches, or all of them.

        Args:
            inputs: float32, normalised: images [B, C, H, W] or clips [B, C, T, H, W].
            keep_ids: int64 [B, K] in [0, N); None keeps all N in order.

        Returns:
            [B, K, D] after the final norm; with a class token [B, 1 + K, D], the class token first.

        Raises:
            ValueError: the inputs do not have the configured shape.
        """
        tokens = self.embed(inputs, keep_ids)
        for block in self.blocks:
            tokens = block(tokens)
        normed: Tensor = self.norm(tokens)
        return normed

    def features(self, inputs: Tensor, num_blocks: int = 1) -> list[tuple[Tensor, Tensor]]:
        """Unmasked features of the last blocks, first to last, each after the final norm.

        Args:
            inputs: as for `forward`.
            num_blocks: of how many blocks, in [1, depth].

        Returns:
            Pairs (summary [B, D], tokens [B, N, D]). The summary is the class token, or the mean of the tokens where
            the encoder has none.

        Raises:
            ValueError: `num_blocks` is outside its range, or the inputs do not have the configured shape.
        """
        if not 1 <= num_blocks <= len(self.blocks):
            raise ValueError(f"num_blocks is {num_blocks}; expected 1 to {len(self.blocks)}, the encoder's depth.")
        tokens = self.embed(inputs, None)
        features = []
        for index, block in enumerate(self.blocks):
            tokens = block(tokens)
            if index >= len(self.blocks) - num_blocks:
                normed = self.norm(tokens)
                with_class_token = self.has_class_token
                features.append((normed[:, 0], normed[:, 1:]) if with_class_token else (normed.mean(dim=1), normed))
        return features

    def embed(self, inputs: Tensor, keep_ids: Tensor | None) -> Tensor:
        """Projects the kept patches, adds their positions, and prepends the class token where there is one.

        The patches are selected before the projection: with 75% hidden that is a quarter of its work.

        Args:
            inputs: as for `forward`.
            keep_ids: as for `forward`.

        Returns:
            [B, K, D], or [B, 1 + K, D] with a class token.

        Raises:
            ValueError: the inputs do not have the configured shape.
        """
        if inputs.shape[1:] != self.input_shape:
            raise ValueError(self._wrong_shape(inputs))
        patches = self.split(inputs)  # [B, N, V]
        if keep_ids is not None:
            patches = patches.gather(1, keep_ids[..., None].expand(-1, -1, patches.shape[-1]))
        tokens: Tensor = self.patch_embed(patches) + self.position_embedding(keep_ids)
        if not self.has_class_token:
            return tokens
        cls_token = self.cls_token + self.class_position()
        return torch.cat((cls_token.expand(inputs.shape[0], -1, -1), tokens), dim=1)

    @abstractmethod
    def split(self, inputs: Tensor) -> Tensor:
        """Cuts the inputs into patches [B, N, V], with values in the order (c, p, q), or (c, t, p, q) for clips."""

    @abstractmethod
    def position_embedding(self, keep_ids: Tensor | None) -> Tensor:
        """Of the kept patches [B, K, D], or of all of them [1, N, D] for None."""

    @abstractmethod
    def class_position(self) -> Tensor:
        """The class token's position embedding, [1, 1, D]."""

    @abstractmethod
    def init_weights(self) -> None:
        """Fills all parameters and buffers with their starting values."""

    def _wrong_shape(self, inputs: Tensor) -> str:
        expected = f"[batch, {', '.join(map(str, self.input_shape))}]"
        if len(self.input_shape) == 3:
            kind, size = "images", "image size"
        else:
            kind, size, expected = "clips", "frames, size", f"{expected} (channels, frames, height, width)"
        return (
            f"The {kind} have shape {list(inputs.shape)}; expected {expected}. "
            f"Make the data's {size} and channels agree with the model's."
        )


class PatchProjection(nn.Module):
    """A convolution's parameters (kernel = stride = patch), applied as the linear map that it is to single patches."""

    def __init__(self, in_channels: int, patch_size: tuple[int, ...], width: int) -> None:
        """Leaves the parameters uninitialised; see `init_layer`.

        Args:
            in_channels: C.
            patch_size: (p, q) in pixels, or (t, p, q) for clips.
            width: D.
        """
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, in_channels, *patch_size))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, patches: Tensor) -> Tensor:
        """Projects patches [..., V], with values in the order (c, p, q) or (c, t, p, q), to tokens [..., D]."""
        return F.linear(patches.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class Block(nn.Module):
    """A pre-norm transformer block (ViT, arXiv 2010.11929, equations 2 and 3) with the parameter names of timm's.

    It is our own because importing timm's takes longer than importing torch; tests compare the two.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        """Leaves the parameters at torch's starting values; see `init_layer`.

        Args:
            width: D.
            heads: attention heads; divides `width`.
            mlp_ratio: hidden features of the MLP / width.
        """
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn = SelfAttention(width, heads)
        self.drop_path1: nn.Module = nn.Identity()
        """Stochastic depth, where somebody fine-tunes with it; likewise `drop_path2`."""
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(width, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, width)))
        self.drop_path2: nn.Module = nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        tokens = tokens + self.drop_path1(self.attn(self.norm1(tokens)))
        mixed: Tensor = tokens + self.drop_path2(self.mlp(self.norm2(tokens)))
        return mixed


def transformer_blocks(width: int, depth: int, heads: int, mlp_ratio: float) -> nn.ModuleList:
    """`depth` blocks in the order in which tokens pass through them."""
    return nn.ModuleList(Block(width, heads, mlp_ratio) for _ in range(depth))


def init_layer(module: nn.Module) -> None:
    """Initialises one layer, for `nn.Module.apply`: Linears and the flattened patch projection xavier-uniform with zero
    bias, LayerNorms 1 and 0.

    It matters early: with N(0, 0.02) a small model stays on its first plateau for minutes that it leaves within 30 s
    with this (measured on CIFAR-10).
    """
    if isinstance(module, nn.Linear | PatchProjection):
        fan_out, fan_in = module.weight.shape[0], module.weight.shape[1:].numel()
        bound = (6.0 / (fan_in + fan_out)) ** 0.5
        nn.init.uniform_(module.weight, -bound, bound)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
