"""Pictures and clips through ONNX graphs, and through our evaluation and model, before an export is published.

In: a `Backbone` or a `LoadedTokenizer`, its modules, and the folder of the graphs. Out: how far pixels and outputs are
apart. A graph brings no preprocessing, so its card prints a function; that function is what pictures go through here.

Legend: B batch, C channels, T frames, H/W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from pretrain.evaluation.encoder.views import view_short_side
from pretrain.export.by_hand import preprocess
from pretrain.export.clips import CLIP_SIZES, file_frames, frame_files, our_clips
from pretrain.export.onnx import run_graph
from pretrain.export.pictures import (
    PictureFile,
    Side,
    bit_depth_of,
    compare_pictures,
    our_pixels,
    picture_files,
)
from pretrain.export.tokenizer_pictures import bit_depth_of as tokenizer_bit_depth
from pretrain.export.tokenizer_pictures import our_input, tokenizer_files, unit_array

if TYPE_CHECKING:
    from pretrain.weights.backbone import Backbone
    from pretrain.weights.tokenizer import LoadedTokenizer


def compare_backbone(
    backbone: Backbone, features: Callable[[Tensor], tuple[Tensor, Tensor]], names: tuple[str, str], folder: Path
) -> dict[str, dict[str, float]]:
    """Takes pictures (or clips) through the card's function and model.onnx, and through our evaluation and model.

    Args:
        backbone: ours.
        features: normalised pixels to what the graph gives.
        names: of that.
        folder: holds the graph.

    Returns:
        See `compare_pictures`.

    Raises:
        ExportError: see `compare_pictures`.
    """
    size, channels = backbone.interface.image_size, backbone.interface.in_channels
    frames, full_scale = backbone.interface.num_frames, 2 ** bit_depth_of(backbone) - 1
    statistics = statistics_of(backbone)
    if frames is None:
        files = picture_files(size, view_short_side(size), channels, bit_depth=bit_depth_of(backbone))
        ours = our_pixels(backbone)
    else:
        files, ours = frame_files(channels, CLIP_SIZES), our_clips(backbone, frames)

    def prepare(file: PictureFile) -> Tensor:
        stored = file.array()
        if frames is None:
            return torch.from_numpy(preprocess(stored, size, view_short_side(size), full_scale=full_scale))[None]
        clip = [preprocess(frame, size, None, Image.Resampling.BILINEAR) for frame in file_frames(stored, frames)]
        return torch.from_numpy(np.stack(clip, axis=1))[None]

    def unit(file: PictureFile) -> Tensor:  # undone, as the graph normalises
        mean, std = statistics
        normalised = ours(file)
        shape = (-1, *(1,) * (normalised.ndim - 2))
        return normalised * std.reshape(shape) + mean.reshape(shape)

    def outputs(pixels: Tensor) -> dict[str, Tensor]:
        return dict(zip(names, features(pixels), strict=True))

    theirs = Side(prepare, lambda pixels: run_graph(folder / "model.onnx", pixels=pixels))
    return compare_pictures(files, Side(unit, outputs), theirs, (1.0,) * channels)


def statistics_of(source: Backbone | LoadedTokenizer) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel, float32 [C]."""
    return torch.tensor(source.mean), torch.tensor(source.std)


def compare_tokenizer(
    tokenizer: LoadedTokenizer, encoder: nn.Module, decoder: nn.Module, size: tuple[int, int] | None, folder: Path
) -> dict[str, dict[str, float]]:
    """Takes pictures through encoder.onnx and decoder.onnx, and through our tokenizer.

    Args:
        tokenizer: ours.
        encoder: pixels in [0, 1] to latents.
        decoder: the way back.
        size: of the only pictures that the graphs take, if any.
        folder: holds the graphs.

    Returns:
        See `compare_pictures`.

    Raises:
        ExportError: see `compare_pictures`.
    """
    mean, std = (values.reshape(-1, 1, 1) for values in statistics_of(tokenizer))

    def prepare(file: PictureFile) -> Tensor:
        return torch.from_numpy(unit_array(file, tokenizer_bit_depth(tokenizer))).permute(0, 3, 1, 2)

    def ours(pixels: Tensor) -> dict[str, Tensor]:
        latent = encoder(pixels)
        return {"latent": latent, "reconstruction": decoder(latent)}

    def theirs(pixels: Tensor) -> dict[str, Tensor]:
        latent = run_graph(folder / "encoder.onnx", images=pixels)
        return latent | run_graph(folder / "decoder.onnx", latent=latent["latent"])

    return compare_pictures(
        tokenizer_files(tokenizer, size),
        Side(lambda file: our_input(tokenizer, file) * std + mean, ours),
        Side(prepare, theirs),
        (1.0,) * len(tokenizer.mean),
    )
