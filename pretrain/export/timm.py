"""Writes a backbone as a timm model, reloads it with timm both ways, and compares the outputs before it is published.

In: a `Backbone`. Out: a folder with config.json, model.safetensors and README.md that
`timm.create_model("local-dir:OUT", pretrained=True)` and `timm.create_model(..., checkpoint_path=OUT/...safetensors)`
load strictly. It exists because an export is only worth something if the other library computes the same features.

Legend: B batch, C channels, H/W pixels, N patches, D width.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pretrain.evaluation.encoder.views import view_short_side
from pretrain.export.pictures import Errors
from pretrain.export.publish import ExportError, check_error, publish, write_tensors
from pretrain.export.timm_card import timm_card
from pretrain.export.timm_pictures import compare_from_files, crop_pct
from pretrain.models.config import VIT_SIZES, ViTConfig
from pretrain.models.video_vit import VideoViT
from pretrain.models.vit import ViT
from pretrain.weights.backbone import Backbone
from pretrain.weights.files import EXPORT_WEIGHTS
from pretrain.weights.finding import EXPORT_CONFIG

Pool = Literal["token", "avg"]
"""The pooled feature: the class token, or the normalised mean of the patch tokens."""
TOLERANCE = 1e-5
"""Largest `Difference.relative` that is published."""
_STANDARD_ARCHITECTURES = {
    "tiny": "vit_tiny_patch16_224",
    "small": "vit_small_patch16_224",
    "base": "vit_base_patch16_224",
    "large": "vit_large_patch16_224",
    "huge": "vit_huge_patch14_224",
}
"""Size of `VIT_SIZES` -> timm's name of an architecture with that width, depth and number of heads."""


@dataclass(frozen=True)
class Difference:
    """How far timm's features are from ours, over both ways of loading, all tokens and the pooled feature."""

    absolute: float
    """largest absolute difference"""
    relative: float
    """largest absolute difference / max(1, largest absolute value of that feature): what is held to the tolerance,
    because fp32 rounding grows with the values, and without the final norm a trained model's tokens are large"""


@dataclass(frozen=True)
class TimmExport:
    """What was published."""

    folder: Path
    """where it is"""
    architecture: str
    """timm's registered name; config.json's model_args complete it"""
    difference: Difference
    """of timm's features from ours"""
    digest: str
    """`weights_digest` of the backbone"""
    pictures: Errors
    """of the pictures that were compared from the file on, see `compare_pictures`"""
    shifted: float | None
    """relative error of the features of a picture that timm cuts one pixel beside our place, see `compare_from_files`;
    None: its transform was not compared, as the model's input is not square"""


def export_timm(backbone: Backbone, folder: Path, *, pool: Pool = "token", tolerance: float = TOLERANCE) -> TimmExport:
    """Exports a backbone of images into the new folder `folder`.

    Args:
        backbone: what to export.
        folder: must not exist; it appears when everything has been compared, and not otherwise.
        pool: `token` pools by the class token. `avg` averages the patch tokens and normalises after that, as the
            original's fine-tuning does; timm then calls the final norm `fc_norm`.
        tolerance: largest allowed difference of the features from ours, see `Difference.relative`.

    Raises:
        FileExistsError: something is at `folder`.
        ValueError: timm cannot express this model.
        ExportError: timm's features differ from ours by more than `tolerance`.
    """
    refusal = why_not(backbone.model)
    if refusal is not None:
        raise ValueError(f"timm cannot express this model: {refusal}")
    model = backbone.model
    assert isinstance(model, ViT)
    description = timm_config(backbone, pool)
    with publish(folder) as partial:
        _write_weights(partial / EXPORT_WEIGHTS, model, pool)
        (partial / EXPORT_CONFIG).write_text(json.dumps(description, indent=2) + "\n")
        difference = compare(model, partial, description, pool)
        check_error("features", difference.relative, tolerance)
        pictures, shifted = compare_from_files(
            backbone, partial, lambda images: reference_features(model.eval(), images, pool)
        )
        card = timm_card(
            backbone,
            folder.name,
            description,
            pool=pool,
            max_difference=difference.absolute,
            tolerance=tolerance,
            pictures=pictures,
            shifted=shifted,
        )
        (partial / "README.md").write_text(card)
    return TimmExport(folder, description["architecture"], difference, backbone.digest, pictures, shifted)


def why_not(model: nn.Module) -> str | None:
    """Why timm's VisionTransformer cannot express `model`, or None."""
    if isinstance(model, VideoViT):
        return "it is an encoder of clips, and timm has none for VideoMAE's or MAE-ST's; export it --to transformers"
    if type(model) is not ViT:
        return f"it is a {type(model).__name__}, and only plain vision transformers have a counterpart"
    return None


def timm_config(backbone: Backbone, pool: Pool) -> dict[str, Any]:
    """The contents of config.json: a registered architecture, the arguments that complete it, and the preprocessing."""
    assert isinstance(backbone.model, ViT)
    config = backbone.model.config
    height, width = config.image_size
    architecture = architecture_of(config)
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": config.width,
        "global_pool": pool,
        "model_args": {
            "img_size": [height, width],
            "patch_size": list(config.patch_size),
            "in_chans": config.in_channels,
            "embed_dim": config.width,
            "depth": config.depth,
            "num_heads": config.heads,
            "mlp_ratio": config.mlp_ratio,
            "class_token": True,
            "global_pool": pool,
        },
        "pretrained_cfg": {
            "architecture": architecture,
            "num_classes": 0,
            "input_size": [config.in_channels, height, width],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": crop_pct(max(config.image_size), view_short_side(config.image_size)),
            "crop_mode": "center",
            "mean": list(backbone.mean),
            "std": list(backbone.std),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "pool_size": None,
        },
    }


def architecture_of(config: ViTConfig) -> str:
    """timm's name of this shape; for a shape that has none, a registered name whose arguments all get replaced."""
    for size, (width, depth, heads) in VIT_SIZES.items():
        if (config.width, config.depth, config.heads) == (width, depth, heads):
            return _STANDARD_ARCHITECTURES[size]
    return _STANDARD_ARCHITECTURES["base"]


@torch.no_grad()
def compare(model: ViT, folder: Path, description: dict[str, Any], pool: Pool) -> Difference:
    """Loads the export in both ways and compares timm's features with ours on random images.

    Args:
        model: ours.
        folder: holds the export.
        description: its config.json.
        pool: of the pooled feature.

    Returns:
        The largest differences; infinite where a feature is not finite.

    Raises:
        ExportError: the shapes differ.
    """
    import timm

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, model.config.in_channels, *model.config.image_size, generator=generator)
    tokens, pooled = reference_features(model.eval(), images, pool)
    arguments = description["model_args"]
    absolute = relative = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's deprecations are not the user's
        loaded = (
            timm.create_model(f"local-dir:{folder}", pretrained=True),
            timm.create_model(
                description["architecture"], num_classes=0, checkpoint_path=str(folder / EXPORT_WEIGHTS), **arguments
            ),
        )
    for other in loaded:
        other.eval()
        their_tokens = other.forward_features(images)
        for ours, theirs in ((tokens, their_tokens), (pooled, other(images))):
            if ours.shape != theirs.shape:
                raise ExportError(f"timm gives features {list(theirs.shape)}, ours are {list(ours.shape)}")
            apart = float((ours - theirs).abs().max().nan_to_num(nan=float("inf")))
            absolute = max(absolute, apart)
            relative = max(relative, apart / max(1.0, float(ours.abs().max().nan_to_num(nan=1.0))))
    return Difference(absolute, relative)


def reference_features(model: ViT, images: Tensor, pool: Pool) -> tuple[Tensor, Tensor]:
    """Our features, as timm gives them: with `avg` it leaves the final norm out, and normalises the tokens' average.

    Args:
        model: ours, in evaluation mode.
        images: normalised [B, C, H, W].
        pool: of the pooled feature.

    Returns:
        (what `forward_features` gives [B, 1 + N, D], the pooled feature [B, D]).
    """
    if pool == "token":
        tokens = model(images)
        return tokens, tokens[:, 0]
    tokens = model.embed(images, None)
    for block in model.blocks:
        tokens = block(tokens)
    return tokens, model.norm(tokens[:, 1:].mean(dim=1))


def _write_weights(path: Path, model: ViT, pool: Pool) -> None:
    """Writes the state dict with timm's names: ours, except for the norm of an average-pooled model."""
    state = model.state_dict()
    if pool == "avg":
        state = {f"fc_{name}" if name.startswith("norm.") else name: tensor for name, tensor in state.items()}
    write_tensors(path, state)
