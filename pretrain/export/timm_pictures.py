"""Pictures through timm's transform and model, and through our evaluation and model, before an export is published.

In: a `Backbone` and the folder of its export. Out: how far pixels and features are apart. It exists because timm
describes its preprocessing by a percentage, which says our evaluation's view only in part.

Legend: B batch, C channels, H/W pixels.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.functional import normalize

from pretrain.evaluation.encoder.views import view_short_side
from pretrain.export.by_hand import preprocess
from pretrain.export.pictures import (
    PictureFile,
    Side,
    bit_depth_of,
    compare_pictures,
    our_pixels,
    picture_files,
)
from pretrain.export.publish import relative_error
from pretrain.weights.backbone import Backbone


def crop_pct(side: int, short_side: int) -> float:
    """The number from which timm, which rounds `side / number` down, gets `short_side`; all in pixels."""
    number = side / short_side
    while math.floor(side / number) < short_side:  # the quotient of rounded numbers fell short of a whole one
        number = math.nextafter(number, 0.0)
    return number


def is_expressed(image_size: tuple[int, int]) -> bool:
    """Whether timm's own transform can be our evaluation's: for square inputs.

    For others timm resizes pictures to the smallest size that a scaled input fits into; we resize the short side to the
    longer side of the input, and more.
    """
    return image_size[0] == image_size[1]


@torch.no_grad()
def compare_from_files(
    backbone: Backbone, folder: Path, reference: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[dict[str, dict[str, float]], float | None]:
    """Takes pictures through timm's transform and model of an exported folder, and through ours.

    One kind of picture timm cuts a pixel beside our place, and no setting changes that: where the longer resized side
    exceeds the crop by 3, 7, 11, ... pixels, timm rounds the place up and we round it down, as transformers does. What
    that does to a picture is measured, and not held to a tolerance.

    Args:
        backbone: ours.
        folder: holds the export.
        reference: normalised [B, C, H, W] to our tokens and pooled feature.

    Returns:
        (of `compare_pictures`, the relative error of the pooled feature of a picture that timm cuts elsewhere; None:
        timm's transform was not compared, see `is_expressed`).

    Raises:
        ExportError: see `compare_pictures`.
    """
    import timm

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's deprecations are not the user's
        other = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()

    def outputs(tokens: Tensor, pooled: Tensor) -> dict[str, Tensor]:
        return {"tokens": tokens, "pooled feature": pooled}

    ours = Side(our_pixels(backbone), lambda images: outputs(*reference(images)))
    theirs = Side(_their_pixels(backbone, other), lambda images: outputs(other.forward_features(images), other(images)))
    pictures = compare_pictures(_files(backbone, room=1), ours, theirs, backbone.std)
    if not is_expressed(backbone.interface.image_size):
        return pictures, None
    landscape = _files(backbone, room=3)[0]
    pooled, their_pooled = (side.outputs(side.prepare(landscape))["pooled feature"] for side in (ours, theirs))
    return pictures, relative_error("pooled feature", their_pooled, pooled)


def _files(backbone: Backbone, room: int) -> list[PictureFile]:
    size = backbone.interface.image_size
    return picture_files(size, view_short_side(size), len(backbone.mean), bit_depth=bit_depth_of(backbone), room=room)


def _their_pixels(backbone: Backbone, other: Any) -> Callable[[PictureFile], Tensor]:
    """A file to timm's input.

    Its transform takes JPEGs as Pillow images, and other pictures as float tensors in [0, 1]. Where it cannot be our
    evaluation's, the function that the card prints takes its place.
    """
    import timm

    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(other), is_training=False)
    size, full_scale = backbone.interface.image_size, 2 ** bit_depth_of(backbone) - 1

    def prepare(file: PictureFile) -> Tensor:
        if not is_expressed(size):
            pixels = torch.from_numpy(preprocess(file.array(), size, view_short_side(size), full_scale=full_scale))
            return cast(Tensor, normalize(pixels, list(backbone.mean), list(backbone.std)))[None]
        if file.is_jpeg:
            return cast(Tensor, transform(file.pillow()))[None]
        values = torch.from_numpy(file.array().astype(np.float32)).permute(2, 0, 1)
        return cast(Tensor, transform(values / full_scale))[None]

    return prepare
