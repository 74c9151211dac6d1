"""Finds and loads the tokenizer that a user names: a run, a checkpoint, or a folder in diffusers' layout.

In: a path. Out: `LoadedTokenizer`, an unsharded autoencoder on the CPU with the pixel statistics it was trained with
and its identity (step, run, digest of the weights). It exists so that evaluation, export and the encoding of data sets
see one thing whatever the user has.
Legend: B batch, C image channels, L latent channels, H/W pixels, h/w latent pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pretrain.checkpoint.dcp import tensor_shapes
from pretrain.checkpoint.read import find_damage, load_weights, read_complete
from pretrain.checkpoint.store import Place, RemoteFolder
from pretrain.config import load_run_config
from pretrain.models.tokenizers.autoencoder import Autoencoder
from pretrain.models.tokenizers.dc_ae import DCAE
from pretrain.weights.backbone import Weights, find_checkpoint, run_of, weights_digest

if TYPE_CHECKING:
    from pretrain.config import RunConfig
    from pretrain.objectives.base import Objective

FOLDER_CONFIG = "config.json"
FOLDER_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json")
"""What a folder of diffusers' AutoencoderDC holds beside `config.json`; the second where the weights are in parts."""


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer and where it comes from."""

    model: Autoencoder
    """on the CPU, fp32, in eval mode"""
    mean: tuple[float, ...]
    """per channel, on the scale where the stored range is [0, 1]"""
    std: tuple[float, ...]
    """per channel, on the same scale"""
    label: str
    """short name for folders and tables, e.g. `step-00001200` or `step-00001200-ema`"""
    source: Place
    """the checkpoint folder or exported folder that was read"""
    digest: str
    """`weights_digest` of the model"""
    image_size: tuple[int, int] | None = None
    """(height, width) in pixels of the images that the run trained on; it encodes any size"""
    step: int | None = None
    """optimizer step of the checkpoint"""
    config: RunConfig | None = None
    """the run's configuration, when the tokenizer comes from a checkpoint"""
    complete: Mapping[str, Any] | None = None
    """the checkpoint's COMPLETE record"""
    weights: Weights = "trained"
    """which weights these are; `imported` ones came from a folder without a run"""
    scaling_factor: float | None = None
    """1 / RMS of the latents over a data set, where the folder names it"""
    named_by: Path | None = None
    """the run's folder, when it names a checkpoint that lies elsewhere (`checkpoint.folder`)"""

    @property
    def run_dir(self) -> Path | None:
        """The run's folder, when the checkpoint still lies in one or was found by one."""
        return run_of(self.source, self.complete, self.named_by)


def load_tokenizer(path: Place, *, ema: bool | None = None, verify: bool = False) -> LoadedTokenizer:
    """The tokenizer behind `path`.

    Args:
        path: run folder (its newest complete checkpoint), checkpoint folder, or a folder in diffusers' layout; in an
            object store, a checkpoint or the folder that holds a run's checkpoints.
        ema: True: the moving average of the weights, which only checkpoints have; False: the weights themselves; None:
            the moving average where there is one.
        verify: check every file's sha256 of a checkpoint, not only sizes.

    Raises:
        FileNotFoundError: nothing at `path`.
        ValueError: no tokenizer there, a damaged checkpoint, weights that do not fit, or no moving average.
    """
    if not isinstance(path, RemoteFolder) and not path.exists():
        raise FileNotFoundError(f"no tokenizer at {path}: expected a run, a checkpoint or an exported folder")
    if _is_folder(path):
        assert isinstance(path, Path)
        if ema:
            raise ValueError(f"{path} has no moving average beside its weights: only checkpoints do")
        return _from_folder(path)
    found = find_checkpoint(path)
    tokenizer = _from_checkpoint(found, ema=ema, verify=verify)
    if isinstance(path, RemoteFolder) or found == path or found.parent == path / "checkpoints":
        return tokenizer
    return replace(tokenizer, named_by=path)


def is_tokenizer(path: Place) -> bool:
    """Whether `load_tokenizer` would find a tokenizer here; reads no weights."""
    if not isinstance(path, RemoteFolder) and not path.is_dir():
        return False
    if _is_folder(path):
        return True
    try:
        return isinstance(_build(load_run_config(find_checkpoint(path)))[1], Autoencoder)
    except ValueError:  # neither a run nor a checkpoint
        return False


def _is_folder(path: Place) -> bool:
    """Whether it is a folder in diffusers' layout."""
    if isinstance(path, RemoteFolder) or not (path / FOLDER_CONFIG).is_file():
        return False
    return any((path / name).is_file() for name in FOLDER_WEIGHTS)


def _build(config: RunConfig) -> tuple[Objective, Any]:
    """The run's objective, on the meta device, and a fresh model of it on the CPU."""
    with torch.device("meta"):  # the losses' networks, whose files need not be here, stay out of it
        objective = config.build_objective()
    return objective, objective.build_backbone()


def _from_checkpoint(checkpoint: Place, *, ema: bool | None, verify: bool) -> LoadedTokenizer:
    damage = find_damage(checkpoint, hashes=verify)
    if damage is not None:
        raise ValueError(f"{checkpoint} is damaged ({damage}): use another checkpoint of the run")
    complete, config = read_complete(checkpoint), load_run_config(checkpoint)
    objective, model = _build(config)
    if not isinstance(model, Autoencoder):
        raise ValueError(
            f"{checkpoint} holds a {type(model).__name__} of objective {config.objective_name!r}, which is no "
            "tokenizer: expected a run whose model encodes and decodes images"
        )
    player, prefix = objective.backbone_player, objective.backbone_prefix
    if ema is None:
        ema = any(name.startswith(f"ema.{player}.") for name in tensor_shapes(checkpoint))
    state = load_weights(checkpoint, player, ema=ema)
    model.load_state_dict({name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)})
    return LoadedTokenizer(
        model=model.eval(),
        mean=tuple(objective.mean),
        std=tuple(objective.std),
        label=checkpoint.name + ("-ema" if ema else ""),
        source=checkpoint,
        digest=weights_digest(model.state_dict()),
        image_size=objective.image_size,
        step=int(complete["step"]),
        config=config,
        complete=complete,
        weights="ema" if ema else "trained",
    )


def _from_folder(path: Path) -> LoadedTokenizer:
    from pretrain.weights.dc_ae import read_dc_ae_folder

    config, weights, scaling_factor = read_dc_ae_folder(path)
    model = DCAE(config)
    model.load_state_dict(weights)
    half = (0.5,) * config.in_channels  # that layout knows no other pixels than those in [-1, 1]
    return LoadedTokenizer(
        model=model.eval(),
        mean=half,
        std=half,
        label=path.name or path.resolve().name,
        source=path,
        digest=weights_digest(model.state_dict()),
        weights="imported",
        scaling_factor=scaling_factor,
    )
