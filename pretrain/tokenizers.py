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
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from pretrain.checkpoint import Place, find_damage, load_run_config, load_weights, read_complete
from pretrain.checkpoint_store import RemoteFolder
from pretrain.evaluation.backbone import Weights, find_checkpoint, weights_digest
from pretrain.models.dc_ae import DCAE
from pretrain.safe_dcp import tensor_shapes

if TYPE_CHECKING:
    from pretrain.config import RunConfig
    from pretrain.objectives.base import Objective

FOLDER_CONFIG = "config.json"
FOLDER_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json")
"""What a folder of diffusers' AutoencoderDC holds beside `config.json`; the second where the weights are in parts."""


class TokenizerShape(Protocol):
    """What is asked of a tokenizer's configuration."""

    @property
    def factor(self) -> int:
        """Pixels of the image per pixel of the latent, in each direction."""

    @property
    def latent_channels(self) -> int:
        """L"""

    @property
    def in_channels(self) -> int:
        """C"""


class TokenizerModel(Protocol):
    """What is asked of a tokenizer: pretrain.models.dc_ae.DCAE has it."""

    @property
    def config(self) -> TokenizerShape:
        """Its shape."""

    def encode(self, images: Tensor) -> Tensor:
        """Normalised float [B, C, H, W] -> unscaled latents [B, L, ceil(H / factor), ceil(W / factor)]."""

    def decode(self, latent: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Unscaled latents [B, L, h, w] -> normalised [B, C, h * factor, w * factor], cut to `size`."""


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer and where it comes from."""

    model: nn.Module
    """a `TokenizerModel` on the CPU, fp32, in eval mode"""
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
    def coder(self) -> TokenizerModel:
        """The model, for type checkers that must know `encode` and `decode`."""
        return cast(TokenizerModel, self.model)

    @property
    def run_dir(self) -> Path | None:
        """The run's folder, when the checkpoint still lies in one or was found by one."""
        if self.named_by is not None or isinstance(self.source, RemoteFolder):
            return self.named_by
        folder = self.source.parent if self.source.parent.name else self.source.resolve().parent
        is_run = self.complete is not None and folder.name == "checkpoints" and (folder.parent / "run.json").is_file()
        return folder.parent if is_run else None


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
        return _codes(_build(load_run_config(find_checkpoint(path)))[1])
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


def _codes(model: Any) -> bool:
    return hasattr(model, "encode") and hasattr(model, "decode")


def _from_checkpoint(checkpoint: Place, *, ema: bool | None, verify: bool) -> LoadedTokenizer:
    damage = find_damage(checkpoint, hashes=verify)
    if damage is not None:
        raise ValueError(f"{checkpoint} is damaged ({damage}): use another checkpoint of the run")
    complete, config = read_complete(checkpoint), load_run_config(checkpoint)
    objective, model = _build(config)
    if not _codes(model):
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
    from pretrain.export.dc_ae_weights import read_dc_ae_folder

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
