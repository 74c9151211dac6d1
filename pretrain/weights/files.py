"""Reads the tensors of a weights file that somebody wrote, and checks that they fit a model.

In: a `.safetensors` or torch file. Out: a state dict under the names in the file, without those that wrappers of
training add; or an error with names, so that a half-fitting file never becomes a model that is half random. Nothing in
a file is executed.
"""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]
"""Tensors by name."""
EXPORT_WEIGHTS = "model.safetensors"
"""The file of an exported folder that holds the weights."""
_WRAPPERS = ("model", "state_dict", "module", "model_state")
"""Entries under which training scripts keep the state dict."""
_NAMES_SHOWN = 6
"""Names that a message lists of each kind of misfit."""


class WeightsError(ValueError):
    """A weights file that cannot be used; the message names the file, what was found and what to do."""


def read_state(path: Path) -> State:
    """The state dict in a weights file, as it was stored, on the CPU.

    `{"model": ...}` and the like are unwrapped, and the names lose what DDP (`module.`) and torch.compile
    (`_orig_mod.`) put into them.

    Raises:
        FileNotFoundError: no such file.
        WeightsError: not such a file, damaged, or holding something else than a state dict.
    """
    result: State = {}
    for name, tensor in unwrap_state(read_tensor_file(path), path).items():
        plain = re.sub(r"^(module\.)+", "", name.replace("_orig_mod.", ""))
        if plain in result:
            raise WeightsError(f"{path}: two tensors both mean {plain!r}, one of them {name!r}")
        result[plain] = tensor
    return result


def read_tensor_file(path: Path) -> Any:
    """What a `.safetensors` or torch file holds, on the CPU. Pickled objects are refused.

    Raises:
        FileNotFoundError: no such file.
        WeightsError: not such a file, damaged, or holding more than tensors and plain containers.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {path}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise WeightsError(f"{path} is no readable safetensors file ({error}): fetch or write it again") from error
    try:
        # Training files of the original MAE keep their argparse.Namespace, whose loading only sets attributes.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch explains refused files in several places; the error below is one
            return _torch_load(path)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} holds more than tensors ({_first_line(error)}). Only tensors are loaded, nothing in the file was "
            "executed: ask for a .safetensors file, or save the bare state dict with torch.save"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, AttributeError, TypeError) as error:
        raise WeightsError(
            f"{path} is no readable weights file ({_first_line(error)}): expected .safetensors, or a state dict saved "
            "by torch.save"
        ) from error


def unwrap_state(loaded: Any, path: Path) -> dict[str, Tensor]:
    """The state dict inside `{"model": ...}` and the like.

    Args:
        loaded: what the file holds.
        path: the file, for messages.
    Raises:
        WeightsError: there is no state dict in it.
    """
    while isinstance(loaded, Mapping):
        inner = [loaded[key] for key in _WRAPPERS if isinstance(loaded.get(key), Mapping)]
        if not inner:
            break
        loaded = inner[0]
    if not isinstance(loaded, Mapping) or not loaded:
        raise WeightsError(f"{path} holds {type(loaded).__name__}: expected a state dict, or one under {_WRAPPERS}")
    strangers = [
        str(name) for name, value in loaded.items() if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    if strangers:
        raise WeightsError(
            f"{path} is no state dict: {', '.join(strangers[:5])} {'are' if len(strangers) > 1 else 'is'} no tensor"
        )
    return dict(loaded)


def floats(state: Mapping[str, Tensor]) -> State:
    """The same with float32 in place of other floating point types; integers stay."""
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def check_fit(state: Mapping[str, Tensor], wanted: Mapping[str, torch.Size], path: Path, advice: str) -> None:
    """Checks that `state` has exactly the names and shapes that a model wants.

    Args:
        state: tensors under the model's names.
        wanted: the model's shapes by name.
        path: where the tensors are from, for the message.
        advice: the end of the message: what the file holds, and what to do.
    Raises:
        WeightsError: with the names that are missing, unexpected or of another shape.
    """
    problems = misfits(state, wanted)
    if problems:
        raise WeightsError(f"{path} does not fit the model. {problems}. {advice}")


def misfits(state: Mapping[str, Tensor], wanted: Mapping[str, torch.Size]) -> str:
    """What is missing, unexpected or of another shape, for a message; empty where everything fits."""
    lists = {
        "missing": sorted(wanted.keys() - state.keys()),
        "unexpected": sorted(state.keys() - wanted.keys()),
        "of another shape": [
            f"{name} is {list(state[name].shape)}, expected {list(shape)}"
            for name, shape in sorted(wanted.items())
            if name in state and state[name].shape != shape
        ],
    }
    return "; ".join(
        f"{len(names)} {what}: {', '.join(names[:_NAMES_SHOWN])}{', ...' if len(names) > _NAMES_SHOWN else ''}"
        for what, names in lists.items()
        if names
    )


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """The shapes of tensors, by name."""
    return {name: tensor.shape for name, tensor in state.items()}


def _torch_load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)  # torch's format before 1.6 cannot be mapped


def _first_line(error: BaseException) -> str:
    """The line of an error that says most, cut to 200 characters: what was refused, else the first one."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    refused = [line for line in lines if "GLOBAL" in line or "Unsupported" in line]
    return (refused or lines or [type(error).__name__])[0].strip()[:200]
