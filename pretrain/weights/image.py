"""Loads an image model that others wrote, or Tessera, into our MAE or its encoder.

In: a weights file, or a folder that Tessera wrote. Out: a state dict with our names (`encoder.*`, `decoder.*`), checked
against the module that it goes into: every name and every shape. It exists so that a run can start from, or be
evaluated on, published weights. The layouts that are read are listed in pretrain/weights/image_names.py.

Legend: N patches, D width.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pretrain.checkpoint.open_folder import open_folder
from pretrain.checkpoint.read import load_weights
from pretrain.models.config import VIT_SIZES, ViTConfig, vit_config
from pretrain.models.mae import MAE
from pretrain.models.positions import sincos_position_embedding
from pretrain.models.vit import ViT
from pretrain.weights.files import EXPORT_WEIGHTS, State, WeightsError, check_fit, floats, read_state, shapes_of
from pretrain.weights.finding import checkpoint_in
from pretrain.weights.image_names import canonical_names

logger = logging.getLogger(__name__)


def load_initial_weights(path: Path, module: MAE) -> list[str]:
    """Loads weights to start a run from into `module`.

    The encoder must be complete. The decoder may be absent as a whole (an encoder-only file), then its tensors stay as
    they are. Fixed position embeddings of another image size are recomputed.

    Args:
        path: a weights file, or a checkpoint, run or export folder of Tessera.
        module: a MAE with materialised parameters.
    Returns:
        The names of `module` that the file does not hold.
    Raises:
        FileNotFoundError: nothing at `path`.
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

    Args:
        path: a weights file, or a checkpoint, run or export folder of Tessera.
        config: the architecture that it must fit.
    Raises:
        FileNotFoundError: nothing at `path`.
        WeightsError: unreadable file, or names or shapes that do not fit `config`.
    """
    state = {name: tensor for name, tensor in read_canonical(path).items() if name.startswith("encoder.")}
    model = ViT(config)
    wanted = {f"encoder.{name}": tensor for name, tensor in model.state_dict().items()}
    fitted = _fit(state, wanted, path)
    model.load_state_dict({name.removeprefix("encoder."): tensor for name, tensor in fitted.items()})
    return model


def parse_architecture(name: str, *, in_channels: int = 3) -> ViTConfig:
    """The shape of a ViT that a name stands for.

    Args:
        name: of timm (`vit_base_patch16_224`), of the original (`mae_vit_base_patch16`), or a size (`base`).
        in_channels: channels of the images.
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


def read_canonical(path: Path) -> State:
    """The tensors of a weights file or of a folder of Tessera under our names, fp32, on the CPU.

    Raises:
        FileNotFoundError: nothing at `path`.
        WeightsError: an unreadable file, or a folder that holds neither weights nor a checkpoint.
    """
    if path.is_dir() and not (path / EXPORT_WEIGHTS).is_file():
        return load_weights(checkpoint_in(open_folder(path)), "model")
    return floats(canonical_names(read_state(path / EXPORT_WEIGHTS if path.is_dir() else path)))


def _fit(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> State:
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
    advice = f"The file holds {describe_encoder(state)}. Make the architecture agree with it"
    check_fit(fitted, shapes_of(wanted), path, advice)
    return fitted


def is_fixed_position_embedding(positions: Tensor, tolerance: float = 1e-3) -> bool:
    """Whether positions are MAE's fixed sin-cos embedding of any grid.

    Args:
        positions: [1, 1 + N, D], the class token's first.
        tolerance: largest absolute difference; files may be fp16.
    """
    num_patches, width = positions.shape[1] - 1, positions.shape[2]
    if num_patches < 1 or width % 4:
        return False
    grids = [(rows, num_patches // rows) for rows in range(1, num_patches + 1) if num_patches % rows == 0]
    return any(
        torch.allclose(positions.float(), sincos_position_embedding(grid, width), atol=tolerance, rtol=0.0)
        for grid in grids
    )
