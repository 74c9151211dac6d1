"""Writes an image model as transformers' `ViTModel` or `ViTMAEForPreTraining`, and compares before it publishes.

In: a `Backbone` of images; for pretraining, the checkpoint that it was read from. Out: a folder with config.json,
model.safetensors, preprocessor_config.json and README.md that `from_pretrained` of transformers 4 and 5 loads
completely. It exists for the same users as the export of video models, beside it.

Legend: B batch, N patches, D width, C channels, H/W pixels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from pretrain.evaluation.encoder.views import view_short_side
from pretrain.export.pictures import (
    PictureFile,
    Side,
    bit_depth_of,
    compare_pictures,
    evaluation_view,
    our_pixels,
    picture_files,
)
from pretrain.export.publish import check_error, publish, relative_error
from pretrain.export.transformers import (
    PREPROCESSOR,
    TOLERANCE,
    TransformersExport,
    load_strictly,
    transformers_library,
    write_model,
)
from pretrain.export.transformers_arguments import side_or_sides
from pretrain.export.transformers_image_card import vit_card
from pretrain.models.config import MAEConfig, ViTConfig
from pretrain.models.encoder import LAYER_NORM_EPS
from pretrain.models.mae import MAE
from pretrain.models.vit import ViT
from pretrain.weights.backbone import Backbone, load_objective

CANNOT = "This model cannot become a transformers ViT"
"""How refusals begin."""
_ENCODER = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
    "blocks.": "encoder.layer.",
    "norm.": "layernorm.",
}
"""Beginnings of our names in the encoder -> theirs."""
_DECODER = {
    "mask_token": "decoder.mask_token",
    "pos_embed": "decoder.decoder_pos_embed",
    "embed.": "decoder.decoder_embed.",
    "blocks.": "decoder.decoder_layers.",
    "norm.": "decoder.decoder_norm.",
    "pred.": "decoder.decoder_pred.",
}
"""Beginnings of our names in the decoder -> theirs."""
_LAYER = {
    "norm1.": "layernorm_before.",
    "norm2.": "layernorm_after.",
    "attn.proj.": "attention.output.dense.",
    "mlp.fc1.": "intermediate.dense.",
    "mlp.fc2.": "output.dense.",
}
"""Beginnings of our names in a block, after its number -> theirs; query, key and value apart."""


def export_vit(
    source: Backbone, out: Path, *, pretraining: bool = False, tolerance: float = TOLERANCE
) -> TransformersExport:
    """Exports an image backbone into the new folder `out`.

    Args:
        source: what to export; `weights` says which of the checkpoint's weights (trained, moving average) it has.
        out: must not exist; it appears when everything has been compared, and not otherwise.
        pretraining: with the decoder, read from the checkpoint `source.source`, as `ViTMAEForPreTraining`.
        tolerance: largest allowed relative error of features, predictions and loss.

    Raises:
        FileExistsError: something is at `out`.
        ImportError: transformers is not installed.
        ValueError: transformers cannot express this model, or there is no decoder to export.
        ExportError: transformers does not load it completely, or computes something else.
    """
    refusal = why_not(source, pretraining=pretraining)
    if refusal is not None:
        raise ValueError(f"{CANNOT}: {refusal}")
    encoder = source.model
    assert isinstance(encoder, ViT)
    whole = _whole_model(source) if pretraining else None
    with publish(out) as partial:
        if whole is None:
            architecture, kind, described = "ViTModel", "vit", encoder_arguments(encoder.config)
            state = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
            names = {name.removeprefix("vit."): tensor for name, tensor in to_transformers_vit(state).items()}
        else:
            architecture, kind, described = "ViTMAEForPreTraining", "vit_mae", autoencoder_arguments(whole.config)
            names = to_transformers_vit(whole.state_dict())
        write_model(partial, architecture, described | {"model_type": kind}, names)
        (partial / PREPROCESSOR).write_text(json.dumps(preprocessor(source), indent=2) + "\n")
        if whole is None:
            theirs = load_strictly(partial, architecture, described, add_pooling_layer=False)
            errors = compare(encoder, theirs)
        else:
            theirs = load_strictly(partial, architecture, described)
            errors = compare_pretraining(whole, theirs)
        for what, error in errors.items():
            check_error(what, error, tolerance)
        pictures = compare_from_files(source, theirs, partial, whole)
        exported = TransformersExport(out, architecture, errors, source.digest, pictures=pictures)
        (partial / "README.md").write_text(vit_card(source, encoder, exported, tolerance))
    return exported


def why_not(source: Backbone, *, pretraining: bool = False) -> str | None:
    """Why transformers' ViT (ViTMAE, with the decoder) cannot express this model, or None."""
    model = source.model
    if type(model) is not ViT:
        return f"it is a {type(model).__name__}, and only encoders of images have a counterpart"
    if not pretraining:
        return None
    config = None if source.config is None else getattr(source.config.objective, "model", None)
    if source.checkpoint is None or source.weights == "untrained" or not isinstance(config, MAEConfig):
        return f"{source.label} ({source.weights}) has no decoder beside it; only a checkpoint of image_mae does"
    assert source.config is not None
    with torch.device("meta"):
        objective = source.config.build_objective()
    player = objective.players[objective.backbone_player]
    if not isinstance(player, MAE):  # somebody's own objective with this package's encoder
        return f"its decoder is that of a {type(player).__name__}, and only MAE's has a counterpart"
    sides = (*model.config.image_size, *model.config.patch_size)
    if sides[0] != sides[1] or sides[2] != sides[3]:
        return (
            f"its images are {sides[0]} x {sides[1]} and its patches {sides[2]} x {sides[3]} pixels; there images and "
            "patches with a decoder are square. The encoder alone can be exported"
        )
    return None


def encoder_arguments(config: ViTConfig) -> dict[str, Any]:
    """What `transformers.ViTConfig` needs to build this encoder."""
    return {
        "image_size": side_or_sides(config.image_size),
        "patch_size": side_or_sides(config.patch_size),
        "num_channels": config.in_channels,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": int(config.width * config.mlp_ratio),
        "layer_norm_eps": LAYER_NORM_EPS,  # the default there is 1e-12
        "qkv_bias": True,
    }


def autoencoder_arguments(config: MAEConfig) -> dict[str, Any]:
    """What `transformers.ViTMAEConfig` needs to build this model."""
    return encoder_arguments(config.encoder) | {
        "decoder_hidden_size": config.decoder_width,
        "decoder_num_hidden_layers": config.decoder_depth,
        "decoder_num_attention_heads": config.decoder_heads,
        "decoder_intermediate_size": int(config.decoder_width * config.encoder.mlp_ratio),
        "mask_ratio": config.mask_ratio,
        "norm_pix_loss": config.norm_pixels,
    }


def to_transformers_vit(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the tensors of our MAE (or of its encoder alone) as transformers 4's ViTMAE calls them.

    Version 5 renames them again as it loads.
    """
    result = {}
    for name, tensor in state.items():
        part, rest = name.split(".", 1)
        table_of_part = _ENCODER if part == "encoder" else _DECODER
        root = next(root for root in table_of_part if rest == root or (root.endswith(".") and rest.startswith(root)))
        theirs = ("vit." if part == "encoder" else "") + table_of_part[root] + rest.removeprefix(root)
        layer = re.fullmatch(r"(.*\.\d+\.)(.*)", theirs) if root == "blocks." else None
        if layer is None:
            result[theirs] = tensor
        elif layer[2].startswith("attn.qkv."):
            for which, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                result[f"{layer[1]}attention.attention.{which}.{layer[2].removeprefix('attn.qkv.')}"] = third
        else:
            own = next(own for own in _LAYER if layer[2].startswith(own))
            result[layer[1] + _LAYER[own] + layer[2].removeprefix(own)] = tensor
    return result


@torch.no_grad()
def compare(encoder: ViT, theirs: Any) -> dict[str, float]:
    """The relative error of their `last_hidden_state` [B, 1 + N, D] on random images."""
    images = _images(encoder.config)
    return {"features": relative_error("features", theirs(images).last_hidden_state, encoder.eval()(images))}


@torch.no_grad()
def compare_pretraining(whole: MAE, theirs: Any) -> dict[str, float]:
    """Compares on random images, masked by the same noise.

    Args:
        whole: ours, decoder included.
        theirs: a `ViTMAEForPreTraining`.

    Returns:
        The relative errors of the "features" of the visible patches, of "predictions" and of "loss".
    """
    images = _images(whole.config.encoder)
    ours_features, their_features = visible_features(whole, theirs)
    noise = torch.rand(len(images), whole.config.encoder.num_patches, generator=torch.Generator().manual_seed(1))
    ours, output = whole.eval()(images, noise), theirs(images, noise=noise)
    return {
        "features": relative_error("features", their_features(images), ours_features(images)),
        "predictions": relative_error("predictions", output.logits, ours.prediction),
        "loss": relative_error("loss", output.loss, ours.loss),
    }


def visible_features(whole: MAE, theirs: Any) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """What (our, their) encoder makes of the first patches of images [B, C, H, W]; the others are hidden."""

    def order(images: Tensor) -> Tensor:  # ascending, else their encoder shuffles what it sees
        return torch.arange(whole.config.encoder.num_patches).expand(len(images), -1)

    return (
        lambda images: whole.encoder(images, order(images)[:, : whole.config.num_kept]),
        lambda images: theirs.vit(images, noise=order(images).float()).last_hidden_state,
    )


def compare_from_files(
    source: Backbone, theirs: Any, folder: Path, whole: MAE | None = None
) -> dict[str, dict[str, float]]:
    """Takes pictures through `AutoImageProcessor` and their model, and through our evaluation and model.

    Args:
        source: ours.
        theirs: the model of the folder.
        folder: holds the export.
        whole: our model with its decoder, where theirs is a `ViTMAEForPreTraining`.

    Returns:
        See `compare_pictures`.

    Raises:
        ExportError: see `compare_pictures`.
    """
    processor = transformers_library().AutoImageProcessor.from_pretrained(str(folder), local_files_only=True)

    def prepare(file: PictureFile) -> Tensor:
        if file.is_jpeg:
            return cast(Tensor, processor(file.pillow(), return_tensors="pt").pixel_values)
        stored = file.array()
        stored = stored.astype(np.float32) if stored.dtype == np.uint16 else stored
        return cast(Tensor, processor(stored, input_data_format="channels_last", return_tensors="pt").pixel_values)

    if whole is None:
        ours: Callable[[Tensor], Tensor] = source.model.eval()
        features: Callable[[Tensor], Tensor] = lambda images: theirs(images).last_hidden_state
    else:
        ours, features = visible_features(whole, theirs)
    view = evaluation_view(source)
    files = picture_files(view.size, view_short_side(view.size), len(source.mean), bit_depth=bit_depth_of(source))
    return compare_pictures(
        files,
        Side(our_pixels(source), lambda images: {"features": ours(images)}),
        Side(prepare, lambda images: {"features": features(images)}),
        source.std,
    )


def preprocessor(source: Backbone) -> dict[str, Any]:
    """The contents of preprocessor_config.json: our evaluation's view (short side, centre crop) and the statistics."""
    height, width = source.interface.image_size
    return {
        "image_processor_type": "BitImageProcessor",  # DINOv2's; older ViTImageProcessors cannot crop
        "do_convert_rgb": False,
        "do_resize": True,
        "size": {"shortest_edge": view_short_side((height, width))},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / (2 ** bit_depth_of(source) - 1),
        "do_normalize": True,
        "image_mean": list(source.mean),
        "image_std": list(source.std),
    }


def _images(config: ViTConfig) -> Tensor:
    """Two random images [2, C, H, W], the same in each call."""
    return torch.randn(2, config.in_channels, *config.image_size, generator=torch.Generator().manual_seed(0))


def _whole_model(source: Backbone) -> MAE:
    """The model of the backbone's checkpoint with the same weights, decoder included."""
    objective = load_objective(source)
    model = objective.players[objective.backbone_player]
    assert isinstance(model, MAE)
    return model
