"""From an image encoder's weights to a video encoder's (inflation; Carreira and Zisserman, arXiv 1705.07750).

Enters: the state dict of a `ViT` (an image MAE's encoder). Leaves: one for a `VideoViT` of the same width, depth and
patches. Why it exists: images teach a video encoder most of what it has to know about appearance, at a fraction of the
cost.
Legend: D width, C channels, t/p/q a tubelet's frames and its height/width in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from pretrain.models.positions import sinusoid_table
from pretrain.models.video_config import VideoViTConfig

Inflation = Literal["average", "centre"]
"""How a patch's projection becomes a tubelet's; see `inflate_encoder`."""


def inflate_encoder(state: Mapping[str, Tensor], config: VideoViTConfig, how: Inflation) -> dict[str, Tensor]:
    """The state dict of `VideoViT(config)` from that of a `ViT`.

    The projection of a patch becomes one of a tubelet. Blocks and norm are taken as they are. An encoder of the family
    mae_st takes the image's positions in space and its class token, and its positions in time start at zero. One of the
    family video_mae has a fixed sinusoid and no class token, so the image's are left out.

    Args:
        state: names of `ViT` (`patch_embed.proj.weight`, `pos_embed`, `blocks.*`, ...).
        config: the video encoder.
        how: "average" gives each of the t frames 1/t of the patch's weights, so that a clip that does not move has the
            image's tokens; "centre" gives all of them to the frame in the middle (t // 2) and none to the others, so
            that training finds the use of its neighbours.

    Returns:
        New tensors under the names of `VideoViT`.

    Raises:
        ValueError: the image encoder does not fit `config`, or `how` is neither.
    """
    if how not in ("average", "centre"):
        raise ValueError(f"The inflation is {how!r}; expected 'average' or 'centre'.")
    _check_fit(state, config)
    inflated = {name: tensor for name, tensor in state.items() if name.startswith(("blocks.", "norm.", "patch_embed."))}
    inflated["patch_embed.proj.weight"] = _inflate(state["patch_embed.proj.weight"], config.tubelet_size, how)
    if config.family == "mae_st":
        positions = state["pos_embed"]
        inflated |= {
            "cls_token": state["cls_token"],
            "positions.cls": positions[:, :1],
            "positions.spatial": positions[:, 1:],
            "positions.temporal": positions.new_zeros(1, config.grid_size[0], config.width),
        }
    else:
        inflated["positions.table"] = sinusoid_table(config.num_tokens, config.width)
    return {name: tensor.clone() for name, tensor in inflated.items()}


def _inflate(weight: Tensor, frames: int, how: Inflation) -> Tensor:
    """Gives a projection [D, C, p, q] a time axis: [D, C, t, p, q]."""
    if how == "average":
        return (weight / frames)[:, :, None].repeat(1, 1, frames, 1, 1)
    inflated = torch.zeros_like(weight)[:, :, None].repeat(1, 1, frames, 1, 1)
    inflated[:, :, frames // 2] = weight
    return inflated


def _check_fit(state: Mapping[str, Tensor], config: VideoViTConfig) -> None:
    """Compares the image encoder's shape with the video encoder's.

    Raises:
        ValueError: `state` is no image encoder's, or they differ; the message says in what.
    """
    needed = ["patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"]
    if config.family == "mae_st":
        needed.append("cls_token")
    absent = [name for name in needed if name not in state]
    if absent or state["patch_embed.proj.weight"].ndim != 4:
        raise ValueError(f"The weights are not an image encoder's; missing: {', '.join(absent) or 'a 2-D projection'}.")
    weight, positions = state["patch_embed.proj.weight"], state["pos_embed"]
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
    found_and_expected = {
        "width": (weight.shape[0], config.width),
        "depth": (depth, config.depth),
        "channels": (weight.shape[1], config.in_channels),
        "patch size": (tuple(weight.shape[2:]), config.patch_size),
        "hidden width of a block": (hidden, int(config.width * config.mlp_ratio)),
    }
    if config.family == "mae_st":
        found_and_expected["number of patches"] = (positions.shape[1] - 1, config.tokens_per_step)
    differences = [
        f"{name} {found} in the image encoder, {expected} in the video encoder"
        for name, (found, expected) in found_and_expected.items()
        if found != expected
    ]
    if differences:
        raise ValueError(f"The image encoder cannot be inflated: {'; '.join(differences)}. Make the encoders agree.")
