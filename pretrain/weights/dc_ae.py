"""Loads DC-AE weights that others wrote, to fine-tune or evaluate them: every name and every shape is checked.

In: a file of the authors (efficientvit, DC-Gen), a file or folder of diffusers' `AutoencoderDC`, or a file of our own.
Out: float32 tensors with our names. It exists so that published tokenizers can be adapted to one's own pictures, and so
that a file which fits half, or fits another network of the same shapes, is an error that says which configuration fits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.models.tokenizers.dc_ae import DCAE
from pretrain.models.tokenizers.dc_ae_config import DCAE_PRESETS, DCAEConfig
from pretrain.weights.dc_ae_names import config_from_diffusers, from_diffusers, from_official
from pretrain.weights.files import State, WeightsError, floats, misfits, read_state, shapes_of

DIFFUSERS_CONFIG = "config.json"
"""The file of a folder of diffusers that describes the model."""
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
"""The file of such a folder that holds the weights."""
DIFFUSERS_INDEX = f"{DIFFUSERS_WEIGHTS}.index.json"
"""The file that names the parts instead, where diffusers cut large weights into several files."""


def load_dc_ae_weights(path: Path, model: DCAE) -> None:
    """Loads a file or folder, see `read_dc_ae_weights`, into a model with materialised parameters.

    Raises:
        FileNotFoundError: nothing at `path`.
        WeightsError: as `read_dc_ae_weights`; nothing has been loaded then.
    """
    model.load_state_dict(read_dc_ae_weights(path, model.config))


def read_dc_ae_weights(path: Path, config: DCAEConfig) -> State:
    """The weights of a DC-AE of this configuration under our names: float32 (counters int64), on the CPU.

    Args:
        path: a weights file in the layout of the authors, of diffusers or of our own (`.safetensors`, or a torch file
            of which only tensors are read), or a folder that diffusers wrote.
        config: the architecture that they must fit. Settings which leave no trace in names and shapes (an activation,
            shortcuts) are compared as far as the layout tells them: a folder tells all of them, an official file the
            shortcuts, a bare file of diffusers or of our own none.
    Raises:
        FileNotFoundError: nothing at `path`.
        WeightsError: unreadable, or another architecture; the message names a preset that fits, where one does.
    """
    if path.is_dir():
        described, state, _ = read_dc_ae_folder(path)
        differing = [
            f"{field.name} is {getattr(described, field.name)} there and {getattr(config, field.name)} here"
            for field in fields(DCAEConfig)
            if field.name != "scaling_factor" and getattr(described, field.name) != getattr(config, field.name)
        ]
        if differing:
            raise WeightsError(f"{path} does not fit the model: {'; '.join(differing)}. {_advice(state)}")
        return state
    tensors = read_state(path)
    layout = layout_of(tensors)
    if layout == "official":
        _check_shortcuts(tensors, config, path)
    return _fitted(_renamed(tensors, layout, path), config, path)


def read_dc_ae_folder(path: Path) -> tuple[DCAEConfig, State, float]:
    """What a folder of diffusers' `AutoencoderDC` holds.

    Returns:
        (architecture, weights that fit it under our names in float32, scaling factor).
    Raises:
        FileNotFoundError: no config.json or no weights in it.
        WeightsError: another model, an architecture that we do not have, or weights that do not fit it.
    """
    file = path / DIFFUSERS_CONFIG
    if not file.is_file():
        raise FileNotFoundError(
            f"no {DIFFUSERS_CONFIG} in {path}: expected a folder that diffusers' AutoencoderDC wrote"
        )
    try:
        described: dict[str, Any] = json.loads(file.read_text())
        config = config_from_diffusers(described)
    except (ValueError, TypeError, KeyError) as error:
        raise WeightsError(f"{file} describes no DC-AE that can be built here: {error}") from error
    state = _renamed(_folder_tensors(path), "diffusers", path)
    return config, _fitted(state, config, path), float(config.scaling_factor)


def layout_of(tensors: Mapping[str, Tensor]) -> str:
    """Whose names these are: `official`, `diffusers` or `ours`."""
    if any(".op_list." in name for name in tensors):
        return "official"
    return "diffusers" if any(re.search(r"\.(down|up)_blocks\.", name) for name in tensors) else "ours"


def fitting_preset(state: Mapping[str, Tensor]) -> str | None:
    """The name of the preset that canonical names and shapes belong to, whatever the number of image channels."""
    first = state.get("encoder.project_in.conv.weight")
    if first is None or first.ndim != 4:
        return None
    for name, preset in DCAE_PRESETS.items():
        if not misfits(state, _shapes(replace(preset, in_channels=first.shape[1]))):
            return name
    return None


def _folder_tensors(path: Path) -> State:
    """The state dict of a folder of diffusers, in one file or in several."""
    if (path / DIFFUSERS_WEIGHTS).is_file():
        return read_state(path / DIFFUSERS_WEIGHTS)
    if not (path / DIFFUSERS_INDEX).is_file():
        raise FileNotFoundError(
            f"no {DIFFUSERS_WEIGHTS} in {path}: give the weights file itself if it has another name"
        )
    try:
        names = set(json.loads((path / DIFFUSERS_INDEX).read_text())["weight_map"].values())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise WeightsError(f"{path / DIFFUSERS_INDEX} is no index of weights files ({error})") from error
    outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if outside:
        raise WeightsError(f"{path / DIFFUSERS_INDEX} names {outside[0]!r}; expected files of that folder")
    return {name: tensor for file in sorted(names) for name, tensor in read_state(path / file).items()}


def _renamed(tensors: State, layout: str, path: Path) -> State:
    """Tensors of a layout (see `layout_of`) under our names, in float32."""
    try:
        if layout == "diffusers":
            tensors = from_diffusers(tensors)
        elif layout == "official":
            tensors = from_official(tensors)
    except ValueError as error:
        raise WeightsError(f"{path} cannot be read as a DC-AE: {error}") from error
    return floats(tensors)


def _check_shortcuts(tensors: Mapping[str, Tensor], config: DCAEConfig, path: Path) -> None:
    """Checks that an official file was made with our shortcuts: its names say whether a residual lies around a layer
    ("main."), and as that has no weights, the shapes do not.

    Raises:
        WeightsError: they differ.
    """
    between = r"encoder\.stages\.\d+\.op_list\.\d+\.(main\.)?conv\."
    found = {
        "latent_shortcuts": any(name.startswith("encoder.project_out.main.") for name in tensors),
        "shortcuts": any((match := re.match(between, name)) is not None and match[1] for name in tensors),
    }
    differing = [
        f"{setting} is {there} there and {getattr(config, setting)} here"
        for setting, there in found.items()
        if there != getattr(config, setting)
    ]
    if differing:
        raise WeightsError(
            f"{path} holds another network of such shapes: {'; '.join(differing)}. Set objective.model accordingly"
        )


def _fitted(state: State, config: DCAEConfig, path: Path) -> State:
    """`state`, when its names and shapes are those of `config`.

    Raises:
        WeightsError: they are not.
    """
    problems = misfits(state, _shapes(config))
    if problems:
        raise WeightsError(f"{path} does not fit the model. {problems}. {_advice(state)}")
    return state


def _shapes(config: DCAEConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return shapes_of(DCAE(config).state_dict())


def _advice(state: Mapping[str, Tensor]) -> str:
    """What the file holds and which configuration would fit."""
    first, last = state.get("encoder.project_in.conv.weight"), state.get("decoder.project_in.conv.weight")
    if first is None or last is None or first.ndim != 4 or last.ndim != 4:
        return f"The file holds no DC-AE ({len(state)} tensors, for example {', '.join(sorted(state)[:3])})"
    num_stages = 1 + max(
        (int(match[1]) for name in state if (match := re.search(r"\.stages\.(\d+)\.", name))), default=0
    )
    held = (
        f"The file holds a DC-AE of {num_stages} stages with {first.shape[1]} image and {last.shape[1]} latent channels"
    )
    preset = fitting_preset(state)
    if preset is None:
        return f"{held}, which is no preset; give objective.model the fields that it was made with"
    return f"{held}: the preset {preset!r} with in_channels {first.shape[1]} fits"
