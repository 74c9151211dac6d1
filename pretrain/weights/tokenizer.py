"""Finds and loads the tokenizer that a user names: a run, a checkpoint, or a folder in diffusers' layout.

In: a path. Out: `LoadedTokenizer`, an unsharded autoencoder on the CPU with the pixel statistics it was trained with
and its identity (step, run, digest of the weights). It exists so that evaluation, export and the encoding of data sets
see one thing whatever the user has.
Legend: B batch, C image channels, L latent channels, H/W pixels, h/w latent pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data_pipes.store.urls import local_path
from pretrain.checkpoint.dcp import tensor_shapes
from pretrain.checkpoint.folder import Folder
from pretrain.checkpoint.open_folder import open_folder
from pretrain.checkpoint.read import find_damage, load_weights, read_complete
from pretrain.config import load_run_config
from pretrain.models.tokenizers.autoencoder import Autoencoder
from pretrain.models.tokenizers.dc_ae import DCAE
from pretrain.weights.backbone import Weights, weights_digest
from pretrain.weights.dc_ae import DIFFUSERS_CONFIG, DIFFUSERS_INDEX, DIFFUSERS_WEIGHTS, read_dc_ae_folder
from pretrain.weights.finding import find_checkpoint, run_dir_of

if TYPE_CHECKING:
    from pretrain.config import RunConfig
    from pretrain.objectives.base import Objective


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer and where it comes from."""

    model: Autoencoder
    """On the CPU, fp32, in evaluation mode."""
    mean: tuple[float, ...]
    """Per channel, on the scale where the stored range is [0, 1]."""
    std: tuple[float, ...]
    """Per channel, on the same scale."""
    label: str
    """Short name for folders and tables, e.g. `step-00001200` or `step-00001200-ema`."""
    source: str
    """Path or URL of the checkpoint or exported folder that was read."""
    digest: str
    """`weights_digest` of the model."""
    image_size: tuple[int, int] | None = None
    """(height, width) in pixels of the images that the run trained on; it encodes any size. None: it is from no run."""
    step: int | None = None
    """Optimizer step of the checkpoint; None: it is from no checkpoint."""
    config: RunConfig | None = None
    """The run's configuration; None: it is from no checkpoint."""
    checkpoint: Folder | None = None
    """The checkpoint that was read; None: it is from an exported folder."""
    complete: Mapping[str, Any] | None = None
    """The checkpoint's COMPLETE record; None: it is from no checkpoint."""
    weights: Weights = "trained"
    """Which weights these are; `imported` ones came from a folder without a run."""
    scaling_factor: float | None = None
    """1 / RMS of the latents over a data set, where the folder names it."""
    run_dir: Path | None = None
    """The run's folder on this machine; None: it is not known."""


def load_tokenizer(where: str | Path, *, ema: bool | None = None, verify: bool = False) -> LoadedTokenizer:
    """The tokenizer that a user names.

    Args:
        where: run folder (its newest complete checkpoint), checkpoint folder, the folder that holds a run's
            checkpoints, or on this machine a folder in diffusers' layout.
        ema: True: the moving average of the weights, which only checkpoints have; False: the weights themselves; None:
            the moving average where there is one.
        verify: check every file's sha256 of a checkpoint, not only sizes.
    Raises:
        FileNotFoundError: nothing at `where`.
        ValueError: no tokenizer there, a damaged checkpoint, weights that do not fit, or no moving average.
    """
    folder = open_folder(where)
    if not folder.exists():
        raise FileNotFoundError(f"no tokenizer at {folder}: expected a run, a checkpoint or an exported folder")
    if _has_diffusers_layout(folder):
        if ema:
            raise ValueError(f"{folder} has no moving average beside its weights: only checkpoints do")
        return _from_folder(local_path(str(where)))
    return _from_checkpoint(find_checkpoint(folder), folder, ema=ema, verify=verify)


def is_tokenizer(where: str | Path) -> bool:
    """Whether `load_tokenizer` would find a tokenizer here; reads no weights."""
    folder = open_folder(where)
    if not folder.exists():
        return False
    if _has_diffusers_layout(folder):
        return True
    try:
        return isinstance(_build(load_run_config(find_checkpoint(folder)))[1], Autoencoder)
    except ValueError:  # neither a run nor a checkpoint
        return False


def _has_diffusers_layout(folder: Folder) -> bool:
    files = folder.files()
    return DIFFUSERS_CONFIG in files and (DIFFUSERS_WEIGHTS in files or DIFFUSERS_INDEX in files)


def _build(config: RunConfig) -> tuple[Objective, Any]:
    """The run's objective, on the meta device, and a fresh model of it on the CPU."""
    with torch.device("meta"):  # the losses' networks, whose files need not be here, stay out of it
        objective = config.build_objective()
    return objective, objective.build_backbone()


def _from_checkpoint(checkpoint: Folder, named: Folder, *, ema: bool | None, verify: bool) -> LoadedTokenizer:
    """See `load_tokenizer`; `named` is where the user pointed."""
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
        source=str(checkpoint),
        digest=weights_digest(model.state_dict()),
        image_size=objective.image_size,
        step=int(complete["step"]),
        config=config,
        checkpoint=checkpoint,
        complete=complete,
        weights="ema" if ema else "trained",
        run_dir=run_dir_of(checkpoint, named),
    )


def _from_folder(path: Path) -> LoadedTokenizer:
    config, weights, scaling_factor = read_dc_ae_folder(path)
    model = DCAE(config)
    model.load_state_dict(weights)
    half = (0.5,) * config.in_channels  # that layout knows no other pixels than those in [-1, 1]
    return LoadedTokenizer(
        model=model.eval(),
        mean=half,
        std=half,
        label=path.name or path.resolve().name,
        source=str(path),
        digest=weights_digest(model.state_dict()),
        weights="imported",
        scaling_factor=scaling_factor,
    )
