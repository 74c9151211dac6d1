"""Starting weights of a video autoencoder, from whatever the user has: a video model's file, or an image MAE's.

In: a weights file, a folder of transformers or of Tessera, a run or a checkpoint. Out: a `VideoMAE` with these weights,
checked name by name and shape by shape before anything is loaded, and the names that the file does not hold. It exists
so that published weights, other people's runs and image models can start a run on clips.

Layouts, told apart by their names (after `model`, `module`, `model_state` and `_orig_mod.` are taken off):
  Tessera            a `VideoMAE`'s own names, from a file or a checkpoint
  transformers       `VideoMAEForPreTraining`, `VideoMAEModel` or a classifier, versions 4 and 5
  original VideoMAE  v1 and v2, pretrained (encoder and decoder) or fine-tuned (encoder)
  original MAE-ST    with separate positions in space and time
  image              an image MAE of Tessera, of the original or of timm: inflated into the encoder (models/inflate.py)
Fixed positions are not taken from files but computed for the model's own clips, so frames and sizes may differ. Learned
ones (MAE-ST's) are taken, and refused when there are more or fewer of them than the model has.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pretrain.checkpoint.dcp import read_tensors
from pretrain.checkpoint.folder import Folder
from pretrain.checkpoint.open_folder import open_folder
from pretrain.config import load_run_config
from pretrain.models.config import MAEConfig
from pretrain.models.inflate import Inflation, inflate_encoder
from pretrain.models.positions import sincos_position_embedding, sinusoid_table
from pretrain.models.video_config import Family, VideoMAEConfig
from pretrain.models.video_mae import VideoMAE
from pretrain.weights.files import EXPORT_WEIGHTS, State, WeightsError, check_fit, floats, read_state, shapes_of
from pretrain.weights.finding import EXPORT_CONFIG, checkpoint_in
from pretrain.weights.image import is_fixed_position_embedding
from pretrain.weights.image_names import canonical_names
from pretrain.weights.video_names import from_mae_st, from_original_video_mae, from_transformers

logger = logging.getLogger(__name__)

Layout = Literal["tessera", "transformers", "video_mae", "mae_st", "image"]
"""Whose names a state dict has."""
_WEIGHTS_FILES = (EXPORT_WEIGHTS, "pytorch_model.bin")
"""The files of a folder that may hold the weights; the first one that is there is read."""
_FIXED_POSITIONS = ("encoder.positions.table", "decoder.positions.table")
"""Our buffers with VideoMAE's sinusoids, of the encoder and of the decoder."""
_NAMES_SHOWN = 6
"""Names that a message lists of a file that is not recognised."""


@dataclass(frozen=True)
class _StoredModel:
    """Tensors as they were stored, and what their shapes do not say."""

    state: State
    """fp32, under the names that they were stored with, without wrappers'."""
    heads: int | None = None
    """Attention heads of the encoder; None: the source does not say."""
    decoder_heads: int | None = None
    """Attention heads of the decoder; None: the source does not say, or has none."""


def load_video_weights(path: Path, model: VideoMAE, *, inflation: Inflation = "centre") -> list[str]:
    """Loads weights to start a run from into `model`.

    The encoder must be complete. The decoder may be absent as a whole (an encoder's file, a classifier, an image
    model), then its tensors stay as they are. Of a checkpoint with a moving average that is taken.

    Args:
        path: a weights file, a folder with config.json and model.safetensors (transformers' or Tessera's), or a run or
            checkpoint of Tessera.
        model: with materialised parameters.
        inflation: how a patch projection of an image model becomes one of tubelets, see `inflate_encoder`.
    Returns:
        The names of `model` that the source does not hold.
    Raises:
        FileNotFoundError: nothing at `path`.
        WeightsError: an unreadable file, or a model that does not fit; nothing has been loaded then.
    """
    found, config = _read(path), model.config
    layout = layout_of(found.state, path)
    _check_heads(found, config, layout, path)
    try:
        state = _under_our_names(found.state, layout, config, inflation, path)
    except ValueError as error:
        raise error if isinstance(error, WeightsError) else WeightsError(f"{path}: {error}") from error
    target = model.state_dict()
    has_decoder = any(name.startswith("decoder.") for name in state)
    wanted = {name: tensor for name, tensor in target.items() if has_decoder or name.startswith("encoder.")}
    _check_learned_positions(state, wanted, path)
    check_fit(state, shapes_of(wanted), path, "Make the architecture agree with it")
    model.load_state_dict(state, strict=False)  # check_fit has seen every wanted name
    return sorted(name for name in target if name not in state)


def layout_of(state: Mapping[str, Tensor], path: Path) -> Layout:
    """Whose names these are.

    Args:
        state: tensors under the names that they were stored with.
        path: where they are from, for messages.
    Raises:
        WeightsError: they have none of the layouts above.
    """
    if any(name.removeprefix("encoder.").startswith("positions.") for name in state):
        return "tessera"
    if "pos_embed_spatial" in state:
        return "mae_st"
    projections = [tensor for name, tensor in state.items() if name.endswith("patch_embeddings.projection.weight")]
    if projections and projections[0].ndim == 5:
        return "transformers"
    if projections:
        raise WeightsError(
            f"{path} is an image model of transformers; to start from images, give the original's or timm's file of "
            "it, or a run of image_mae"
        )
    projection = state.get("encoder.patch_embed.proj.weight", state.get("patch_embed.proj.weight"))
    if projection is not None and projection.ndim == 4:
        return "image"
    if projection is not None and projection.ndim == 5:
        if "cls_token" in state:
            raise WeightsError(
                f"{path} has a class token and joint positions for space and time; MAE-ST's are separate "
                "(pos_embed_spatial, pos_embed_temporal), and only these can be taken over"
            )
        return "video_mae"
    raise WeightsError(
        f"{path} holds no video autoencoder and no image encoder ({', '.join(sorted(state)[:_NAMES_SHOWN])}); expected "
        "the layout of VideoMAE, MAE-ST, transformers' VideoMAE, Tessera, or of an image MAE"
    )


def _check_learned_positions(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> None:
    """Checks that learned positions are as many as the model has.

    Raises:
        WeightsError: they were learned for clips of another length or size.
    """
    for name in sorted(name for name in wanted if ".positions." in name and name in state):
        saved, own = state[name].shape, wanted[name].shape
        if saved[1] != own[1] and saved[2:] == own[2:]:
            raise WeightsError(
                f"{path}: {name} was learned for {saved[1]} places or times, the model has {own[1]}; only fixed "
                "positions can be computed anew: use the frames and the size that the weights were made for"
            )


def _read(path: Path) -> _StoredModel:
    """What lies at a path: a file, a folder with config.json, a checkpoint or a run.

    Raises:
        FileNotFoundError: nothing.
        WeightsError: something else.
    """
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}: expected a file, an exported folder, a checkpoint or a run")
    files = [path] if path.is_file() else [path / name for name in _WEIGHTS_FILES if (path / name).is_file()]
    if not files:
        return _from_checkpoint(checkpoint_in(open_folder(path)))
    described = _read_json(path / EXPORT_CONFIG) if path.is_dir() else {}
    arguments = described.get("model_args") or {}  # of an export to timm
    heads = described.get("num_attention_heads", arguments.get("num_heads"))
    return _StoredModel(floats(read_state(files[0])), heads, described.get("decoder_num_attention_heads"))


def _from_checkpoint(checkpoint: Folder) -> _StoredModel:
    config = getattr(load_run_config(checkpoint).objective, "model", None)
    if not isinstance(config, (MAEConfig, VideoMAEConfig)):
        raise WeightsError(
            f"{checkpoint} is of a run that trained no masked autoencoder; expected one of image_mae, mae_st, "
            "video_mae or video_mae_v2"
        )
    state = read_tensors(checkpoint, "ema.model.") or read_tensors(checkpoint, "model.model.")
    return _StoredModel(state, config.encoder.heads, config.decoder_heads)


def _under_our_names(state: State, layout: Layout, config: VideoMAEConfig, inflation: Inflation, path: Path) -> State:
    """Tensors of a layout as a model of this configuration has them; `path` is for messages."""
    if layout == "image":
        return _inflated(state, config, inflation, path)
    is_mae_st = layout == "mae_st" or any(name.endswith("positions.spatial") for name in state)
    _check_family("mae_st" if is_mae_st else "video_mae", config, path)
    if layout == "tessera":
        return _from_tessera(state, config, path)
    if layout == "mae_st":
        return from_mae_st(state)
    convert = from_transformers if layout == "transformers" else from_original_video_mae
    return convert(_without_fixed_positions(state, path), config)


def _from_tessera(state: State, config: VideoMAEConfig, path: Path) -> State:
    """Our own names, also of an encoder alone, with the fixed positions of the model's clips."""
    if any(name.startswith("positions.") for name in state):
        state = {f"encoder.{name}": tensor for name, tensor in state.items()}
    result = dict(state)
    for name, width in zip(_FIXED_POSITIONS, (config.encoder.width, config.decoder_width), strict=True):
        if name in result and result[name].shape[2:] == (width,):
            if result[name].shape[1] != config.encoder.num_tokens:
                logger.info(
                    "%s: %s computed for %d tokens instead of %d",
                    path, name, config.encoder.num_tokens, result[name].shape[1],
                )  # fmt: skip
            result[name] = sinusoid_table(config.encoder.num_tokens, width)
    return result


def _inflated(state: State, config: VideoMAEConfig, inflation: Inflation, path: Path) -> State:
    """The encoder of an image model for clips; its decoder predicts patches and not tubelets, and is left out."""
    image = {
        name.removeprefix("encoder."): tensor
        for name, tensor in canonical_names(state).items()
        if name.startswith("encoder.")
    }
    positions, encoder = image.get("pos_embed"), config.encoder
    if positions is not None and encoder.width % 4 == 0 and is_fixed_position_embedding(positions):
        image["pos_embed"] = sincos_position_embedding(encoder.grid_size[1:], positions.shape[2])
    logger.info("%s is an image model: its encoder is inflated (%s)", path, inflation)
    return {f"encoder.{name}": tensor for name, tensor in inflate_encoder(image, encoder, inflation).items()}


def _without_fixed_positions(state: State, path: Path) -> State:
    """The same without stored sinusoids, which the model computes.

    Args:
        state: under the names of transformers or of the original.
        path: where it is from, for messages.
    Raises:
        WeightsError: the positions were learned.
    """
    kept = {}
    for name, tensor in state.items():
        if not name.endswith(("pos_embed", "position_embeddings")):
            kept[name] = tensor
        elif tensor.ndim != 3 or not torch.allclose(tensor, sinusoid_table(*tensor.shape[1:]), rtol=0.0, atol=1e-3):
            raise WeightsError(
                f"{path}: {name} was learned; VideoMAE's positions here are its fixed sinusoid, which pretraining uses"
            )
    return kept


def _check_family(found: Family, config: VideoMAEConfig, path: Path) -> None:
    """Checks that the file is of the model's family.

    Raises:
        WeightsError: it is of the other one.
    """
    if found != config.encoder.family:
        have = {"mae_st": "learned positions and a class token", "video_mae": "a fixed sinusoid and no class token"}
        raise WeightsError(
            f"{path} is of the family {found!r} ({have[found]}), the model of {config.encoder.family!r} "
            f"({have[config.encoder.family]}): set objective.model.encoder.family, and the objective, to the file's"
        )


def _check_heads(found: _StoredModel, config: VideoMAEConfig, layout: Layout, path: Path) -> None:
    """Checks the number of attention heads, as far as it is known: no tensor's shape shows it, and with another number
    the weights would mean nothing.

    Raises:
        WeightsError: it is not the model's.
    """
    has_decoder = layout != "image" and any(name.startswith("decoder.") for name in found.state)
    for part, heads, own in (
        ("encoder", found.heads, config.encoder.heads),
        ("decoder", found.decoder_heads if has_decoder else None, config.decoder_heads),
    ):
        if heads is not None and heads != own:
            raise WeightsError(f"{path}: the {part} has {heads} attention heads, the model's {own}: make them agree")


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where it is missing or unreadable, because the weights say the rest."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
