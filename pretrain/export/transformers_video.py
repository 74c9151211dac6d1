"""Writes a video model as transformers' `VideoMAEModel` or `VideoMAEForPreTraining`, and compares before it publishes.

In: a `Backbone` of a run on clips; for pretraining, the checkpoint that it was read from. Out: a folder with
config.json, model.safetensors, preprocessor_config.json and README.md that `from_pretrained` of transformers 4 and 5
loads completely. It exists because fine-tuning scripts for video look for backbones there.

Legend: B batch, N tokens, M hidden tokens, D width, C channels, T frames, H/W pixels.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from data_pipes.sequential.clips import resized_size
from pretrain.export.card import numbers
from pretrain.export.clips import CLIP_SIZES, file_frames, frame_files, our_clips
from pretrain.export.pictures import PictureFile, Side, compare_pictures
from pretrain.export.publish import check_error, publish, relative_error
from pretrain.export.transformers import (
    PREPROCESSOR,
    TOLERANCE,
    TransformersExport,
    load_strictly,
    transformers_library,
    write_model,
)
from pretrain.export.transformers_arguments import CANNOT, transformers_arguments, transformers_encoder_arguments
from pretrain.export.transformers_video_card import video_card
from pretrain.losses.clips import tubelets
from pretrain.models.normalise import Normalise
from pretrain.models.statistics import IMAGENET_MEAN, IMAGENET_STD
from pretrain.models.video_config import VideoViTConfig
from pretrain.models.video_masking import tube_masks
from pretrain.models.video_vit import VideoViT
from pretrain.objectives.clip_mae import ClipMAEObjective
from pretrain.objectives.clip_target import channel_target, normalise_clips
from pretrain.weights.backbone import Backbone, load_objective
from pretrain.weights.video_names import to_transformers

EPS_TOLERANCE = 1e-2
"""Largest relative error of the predictions that transformers' eps of the decoder's norm may cause."""
_PROCESSED_CHANNELS = (1, 3)
"""Numbers of channels that `VideoMAEImageProcessor` takes."""


def export_videomae(
    source: Backbone, out: Path, *, pretraining: bool = False, tolerance: float = TOLERANCE
) -> TransformersExport:
    """Exports a video backbone into the new folder `out`.

    Args:
        source: what to export; `weights` says which of the checkpoint's weights (trained, moving average) it has.
        out: must not exist; it appears when everything has been compared, and not otherwise.
        pretraining: with the decoder, read from `source.checkpoint`, as `VideoMAEForPreTraining`.
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
    assert isinstance(encoder, VideoViT)
    objective = _whole_model(source) if pretraining else None
    architecture = "VideoMAEModel" if objective is None else "VideoMAEForPreTraining"
    has_processor = encoder.config.in_channels in _PROCESSED_CHANNELS
    with publish(out) as partial:
        if objective is None:
            described, state = transformers_encoder_arguments(encoder.config), _encoder_state(encoder)
        else:
            described = transformers_arguments(objective.config.model, objective.config.norm_pixels)
            state = to_transformers(objective.model.state_dict(), major=4)
        write_model(partial, architecture, described | {"model_type": "videomae"}, state)
        if has_processor:
            (partial / PREPROCESSOR).write_text(json.dumps(preprocessor(source), indent=2) + "\n")
        theirs = load_strictly(partial, architecture, described)
        errors = {"features": compare_features(encoder, theirs)}
        if objective is not None:
            errors |= compare_pretraining(objective, theirs)
        for what, error in errors.items():
            if what == "eps_effect":
                check_error("predictions (the decoder norm's eps is 1e-5 there)", error, EPS_TOLERANCE)
            else:
                check_error(what, error, tolerance)
        pictures: dict[str, dict[str, float]] = {}
        if has_processor:
            check_error("preprocessed pixels", compare_pixels(source, encoder.config, partial), tolerance)
            pictures = compare_from_files(source, encoder, theirs, partial)
        exported = TransformersExport(out, architecture, errors, source.digest, has_processor, pictures)
        (partial / "README.md").write_text(video_card(source, encoder, exported, tolerance))
    return exported


def why_not(source: Backbone, *, pretraining: bool = False) -> str | None:
    """Why transformers' VideoMAE cannot express this model, or None."""
    model = source.model
    if type(model) is not VideoViT:
        return f"it is a {type(model).__name__}, and only encoders of clips have a counterpart"
    try:
        transformers_encoder_arguments(model.config)
        if not pretraining:
            return None
        if source.config is None or source.checkpoint is None or source.weights == "untrained":
            return f"{source.label} ({source.weights}) has no decoder beside it; only a run's checkpoint does"
        objective = source.config.build_objective()
        if not isinstance(objective, ClipMAEObjective):
            return f"its objective is {source.config.objective_name}, which has no decoder for clips"
        norm_pixels = objective.config.norm_pixels
        transformers_arguments(objective.config.model, norm_pixels)
    except ValueError as error:
        return str(error).removeprefix(f"{CANNOT}: ")
    statistics = (tuple(source.mean), tuple(source.std))
    if not norm_pixels and statistics != (IMAGENET_MEAN, IMAGENET_STD):
        return (
            f"it predicts raw pixels and sees them with mean {numbers(source.mean)} and std {numbers(source.std)}; the "
            "loss there takes ImageNet's to get back to raw pixels. The encoder alone can be exported"
        )
    return None


@torch.no_grad()
def compare_features(encoder: VideoViT, theirs: Any) -> float:
    """The relative error of their `last_hidden_state` [B, N, D] on random clips."""
    config = encoder.config
    clips = torch.randn(2, config.in_channels, *config.clip_size, generator=torch.Generator().manual_seed(0))
    backbone = getattr(theirs, "videomae", theirs)
    hidden = backbone(clips.transpose(1, 2)).last_hidden_state
    return relative_error("features", hidden, encoder.eval()(clips))


@torch.no_grad()
def compare_pretraining(objective: ClipMAEObjective, theirs: Any) -> dict[str, float]:
    """Compares on stored clips under tube masks of the run's ratio; all hidden tokens are predicted.

    Args:
        objective: ours.
        theirs: a `VideoMAEForPreTraining`.

    Returns:
        The relative errors of "predictions" and "loss" with their eps of the decoder's norm, and of the predictions
        with our own eps, as "eps_effect".
    """
    autoencoder, config = objective.model, objective.config
    encoder = config.model.encoder
    shape = (2, encoder.in_channels, *encoder.clip_size)
    stored = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    mask = tube_masks(torch.arange(2), 1, encoder.grid_size, config.mask_ratio, seed=0)
    values = tubelets(stored, config.model.target_size)
    values = values.gather(1, mask.predict_ids[..., None, None].expand(-1, -1, *values.shape[2:]))
    target = channel_target(encoder.in_channels, config.norm_pixels)(values)
    clips = normalise_clips(objective.normalise, stored)
    norm = autoencoder.decoder.norm
    own_eps = norm.eps
    as_trained = autoencoder(clips, mask, target)
    norm.eps = theirs.decoder.norm.eps
    ours = autoencoder(clips, mask, target)
    norm.eps = own_eps
    output = theirs(clips.transpose(1, 2), bool_masked_pos=mask.hidden(encoder.num_tokens))
    return {
        "predictions": relative_error("predictions", output.logits, ours.prediction),
        "loss": relative_error("loss", output.loss, ours.loss),
        "eps_effect": relative_error("predictions", output.logits, as_trained.prediction),
    }


@torch.no_grad()
def compare_pixels(source: Backbone, config: VideoViTConfig, folder: Path) -> float:
    """The relative error of what `VideoMAEImageProcessor` makes of noise that it need not resize, to the last bit."""
    processor = transformers_library().VideoMAEImageProcessor.from_pretrained(str(folder), local_files_only=True)
    (height, width), side = config.image_size, max(config.image_size)
    shape = (config.num_frames, config.in_channels, side, side)
    frames = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    processed = processor([list(frames.numpy())], input_data_format="channels_first", return_tensors="pt").pixel_values
    top, left = (side - height) // 2, (side - width) // 2
    cropped = frames[:, :, top : top + height, left : left + width]
    return relative_error("pixels", processed[0], Normalise(source.mean, source.std)(cropped))


def compare_from_files(source: Backbone, encoder: VideoViT, theirs: Any, folder: Path) -> dict[str, dict[str, float]]:
    """Takes clips through `VideoMAEImageProcessor` and their model, and through our evaluation and model.

    Where the input is not square, our evaluation resizes frames to the smallest size that it fits into, which the
    processor's settings cannot say; it is told the size, as the card says.

    Args:
        source: ours.
        encoder: its model.
        theirs: a `VideoMAEModel`, or a `VideoMAEForPreTraining`, whose encoder is taken.
        folder: holds the export.

    Returns:
        See `compare_pictures`.

    Raises:
        ExportError: see `compare_pictures`.
    """
    processor = transformers_library().VideoMAEImageProcessor.from_pretrained(str(folder), local_files_only=True)
    config, backbone = encoder.config, getattr(theirs, "videomae", theirs)
    size = config.image_size

    def prepare(file: PictureFile) -> Tensor:
        frames = file_frames(file.array(), config.num_frames)
        told: dict[str, Any] = {}
        if size[0] != size[1]:
            height, width = resized_size(frames.shape[1], frames.shape[2], size, None)
            told["size"] = {"height": height, "width": width}
        processed = processor(list(frames), input_data_format="channels_last", return_tensors="pt", **told)
        return cast(Tensor, processed.pixel_values).transpose(1, 2)

    def their_features(clips: Tensor) -> dict[str, Tensor]:
        return {"features": backbone(clips.transpose(1, 2)).last_hidden_state}

    ours = Side(our_clips(source, config.num_frames), lambda clips: {"features": encoder.eval()(clips)})
    pixels = Side(ours.prepare, lambda clips: {})
    found = compare_pictures(frame_files(config.in_channels), pixels, Side(prepare, lambda clips: {}), source.std)
    clips = frame_files(config.in_channels, CLIP_SIZES)
    return found | compare_pictures(clips, ours, Side(prepare, their_features), source.std)


def _whole_model(source: Backbone) -> ClipMAEObjective:
    """The objective of the backbone's checkpoint with the same weights, decoder included, in `objective.model`."""
    objective = load_objective(source)
    assert isinstance(objective, ClipMAEObjective)
    return objective


def _encoder_state(encoder: VideoViT) -> dict[str, Tensor]:
    """The weights as `VideoMAEModel` itself saves them, without the prefix that models around it add."""
    state = to_transformers({f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}, major=4)
    return {name.removeprefix("videomae."): tensor for name, tensor in state.items()}


def preprocessor(source: Backbone) -> dict[str, Any]:
    """The contents of preprocessor_config.json: short side to the longer side of the crop, centre crop, statistics."""
    height, width = source.interface.image_size
    return {
        "image_processor_type": "VideoMAEImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": max(height, width)},
        "resample": 2,  # bilinear
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(source.mean),
        "image_std": list(source.std),
    }
