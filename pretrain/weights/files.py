"""Loads somebody else's weights: the original MAE's files, timm's, and Tessera's own, into our modules.

In: a weights file (`.safetensors`, or a torch file of which only tensors are read) or a folder that Tessera wrote. Out:
a state dict with our names (`encoder.*`, `decoder.*`), checked against the module that it goes into: every name and
every shape. It exists so that a run can start from, or be evaluated on, published weights, and so that a half-fitting
file is an error with names rather than a model that is half random.

Layouts (names after `model`/`state_dict` is unwrapped and `module.`, `_orig_mod.` are stripped):
  original MAE  cls_token, pos_embed, patch_embed.proj.*, blocks.i.*, norm.*; full files add mask_token and decoder_*
  timm          the same encoder; `head.*` is dropped, `fc_norm.*` of average-pooled models is our norm
  Tessera       encoder.<the above>, decoder.{embed,mask_token,pos_embed,blocks,norm,pred}

Legend: N patches, D width.
"""

from __future__ import annotations

import argparse
import logging
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint.read import checkpoint_of, find_damage, load_weights
from pretrain.checkpoint.store import Place
from pretrain.models.mae import MAE
from pretrain.models.vit import VIT_SIZES, ViT, ViTConfig, sincos_position_embedding, vit_config

logger = logging.getLogger(__name__)

EXPORT_WEIGHTS = "model.safetensors"
_WRAPPERS = ("model", "state_dict", "module", "model_state")
_DECODER_NAMES = {  # original MAE -> ours
    "decoder_embed.": "decoder.embed.",
    "decoder_pos_embed": "decoder.pos_embed",
    "decoder_blocks.": "decoder.blocks.",
    "decoder_norm.": "decoder.norm.",
    "decoder_pred.": "decoder.pred.",
}


class WeightsError(ValueError):
    """A weights file that cannot be used; the message names the file, what was found and what to do."""


def load_initial_weights(path: Path, module: MAE) -> list[str]:
    """Loads weights to start a run from into `module`; returns the names of `module` that the file does not hold.

    The encoder must be complete. The decoder may be absent as a whole (an encoder-only file), then its names are
    returned and its tensors stay as they are. Fixed position embeddings of another image size are recomputed.

    Args:
        path: a weights file, or a checkpoint, run or export folder of Tessera.
        module: a MAE with materialised parameters.

    Raises:
        WeightsError: unreadable file, or names or shapes that do not fit; nothing has been loaded then.
    """
    state = read_canonical(path)
    target = module.state_dict()
    has_decoder = any(name.startswith("decoder.") for name in state)
    wanted = {name: tensor for name, tensor in target.items() if has_decoder or name.startswith("encoder.")}
    fitted = _fit(state, wanted, path)
    module.load_state_dict(fitted, strict=False)  # _fit has checked every wanted name
    return sorted(name for name in target if name not in fitted)


def load_encoder(path: Path, config: ViTConfig) -> ViT:
    """A ViT with the encoder of a weights file; a decoder in the file is left out.

    Raises:
        WeightsError: unreadable file, or names or shapes that do not fit `config`.
    """
    state = {name: tensor for name, tensor in read_canonical(path).items() if name.startswith("encoder.")}
    model = ViT(config)
    wanted = {f"encoder.{name}": tensor for name, tensor in model.state_dict().items()}
    fitted = _fit(state, wanted, path)
    model.load_state_dict({name.removeprefix("encoder."): tensor for name, tensor in fitted.items()})
    return model


def parse_architecture(name: str, *, in_channels: int = 3) -> ViTConfig:
    """The shape behind a timm name (`vit_base_patch16_224`), the original's (`mae_vit_base_patch16`) or a size.

    Raises:
        ValueError: another name.
    """
    if name in VIT_SIZES:
        return vit_config(name, in_channels=in_channels)
    match = re.fullmatch(r"(?:mae_)?vit_([a-z]+)_patch(\d+)(?:_(\d+))?(?:\..+)?", name)
    if match is None or match[1] not in VIT_SIZES:
        raise ValueError(
            f"the architecture {name!r} is not known: expected a timm name such as vit_base_patch16_224 "
            f"or a size ({', '.join(VIT_SIZES)})"
        )
    return vit_config(match[1], int(match[3] or 224), int(match[2]), in_channels)


def describe_encoder(state: Mapping[str, Tensor]) -> str:
    """What a canonical state dict's encoder looks like, for messages: width, depth, patch and number of patches."""
    projection, positions = state.get("encoder.patch_embed.proj.weight"), state.get("encoder.pos_embed")
    if projection is None or positions is None or projection.ndim != 4 or positions.ndim != 3:
        return f"no ViT encoder ({len(state)} tensors, for example {', '.join(sorted(state)[:3]) or 'none'})"
    depth = len({name.split(".")[2] for name in state if name.startswith("encoder.blocks.")})
    width, channels, height, across = projection.shape
    return (
        f"a ViT encoder of width {width} and depth {depth} with {positions.shape[1] - 1} patches of "
        f"{height} x {across} pixels and {channels} channels"
    )


def read_canonical(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file or of a folder of Tessera under our names, fp32, on the CPU."""
    if path.is_dir() and not (path / EXPORT_WEIGHTS).is_file():
        return load_weights(checkpoint_in(path), "model")
    file = path / EXPORT_WEIGHTS if path.is_dir() else path
    state = canonical_names(unwrap_state(read_tensor_file(file), file))
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def checkpoint_in(path: Path) -> Place:
    """The checkpoint folder that `path` is, or the newest complete one of the run folder that it is."""
    checkpoint = checkpoint_of(path)
    if checkpoint is None:
        raise WeightsError(
            f"{path} holds neither a complete checkpoint nor {EXPORT_WEIGHTS}: give a checkpoint (step-...), a run "
            "with a complete checkpoint, an export folder or a weights file"
        )
    damage = find_damage(checkpoint, hashes=False)
    if damage is not None:
        raise WeightsError(f"{checkpoint} is damaged ({damage}): use another checkpoint of the run")
    return checkpoint


def read_tensor_file(path: Path) -> Any:
    """What a `.safetensors` or torch file holds. Nothing in the file is executed: pickled objects are refused.

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


def _torch_load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)  # torch's format before 1.6 cannot be mapped


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    refused = [line for line in lines if "GLOBAL" in line or "Unsupported" in line]
    return (refused or lines or [type(error).__name__])[0].strip()[:200]


def unwrap_state(loaded: Any, path: Path) -> dict[str, Tensor]:
    """The state dict inside `{"model": ...}` and the like."""
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


def canonical_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under our names; classification heads and an encoder-only file's mask token are dropped.

    Raises:
        WeightsError: two tensors would get the same name.
    """
    cleaned = {re.sub(r"^(module\.)+", "", name.replace("_orig_mod.", "")): value for name, value in state.items()}
    has_decoder = any(name.startswith(("decoder_", "decoder.")) for name in cleaned)
    has_norm = any(name in cleaned for name in ("norm.weight", "encoder.norm.weight"))
    result: dict[str, Tensor] = {}
    for name, tensor in cleaned.items():
        canonical = _canonical(name, has_decoder=has_decoder, has_norm=has_norm)
        if canonical is None:
            continue
        if canonical in result:
            raise WeightsError(f"two tensors of the file both mean {canonical!r}, one of them {name!r}")
        result[canonical] = tensor
    return result


def _canonical(name: str, *, has_decoder: bool, has_norm: bool) -> str | None:
    if name.startswith(("encoder.", "decoder.")):
        return name
    for theirs, ours in _DECODER_NAMES.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    if name == "mask_token":
        return "decoder.mask_token" if has_decoder else None
    if name.startswith(("head.", "head_drop.")):
        return None
    if name.startswith("fc_norm.") and not has_norm:
        return f"encoder.{name.removeprefix('fc_')}"
    return f"encoder.{name}"


def _fit(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """`state` with exactly the names and shapes of `wanted`; fixed positions of another grid become `wanted`'s own."""
    fitted = dict(state)
    for name in ("encoder.pos_embed", "decoder.pos_embed"):
        saved, own = fitted.get(name), wanted.get(name)
        if saved is not None and own is not None and saved.shape != own.shape and saved.shape[2:] == own.shape[2:]:
            if not is_fixed_position_embedding(saved):
                raise WeightsError(
                    f"{path}: {name} was learned for {saved.shape[1] - 1} patches, the model has {own.shape[1] - 1}; "
                    "only fixed sin-cos positions can be recomputed: use the image size that the weights were made for"
                )
            logger.info(
                "%s: %s recomputed for %d instead of %d patches", path, name, own.shape[1] - 1, saved.shape[1] - 1
            )
            fitted[name] = own
    check_fit(fitted, wanted, path, f"The file holds {describe_encoder(state)}. ")
    return fitted


def check_fit(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path, holds: str = "") -> None:
    """Raises WeightsError, with names and shapes, unless `state` has exactly the names and shapes of `wanted`.

    holds: a sentence about the file, for the message.
    """
    shapes = [
        f"{name} is {list(state[name].shape)}, expected {list(wanted[name].shape)}"
        for name in sorted(wanted)
        if name in state and state[name].shape != wanted[name].shape
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}"
        for what, names in (
            ("missing", sorted(wanted.keys() - state.keys())),
            ("unexpected", sorted(state.keys() - wanted.keys())),
            ("of another shape", shapes),
        )
        if names
    ]
    if problems:
        raise WeightsError(
            f"{path} does not fit the model. {'; '.join(problems)}. {holds}Make the architecture agree with it"
        )


def is_fixed_position_embedding(positions: Tensor, tolerance: float = 1e-3) -> bool:
    """Whether [1, 1 + N, D] is MAE's sin-cos embedding of any grid with N cells (tolerance: files may be fp16)."""
    num_patches, width = positions.shape[1] - 1, positions.shape[2]
    if num_patches < 1 or width % 4:
        return False
    grids = [(rows, num_patches // rows) for rows in range(1, num_patches + 1) if num_patches % rows == 0]
    return any(
        torch.allclose(positions.float(), sincos_position_embedding(grid, width), atol=tolerance, rtol=0.0)
        for grid in grids
    )
