"""Writes a model in the layout of the authors of its architecture, and reads it back before it is published.

In: a `Backbone` (of a checkpoint: the whole model, decoder included) or a `LoadedTokenizer`. Out: a folder with
model.pth and README.md. model.pth holds a state dict under the entry that the authors' scripts look for, and nothing
but tensors. It exists because much fine-tuning, probing and comparing is done with those scripts.

Layouts:
  mae        facebookresearch/mae, {"model": ...}; an encoder without a decoder too
  video_mae  MCG-NJU/VideoMAE and OpenGVLab/VideoMAEv2, {"model": ...}
  mae_st     facebookresearch/mae_st, {"model": ...}
  dc_ae      mit-han-lab/efficientvit, {"state_dict": ...}

Legend: B batch, N patches or tokens, M predicted tokens, V predicted values of a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from pretrain.export.diffusers import example_images
from pretrain.export.original_card import original_card
from pretrain.export.publish import check_error, publish, relative_error
from pretrain.models.mae import MAE
from pretrain.models.tokenizers.dc_ae import DCAE
from pretrain.models.video_mae import VideoMAE
from pretrain.models.video_masking import tube_masks
from pretrain.models.vit import ViT
from pretrain.weights.backbone import Backbone, load_objective
from pretrain.weights.dc_ae import load_dc_ae_weights
from pretrain.weights.dc_ae_names import to_official
from pretrain.weights.files import State
from pretrain.weights.image import load_encoder, load_initial_weights
from pretrain.weights.image_names import to_original_mae
from pretrain.weights.tokenizer import LoadedTokenizer
from pretrain.weights.video import load_video_weights
from pretrain.weights.video_names import to_mae_st, to_original_video_mae

Layout = Literal["mae", "video_mae", "mae_st", "dc_ae"]
"""Whose names and file a model gets."""
Model = MAE | ViT | VideoMAE | DCAE
"""What has an original."""
ORIGINAL_WEIGHTS = "model.pth"
"""The file with the weights."""
ENTRIES: dict[Layout, str] = {"mae": "model", "video_mae": "model", "mae_st": "model", "dc_ae": "state_dict"}
"""The entry of the file under which the authors' scripts look for the state dict."""
TOLERANCE = 1e-5
"""Largest relative error of what was read back. It is 0 but for VideoMAE, whose layout has no biases of keys: softmax
ignores them, and rounding does not."""


@dataclass(frozen=True)
class OriginalExport:
    """What was published."""

    folder: Path
    """Where."""
    layout: Layout
    """Whose names and file it has."""
    errors: dict[str, float]
    """|read back - ours| / |ours| by kind of output: features, predictions, latents, reconstructions."""
    digest: str
    """`weights_digest` of the backbone or tokenizer."""


def export_original(source: Backbone | LoadedTokenizer, out: Path, *, tolerance: float = TOLERANCE) -> OriginalExport:
    """Exports a model into the new folder `out`.

    Args:
        source: what to export; `weights` says which of the checkpoint's weights (trained, moving average) it has.
        out: must not exist; it appears when everything has been compared, and not otherwise.
        tolerance: largest allowed relative error of what is read back.
    Raises:
        FileExistsError: something is at `out`.
        ValueError: there is no original of this model, or it cannot express it.
        ExportError: what is read back computes something else.
    """
    model = whole_model(source)
    refusal = why_not(model)
    if refusal is not None:
        raise ValueError(f"this model has no original layout: {refusal}")
    assert isinstance(model, Model)
    layout = layout_of(model)
    with publish(out) as partial:
        state = {name: tensor.detach().contiguous().clone() for name, tensor in to_original(model).items()}
        torch.save({ENTRIES[layout]: state}, partial / ORIGINAL_WEIGHTS)
        errors = compare(model, read_back(partial / ORIGINAL_WEIGHTS, model))
        for what, error in errors.items():
            check_error(what, error, tolerance)
        (partial / "README.md").write_text(original_card(source, out.name, model, layout, errors, tolerance))
    return OriginalExport(out, layout, errors, source.digest)


def whole_model(source: Backbone | LoadedTokenizer) -> nn.Module:
    """The model to export, on the CPU in evaluation mode: a tokenizer; of a checkpoint the whole masked autoencoder; of
    a file the encoder that it holds.
    """
    if isinstance(source, LoadedTokenizer) or source.checkpoint is None or source.weights == "untrained":
        return source.model
    objective = load_objective(source)
    return objective.players[objective.backbone_player]


def why_not(model: nn.Module) -> str | None:
    """Why no original can express a model, or None."""
    if type(model) is DCAE:
        return None
    if type(model) is MAE or type(model) is VideoMAE:
        encoder = model.config.encoder
    elif type(model) is ViT:
        encoder = model.config
    else:
        return f"it is a {type(model).__name__}; there are those of MAE, VideoMAE, MAE-ST and DC-AE"
    (height, width), (patch_height, patch_width) = encoder.image_size, encoder.patch_size
    square = patch_height == patch_width and (height == width or _is_video_mae(model))
    if not square:
        return (
            f"its images are {height} x {width} and its patches {patch_height} x {patch_width} pixels; there they are "
            "square"
        )
    if isinstance(model, VideoMAE) and _is_video_mae(model):
        wanted = 3 * model.config.encoder.tubelet_size * patch_height**2
        if model.config.target_values != wanted:
            return (
                f"it predicts {model.config.target_values} values of a token; there it must be 3 channels of all "
                f"{wanted // 3} pixels"
            )
    return None


def layout_of(model: Model) -> Layout:
    """Whose names and file a model gets."""
    if isinstance(model, DCAE):
        return "dc_ae"
    return model.config.encoder.family if isinstance(model, VideoMAE) else "mae"


def to_original(model: Model) -> State:
    """The model's tensors under the authors' names."""
    state = model.state_dict()
    if isinstance(model, DCAE):
        return to_official(state, model.config)
    if isinstance(model, VideoMAE):
        return to_original_video_mae(state) if _is_video_mae(model) else to_mae_st(state)
    return to_original_mae(state)


def read_back(path: Path, model: Model) -> Model:
    """A new model of the same kind with the weights of an exported file, read as somebody else's file would be.

    Raises:
        WeightsError: a tensor is missing, left over or of another shape.
    """
    if isinstance(model, ViT):
        return load_encoder(path, model.config).eval()
    if isinstance(model, DCAE):
        tokenizer = DCAE(model.config)
        load_dc_ae_weights(path, tokenizer)
        return tokenizer.eval()
    if isinstance(model, VideoMAE):
        clips = VideoMAE(model.config)
        load_video_weights(path, clips)
        return clips.eval()
    images = MAE(model.config)
    load_initial_weights(path, images)
    return images.eval()


@torch.no_grad()
def compare(model: Model, other: Model) -> dict[str, float]:
    """The largest relative error of each kind of output on fixed random inputs; NaN counts as infinite."""
    errors: dict[str, float] = {}
    for (what, ours), (_, theirs) in zip(outputs(model), outputs(other), strict=True):
        errors[what] = max(errors.get(what, 0.0), relative_error(what, theirs, ours))
    return errors


def outputs(model: Model) -> list[tuple[str, Tensor]]:
    """What a model computes from fixed random inputs, with the kind of each output.

    Returns:
        Predictions [B, N, V] of a MAE, [B, M, V] of a video autoencoder; features [B, 1 + N, D] of an encoder; latents
        and reconstructions of a DC-AE.
    """
    generator = torch.Generator().manual_seed(0)
    model.eval()
    if isinstance(model, DCAE):
        latents = [model.encode(images) for images in example_images(model)]
        return [("latents", latent) for latent in latents] + [
            ("reconstructions", model.decode(latent)) for latent in latents
        ]
    if isinstance(model, VideoMAE):
        clip = model.config.encoder
        clips = torch.randn(2, clip.in_channels, *clip.clip_size, generator=generator)
        mask = tube_masks(torch.arange(2), 1, clip.grid_size, 0.5, seed=0)
        target = torch.zeros(*mask.predict_ids.shape, model.config.target_values)
        return [("predictions", model(clips, mask, target).prediction)]
    encoder = model.config if isinstance(model, ViT) else model.config.encoder
    images = torch.randn(2, encoder.in_channels, *encoder.image_size, generator=generator)
    if isinstance(model, ViT):
        return [("features", model(images))]
    noise = torch.rand(2, encoder.num_patches, generator=generator)
    return [("predictions", model(images, noise).prediction)]


def _is_video_mae(model: nn.Module) -> bool:
    return isinstance(model, VideoMAE) and model.config.encoder.family == "video_mae"
