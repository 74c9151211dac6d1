"""Shapes of transformers of clips, and presets. Read and checked without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from data_pipes.bounds import bounded
from pretrain.models.config import check_pixels

Family = Literal["video_mae", "mae_st"]
"""How an encoder knows where its tokens lie; see `VideoViTConfig.family`."""


VIDEO_VIT_SIZES: dict[str, tuple[int, int, int, float]] = {
    "small": (384, 12, 6, 4.0),
    "base": (768, 12, 12, 4.0),
    "large": (1024, 24, 16, 4.0),
    "huge": (1280, 32, 16, 4.0),
    "giant": (1408, 40, 16, 48 / 11),
}
"""Width, depth, heads and mlp_ratio by name. The giant one has patches of 14 x 14, and MAE-ST's huge one too."""


@dataclass(frozen=True)
class VideoViTConfig:
    """Shape of a video transformer. The defaults are VideoMAE's ViT-B/16 on 16 frames of 224 x 224."""

    num_frames: int = bounded(16, least=1)
    """Frames of a clip."""
    image_size: tuple[int, int] = bounded((224, 224), least=1)
    """Height and width of a frame, in pixels."""
    tubelet_size: int = bounded(2, least=1)
    """Frames of a tubelet; divides num_frames."""
    patch_size: tuple[int, int] = bounded((16, 16), least=1)
    """Height and width of a tubelet, in pixels; divides image_size."""
    in_channels: int = bounded(3, least=1)
    """Channels of a frame."""
    width: int = bounded(768, least=1)
    """Features per token; even, divisible by heads."""
    depth: int = bounded(12, least=1)
    """Number of transformer blocks."""
    heads: int = bounded(12, least=1)
    """Attention heads per block."""
    mlp_ratio: float = bounded(4.0, above=0)
    """Hidden features of a block's MLP / width."""
    family: Family = "video_mae"
    """video_mae: a fixed sinusoid over all tokens, no class token. mae_st: learned positions, space plus time, and a
    class token."""
    positions_start: Literal["normal", "sincos"] = "normal"
    """What mae_st's positions start as: N(0, 0.02) as in the paper, or sines and cosines, with which short runs learn
    sooner where to look."""

    def __post_init__(self) -> None:
        # A YAML file gives lists.
        object.__setattr__(self, "image_size", tuple(self.image_size))
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        check_pixels(image_size=self.image_size, patch_size=self.patch_size)
        if min(self.num_frames, self.tubelet_size, self.in_channels, self.depth) < 1:
            raise ValueError(
                f"num_frames is {self.num_frames}, tubelet_size {self.tubelet_size}, in_channels {self.in_channels} "
                f"and depth {self.depth}; expected at least 1 of each."
            )
        sides = zip(("num_frames", "height", "width"), self.clip_size, self.token_size, strict=True)
        for side, whole, part in sides:
            if whole % part:
                raise ValueError(
                    f"The clip's {side} of {whole} is no multiple of a tubelet's {part}. Set it to "
                    f"{whole // part * part or part} or {(whole // part + 1) * part}, or choose other tubelets."
                )
        check_width("width", self.width, "heads", self.heads)
        if self.family not in ("video_mae", "mae_st"):
            raise ValueError(f"family is {self.family!r}; expected 'video_mae' or 'mae_st'.")
        if self.positions_start == "sincos" and self.family != "mae_st":
            raise ValueError("positions_start is sincos and family video_mae, whose positions are fixed. Leave it out.")

    @property
    def clip_size(self) -> tuple[int, int, int]:
        """T, H, W."""
        return (self.num_frames, *self.image_size)

    @property
    def token_size(self) -> tuple[int, int, int]:
        """t, p, q."""
        return (self.tubelet_size, *self.patch_size)

    @property
    def grid_size(self) -> tuple[int, int, int]:
        """Tokens along time, height and width."""
        steps, rows, columns = (whole // part for whole, part in zip(self.clip_size, self.token_size, strict=True))
        return steps, rows, columns

    @property
    def num_tokens(self) -> int:
        """Tokens of a clip, N."""
        return self.grid_size[0] * self.tokens_per_step

    @property
    def tokens_per_step(self) -> int:
        """Tokens that share their time."""
        return self.grid_size[1] * self.grid_size[2]

    @property
    def token_values(self) -> int:
        """Numbers in one tubelet: t * p * q * C."""
        return self.tubelet_size * self.patch_size[0] * self.patch_size[1] * self.in_channels

    @property
    def has_class_token(self) -> bool:
        """Whether the family has a class token."""
        return self.family == "mae_st"


def check_width(width_name: str, width: int, heads_name: str, heads: int) -> None:
    """Checks the width of a video transformer.

    Raises:
        ValueError: the width does not split evenly into heads, and into sines and cosines.
    """
    if heads < 1 or width < 1 or width % heads or width % 2:
        raise ValueError(
            f"{width_name} is {width} and {heads_name} is {heads}; expected an even {width_name} that is a multiple of "
            f"{heads_name}."
        )


Method = Literal["mae_st", "video_mae", "video_mae_v2"]
"""The paper whose decoder and settings a model has."""


DECODERS: dict[Method, dict[str, tuple[int, int, int]]] = {
    "mae_st": dict.fromkeys(("base", "large", "huge"), (512, 4, 16)),
    "video_mae": {"small": (192, 4, 3), "base": (384, 4, 6), "large": (512, 12, 8), "huge": (640, 12, 8)},
    "video_mae_v2": {
        "small": (192, 4, 3),
        "base": (384, 4, 6),
        **dict.fromkeys(("large", "huge", "giant"), (512, 4, 8)),
    },
}
"""Width, depth and heads of the papers' decoders by method and size of the encoder."""


@dataclass(frozen=True)
class VideoMAEConfig:
    """A masked autoencoder for clips. The defaults are those of VideoMAE's ViT-B/16 on 16 frames of 224 x 224."""

    encoder: VideoViTConfig = field(default_factory=VideoViTConfig)
    """Shape of the encoder, and of the clips."""
    decoder_width: int = bounded(384, least=1)
    """Features per decoder token; even, divisible by decoder_heads."""
    decoder_depth: int = bounded(4, least=1)
    """Number of decoder blocks (their MLPs have the encoder's mlp_ratio)."""
    decoder_heads: int = bounded(6, least=1)
    """Attention heads per decoder block."""
    predicted_frames: int | None = bounded(None, least=1)
    """Frames of a clip that are predicted, evenly spread: a multiple of the encoder's steps in time; null: all."""

    def __post_init__(self) -> None:
        check_width("decoder_width", self.decoder_width, "decoder_heads", self.decoder_heads)
        if self.decoder_depth < 1:
            raise ValueError(f"decoder_depth is {self.decoder_depth}; expected at least 1 block.")
        frames, steps = self.num_predicted_frames, self.encoder.grid_size[0]
        if not 1 <= frames <= self.encoder.num_frames or frames % steps:
            raise ValueError(
                f"predicted_frames is {frames} for clips of {self.encoder.num_frames} frames; expected a multiple of "
                f"their {steps} steps in time, at most {self.encoder.num_frames}."
            )

    @property
    def num_predicted_frames(self) -> int:
        """Frames of a clip that are predicted."""
        return self.encoder.num_frames if self.predicted_frames is None else self.predicted_frames

    @property
    def target_size(self) -> tuple[int, int, int]:
        """Predicted frames, height and width of a token."""
        return (self.num_predicted_frames // self.encoder.grid_size[0], *self.encoder.patch_size)

    @property
    def target_values(self) -> int:
        """Predicted values of a token, V."""
        frames, height, width = self.target_size
        return frames * height * width * self.encoder.in_channels


def video_mae_config(
    method: Method,
    size: str,
    num_frames: int = 16,
    image_size: int | tuple[int, int] = 224,
    in_channels: int = 3,
) -> VideoMAEConfig:
    """The paper's model of a method and a size.

    Args:
        method: a key of `DECODERS`.
        size: a key of `DECODERS[method]`.
        num_frames: of a clip.
        image_size: a side or (height, width) of a frame, in pixels.
        in_channels: channels of a frame.

    Raises:
        ValueError: the method's paper has no model of that size.
    """
    if method not in DECODERS or size not in DECODERS[method]:
        known = ", ".join(f"{name} {'/'.join(sizes)}" for name, sizes in DECODERS.items())
        raise ValueError(f"There is no {method!r} of size {size!r}; expected one of {known}.")
    width, depth, heads, mlp_ratio = VIDEO_VIT_SIZES[size]
    patch = 14 if size == "giant" or (method, size) == ("mae_st", "huge") else 16
    encoder = VideoViTConfig(
        num_frames=num_frames,
        image_size=(image_size, image_size) if isinstance(image_size, int) else image_size,
        patch_size=(patch, patch),
        in_channels=in_channels,
        width=width,
        depth=depth,
        heads=heads,
        mlp_ratio=mlp_ratio,
        family="mae_st" if method == "mae_st" else "video_mae",
    )
    predicted = num_frames // 2 if method == "mae_st" else None
    return VideoMAEConfig(encoder, *DECODERS[method][size], predicted_frames=predicted)
