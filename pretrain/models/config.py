"""Shapes of image transformers, and presets. Read and checked without torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from data_pipes.bounds import bounded
from pretrain.models.mask_sizes import num_kept

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

    image_size: tuple[int, int] = bounded((224, 224), least=1)
    """Height and width of the input, in pixels."""
    patch_size: tuple[int, int] = bounded((16, 16), least=1)
    """Height and width of a patch, in pixels; divides image_size."""
    in_channels: int = bounded(3, least=1)
    """Channels of the input."""
    width: int = bounded(768, least=1)
    """Features per token; divisible by heads, and by 4 for the position embedding."""
    depth: int = bounded(12, least=1)
    """Number of transformer blocks."""
    heads: int = bounded(12, least=1)
    """Attention heads per block."""
    mlp_ratio: float = bounded(4.0, above=0)
    """Hidden features of a block's MLP / width."""

    def __post_init__(self) -> None:
        # A YAML file gives lists.
        object.__setattr__(self, "image_size", tuple(self.image_size))
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        check_pixels(image_size=self.image_size, patch_size=self.patch_size)
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
        """Patches of an image, N."""
        return self.grid_size[0] * self.grid_size[1]

    @property
    def patch_values(self) -> int:
        """Numbers in one patch, V: p * q * C."""
        return self.patch_size[0] * self.patch_size[1] * self.in_channels


def check_pixels(**sizes: tuple[int, ...]) -> None:
    """Checks sizes of images or patches by name.

    Raises:
        ValueError: a size is not a height and a width of at least one pixel.
    """
    for name, size in sizes.items():
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"{name} is {list(size)}; expected [height, width], each at least 1 pixel.")


def check_width(width_name: str, width: int, heads_name: str, heads: int) -> None:
    """Checks the width of a transformer with a fixed position embedding.

    Raises:
        ValueError: the width does not split evenly into heads and into the four parts of the position embedding.
    """
    if heads < 1 or width < 1 or width % heads or width % 4:
        raise ValueError(
            f"{width_name} is {width} and {heads_name} is {heads}; expected a {width_name} that is a multiple of "
            f"{heads_name} and of 4 (the sin-cos position embedding has four parts)."
        )


def vit_config(
    size: str, image_size: int | tuple[int, int] = 224, patch_size: int | None = None, in_channels: int = 3
) -> ViTConfig:
    """The configuration of a named size.

    Args:
        size: a key of `VIT_SIZES`.
        image_size: a side or (height, width), in pixels.
        patch_size: side of a patch, in pixels; None is 14 for "huge" and 16 otherwise.
        in_channels: channels of the input.

    Raises:
        ValueError: there is no such size.
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


@dataclass(frozen=True)
class MAEConfig:
    """A masked autoencoder. The defaults are those of the paper's ViT-B/16 at 224 x 224."""

    encoder: ViTConfig = field(default_factory=ViTConfig)
    """Shape of the encoder, and of the images."""
    decoder_width: int = bounded(512, least=1)
    """Features per decoder token; divisible by decoder_heads and by 4."""
    decoder_depth: int = bounded(8, least=1)
    """Number of decoder blocks (their MLPs have the encoder's mlp_ratio)."""
    decoder_heads: int = bounded(16, least=1)
    """Attention heads per decoder block."""
    mask_ratio: float = bounded(0.75, least=0, below=1)
    """Share of the patches that is hidden; int(N * (1 - mask_ratio)) are kept."""
    norm_pixels: bool = True
    """Predict each patch's values normalised by its own mean and variance; False predicts the pixels themselves."""

    def __post_init__(self) -> None:
        check_width("decoder_width", self.decoder_width, "decoder_heads", self.decoder_heads)
        if self.decoder_depth < 1:
            raise ValueError(f"decoder_depth is {self.decoder_depth}; expected at least 1 block.")
        if self.num_kept == self.encoder.num_patches:
            raise ValueError(
                f"mask_ratio {self.mask_ratio} hides none of the {self.encoder.num_patches} patches, "
                "so there is nothing to predict; expected a ratio that hides at least one. Raise mask_ratio."
            )
        if self.norm_pixels and self.encoder.patch_values < 2:
            raise ValueError("norm_pixels needs at least 2 values per patch; enlarge patch_size or set it to false.")

    @property
    def num_kept(self) -> int:
        """Patches of an image that the encoder sees, K."""
        return num_kept(self.encoder.num_patches, self.mask_ratio)
