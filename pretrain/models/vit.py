"""Vision transformer encoder that can skip hidden patches.

Enters: normalised images and, for masked training, the ids of the patches to look at. Leaves: tokens. The blocks are
timm's, and the parameter names those of timm and of the original MAE, so their checkpoints load without renaming.
Legend: B batch, N patches (row-major over the grid), K kept patches, D width, C channels, H/W pixels, p/q pixels of a
patch's height/width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from pretrain.losses.pixels import split_patches
from pretrain.models.attention import SelfAttention
from pretrain.models.positions import sincos_position_embedding

LAYER_NORM_EPS = 1e-6
TOKEN_STD = 0.02

VIT_SIZES: dict[str, tuple[int, int, int]] = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
"""Width, depth and heads by name. The literature's huge one has patches of 14 x 14, the others 16 x 16."""


@dataclass(frozen=True)
class ViTConfig:
    """Shape of a vision transformer. The defaults are ViT-B/16 at 224 x 224."""

    image_size: tuple[int, int] = (224, 224)
    """Height and width of the input, in pixels."""
    patch_size: tuple[int, int] = (16, 16)
    """Height and width of a patch, in pixels; divides image_size."""
    in_channels: int = 3
    """Channels of the input."""
    width: int = 768
    """Features per token; divisible by heads, and by 4 for the position embedding."""
    depth: int = 12
    """Number of transformer blocks."""
    heads: int = 12
    """Attention heads per block."""
    mlp_ratio: float = 4.0
    """Hidden features of a block's MLP / width."""

    def __post_init__(self) -> None:
        # A YAML file gives lists.
        object.__setattr__(self, "image_size", tuple(self.image_size))
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        for name, pair in (("image_size", self.image_size), ("patch_size", self.patch_size)):
            if len(pair) != 2 or min(pair) < 1:
                raise ValueError(f"{name} is {list(pair)}; expected [height, width], each at least 1 pixel.")
        for side, image, patch in zip(("height", "width"), self.image_size, self.patch_size, strict=True):
            if image % patch:
                raise ValueError(
                    f"The image {side} of {image} pixels is no multiple of the patch {side} of {patch}. "
                    f"Set image_size to {image // patch * patch or patch} or {(image // patch + 1) * patch} there, "
                    f"or choose another patch_size."
                )
        if self.in_channels < 1 or self.depth < 1:
            raise ValueError(f"in_channels is {self.in_channels} and depth {self.depth}; expected at least 1 of each.")
        check_width("width", self.width, "heads", self.heads)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @property
    def num_patches(self) -> int:
        """N."""
        return self.grid_size[0] * self.grid_size[1]

    @property
    def patch_values(self) -> int:
        """Numbers in one patch: p * q * C."""
        return self.patch_size[0] * self.patch_size[1] * self.in_channels


def check_width(width_name: str, width: int, heads_name: str, heads: int) -> None:
    """Raise ValueError unless the width splits evenly into heads and into the four parts of the position embedding."""
    if heads < 1 or width < 1 or width % heads or width % 4:
        raise ValueError(
            f"{width_name} is {width} and {heads_name} is {heads}; expected a {width_name} that is a multiple of "
            f"{heads_name} and of 4 (the sin-cos position embedding has four parts)."
        )


def vit_config(
    size: str, image_size: int | tuple[int, int] = 224, patch_size: int | None = None, in_channels: int = 3
) -> ViTConfig:
    """The config of a named size (a key of VIT_SIZES).

    image_size: pixels, a side or (height, width). patch_size: pixels; None is 14 for "huge" and 16 otherwise.
    Raises ValueError for an unknown name.
    """
    if size not in VIT_SIZES:
        raise ValueError(f"There is no ViT size {size!r}; expected one of {', '.join(VIT_SIZES)}.")
    width, depth, heads = VIT_SIZES[size]
    patch = patch_size if patch_size is not None else (14 if size == "huge" else 16)
    return ViTConfig(
        image_size=(image_size, image_size) if isinstance(image_size, int) else image_size,
        patch_size=(patch, patch),
        in_channels=in_channels,
        width=width,
        depth=depth,
        heads=heads,
    )


class ViT(nn.Module):
    """Encoder of He et al. (arXiv 2111.06377): class token, fixed sin-cos positions, pre-norm blocks, final norm."""

    pos_embed: Tensor

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        # A buffer and not a frozen parameter: in the state dict as in the original, outside optimizers and shards.
        self.register_buffer("pos_embed", torch.zeros(1, 1 + config.num_patches, config.width))
        self.blocks = transformer_blocks(config.width, config.depth, config.heads, config.mlp_ratio)
        self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.init_weights()

    def forward(self, images: Tensor, keep_ids: Tensor | None = None) -> Tensor:
        """Encode the kept patches, or all of them.

        images: float32 [B, C, H, W], normalised. keep_ids: int64 [B, K] in [0, N); None keeps all N in order.
        Returns [B, 1 + K, D] after the final norm, the class token first.
        Raises ValueError when the images do not have the configured shape.
        """
        tokens = self.embed(images, keep_ids)
        for block in self.blocks:
            tokens = block(tokens)
        normed: Tensor = self.norm(tokens)
        return normed

    def features(self, images: Tensor, num_blocks: int = 1) -> list[tuple[Tensor, Tensor]]:
        """Unmasked features of the last `num_blocks` blocks, first to last, each after the final norm.

        images: float32 [B, C, H, W], normalised. num_blocks: in [1, depth].
        Returns pairs (class token [B, D], patch tokens [B, N, D]). Raises ValueError for num_blocks outside its range.
        """
        if not 1 <= num_blocks <= len(self.blocks):
            raise ValueError(f"num_blocks is {num_blocks}; expected 1 to {len(self.blocks)}, the encoder's depth.")
        tokens = self.embed(images, None)
        features = []
        for index, block in enumerate(self.blocks):
            tokens = block(tokens)
            if index >= len(self.blocks) - num_blocks:
                normed = self.norm(tokens)
                features.append((normed[:, 0], normed[:, 1:]))
        return features

    def embed(self, images: Tensor, keep_ids: Tensor | None) -> Tensor:
        """Project the kept patches, add their positions, and prepend the class token: [B, 1 + K, D].

        The patches are selected before the projection: with 75% hidden that is a quarter of its work.
        """
        expected = (self.config.in_channels, *self.config.image_size)
        if images.ndim != 4 or images.shape[1:] != expected:
            raise ValueError(
                f"The images have shape {list(images.shape)}; expected [batch, {', '.join(map(str, expected))}]. "
                "Make the data's image size and channels agree with the model's."
            )
        position = self.pos_embed[:, 1:]
        patches = split_patches(images, self.config.patch_size).flatten(1, 2).flatten(2)  # [B, N, C*p*q]
        if keep_ids is not None:
            patches = patches.gather(1, keep_ids[..., None].expand(-1, -1, patches.shape[-1]))
            position = position[0][keep_ids]
        tokens = self.patch_embed(patches) + position
        cls_token = self.cls_token + self.pos_embed[:, :1]
        return torch.cat((cls_token.expand(images.shape[0], -1, -1), tokens), dim=1)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Starting values as in He et al.: xavier-uniform, tokens N(0, 0.02), fixed positions. See `init_layer`."""
        self.apply(init_layer)
        nn.init.normal_(self.cls_token, std=TOKEN_STD)
        self.pos_embed.copy_(sincos_position_embedding(self.config.grid_size, self.config.width))


class PatchEmbed(nn.Module):
    """Holds the projection under timm's name, `patch_embed.proj`."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.proj = PatchProjection(config.in_channels, config.patch_size, config.width)

    def forward(self, patches: Tensor) -> Tensor:
        """patches: [B, K, C*p*q] in the order (c, p, q). Returns [B, K, D]."""
        tokens: Tensor = self.proj(patches)
        return tokens


class PatchProjection(nn.Module):
    """A convolution's parameters (kernel = stride = patch), applied as the linear map that it is to single patches."""

    def __init__(self, in_channels: int, patch_size: tuple[int, ...], width: int) -> None:
        """patch_size: (p, q), or (t, p, q) for clips."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, in_channels, *patch_size))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, patches: Tensor) -> Tensor:
        """patches: [B, K, C*p*q] in the order (c, p, q). Returns [B, K, D]."""
        return F.linear(patches.to(self.weight.dtype), self.weight.flatten(1), self.bias)


def transformer_blocks(width: int, depth: int, heads: int, mlp_ratio: float) -> nn.ModuleList:
    """timm's pre-norm blocks, with our attention inside (the same parameters)."""
    norm_layer = partial(nn.LayerNorm, eps=LAYER_NORM_EPS)
    blocks = nn.ModuleList()
    for _ in range(depth):
        block = Block(width, heads, mlp_ratio=mlp_ratio, qkv_bias=True, norm_layer=norm_layer)
        block.attn = SelfAttention(width, heads)
        blocks.append(block)
    return blocks


def init_layer(module: nn.Module) -> None:
    """Initialise one layer (for `nn.Module.apply`): Linears and the flattened patch projection xavier-uniform with zero
    bias, LayerNorms 1 and 0. It matters early: with N(0, 0.02) a small model stays on its first plateau for minutes
    that it leaves within 30 s with this (measured on CIFAR-10).
    """
    if isinstance(module, nn.Linear | PatchProjection):
        fan_out, fan_in = module.weight.shape[0], module.weight.shape[1:].numel()
        bound = (6.0 / (fan_in + fan_out)) ** 0.5
        nn.init.uniform_(module.weight, -bound, bound)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
