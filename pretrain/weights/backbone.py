"""Finds and loads the backbone that a user names: a run, a checkpoint, an export folder, or somebody's weights file.

In: a path. Out: `Backbone`, an unsharded encoder of images or clips on the CPU with the pixel statistics it was trained
with and its identity (step, run, digest of the weights). It exists so that evaluation and export see one thing whatever
the user has.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from data_pipes.store.urls import local_path
from data_pipes.transforms.clip_sampling import ClipSampling
from pretrain.checkpoint.folder import Folder
from pretrain.checkpoint.open_folder import open_folder
from pretrain.checkpoint.read import find_damage, load_weights, read_complete
from pretrain.config import load_run_config
from pretrain.models.config import ViTConfig
from pretrain.models.statistics import default_mean, default_std
from pretrain.models.video_vit import VideoViT
from pretrain.models.vit import ViT
from pretrain.weights.files import EXPORT_WEIGHTS
from pretrain.weights.finding import EXPORT_CONFIG, find_checkpoint, named_file, run_dir_of
from pretrain.weights.image import describe_encoder, load_encoder, parse_architecture, read_canonical
from pretrain.weights.interface import Interface, encoder_interface, probed_interface

if TYPE_CHECKING:
    from pretrain.config import RunConfig
    from pretrain.objectives.base import Objective

Weights = Literal["trained", "untrained", "ema", "imported"]
"""Which weights a model has; `imported` ones came from a file without a run."""


@dataclass(frozen=True)
class Backbone:
    """A frozen backbone and where it comes from."""

    model: nn.Module
    """On the CPU, fp32, in evaluation mode: a ViT, a VideoViT, or an encoder of others, see
    `Objective.build_backbone`."""
    mean: tuple[float, ...]
    """Per channel, on the scale where the stored range is [0, 1]."""
    std: tuple[float, ...]
    """Per channel, on the same scale."""
    weights: Weights
    """Which weights these are."""
    label: str
    """Short name for folders and tables, e.g. `step-00001200` or `step-00001200-ema`."""
    source: str
    """Path or URL of the checkpoint, export folder or file that was read."""
    digest: str
    """`weights_digest` of the model."""
    step: int | None = None
    """Optimizer step of the checkpoint; None: it is from no checkpoint."""
    config: RunConfig | None = None
    """The run's configuration; None: it is from no checkpoint."""
    checkpoint: Folder | None = None
    """The checkpoint that was read; None: it is from an export folder or a file."""
    complete: Mapping[str, Any] | None = None
    """The checkpoint's COMPLETE record; None: it is from no checkpoint."""
    run_dir: Path | None = None
    """The run's folder on this machine; None: it is not known."""

    @property
    def sampling(self) -> ClipSampling | None:
        """Which frames the model was trained on; None for an encoder of images.

        An encoder of clips without a run: every fourth frame, as the published ones.
        """
        if self.interface.num_frames is None:
            return None
        trained = None if self.config is None else self.config.data.video
        return trained or ClipSampling(self.interface.num_frames)

    @cached_property
    def interface(self) -> Interface:
        """What goes into the model, and what comes out."""
        if isinstance(self.model, ViT | VideoViT):
            return encoder_interface(self.model)
        assert self.config is not None, "only a run's objective says what another encoder takes"
        with torch.device("meta"):
            objective = self.config.build_objective()
        return probed_interface(self.model, objective, f"{self.source}, of objective {self.config.objective_name}")


def load_backbone(
    where: str | Path,
    *,
    ema: bool = False,
    untrained: bool = False,
    architecture: str | None = None,
    verify: bool = False,
) -> Backbone:
    """The backbone that a user names.

    Args:
        where: run folder (its newest complete checkpoint), checkpoint folder, the folder that holds a run's
            checkpoints, or on this machine an export folder or a weights file.
        ema: the moving average of the weights; only checkpoints have one.
        untrained: the weights of step 0 instead, from the run's own seed: the baseline of every learning check.
        architecture: timm name or size; required for a weights file, refused otherwise.
        verify: check every file's sha256 of a checkpoint, not only sizes.
    Raises:
        FileNotFoundError: nothing at `where`.
        ValueError: no such model there, a damaged checkpoint, weights that do not fit, or an option that cannot apply.
    """
    if ema and untrained:
        raise ValueError("the moving average and the untrained weights exclude each other: ask for one of them")
    file, folder = named_file(where), open_folder(where)
    if file is None and not folder.exists():
        raise FileNotFoundError(
            f"no model at {folder}: expected a run, a checkpoint, an export folder or a weights file"
        )
    is_export = file is None and folder.files().keys() >= {EXPORT_CONFIG, EXPORT_WEIGHTS}
    if ema and (file is not None or is_export):
        raise ValueError(f"{folder} has no moving average beside its weights: only checkpoints do")
    if file is not None:
        return _from_file(file, architecture, untrained)
    if is_export:
        if architecture is not None:
            raise ValueError(f"{folder} names its own architecture in {EXPORT_CONFIG}: leave the architecture out")
        return _from_export(local_path(str(where)), untrained)
    if architecture is not None:
        raise ValueError(f"{folder} is a run's or a checkpoint's folder, which knows its architecture: leave it out")
    return _from_checkpoint(find_checkpoint(folder), folder, ema=ema, untrained=untrained, verify=verify)


def load_objective(source: Backbone) -> Objective:
    """The objective that trained a backbone, on the CPU in evaluation mode: the whole model, decoder included.

    Args:
        source: from a checkpoint; its weights (trained or moving average) are taken for the whole model.
    """
    assert source.config is not None
    assert source.checkpoint is not None
    objective = source.config.build_objective()
    player = objective.backbone_player
    module = objective.players[player]
    module.load_state_dict(load_weights(source.checkpoint, player, ema=source.weights == "ema"))
    module.eval()
    return objective


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """The sha256, in hex, over every tensor's name, dtype, shape and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _from_checkpoint(checkpoint: Folder, named: Folder, *, ema: bool, untrained: bool, verify: bool) -> Backbone:
    """See `load_backbone`; `named` is where the user pointed."""
    damage = find_damage(checkpoint, hashes=verify)
    if damage is not None:
        raise ValueError(f"{checkpoint} is damaged ({damage}): use another checkpoint of the run")
    complete, config = read_complete(checkpoint), load_run_config(checkpoint)
    objective = config.build_objective()
    player, prefix = objective.backbone_player, objective.backbone_prefix
    if untrained:
        objective.start(config.seed)
        state = objective.players[player].state_dict()
    else:
        state = load_weights(checkpoint, player, ema=ema)
    model = objective.build_backbone()
    if not hasattr(model, "features"):
        raise ValueError(
            f"{checkpoint} holds a {type(model).__name__} (objective {config.objective_name}): expected an encoder of "
            "images or clips, with a method `features`; tokenizers have their own suites"
        )
    model.load_state_dict({name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)})
    suffix = "-ema" if ema else "-untrained" if untrained else ""
    backbone = Backbone(
        model=model.eval(),
        mean=tuple(objective.mean),
        std=tuple(objective.std),
        weights="ema" if ema else "untrained" if untrained else "trained",
        label=checkpoint.name + suffix,
        source=str(checkpoint),
        digest=weights_digest(model.state_dict()),
        step=0 if untrained else int(complete["step"]),
        config=config,
        checkpoint=checkpoint,
        complete=complete,
        run_dir=run_dir_of(checkpoint, named),
    )
    _ = backbone.interface  # whether an encoder of others gives what it must
    return backbone


def _from_export(path: Path, untrained: bool) -> Backbone:
    try:
        described = json.loads((path / EXPORT_CONFIG).read_text())
        arguments, statistics = described["model_args"], described["pretrained_cfg"]
        config = ViTConfig(
            image_size=tuple(arguments["img_size"]),
            patch_size=tuple(arguments["patch_size"]),
            in_channels=arguments["in_chans"],
            width=arguments["embed_dim"],
            depth=arguments["depth"],
            heads=arguments["num_heads"],
            mlp_ratio=arguments["mlp_ratio"],
        )
        mean, std = tuple(statistics["mean"]), tuple(statistics["std"])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path / EXPORT_CONFIG} does not describe an export of Tessera ({type(error).__name__}: {error}): "
            f"evaluate {path / EXPORT_WEIGHTS} with its architecture instead"
        ) from error
    return _imported(path, config, mean, std, untrained)


def _from_file(path: Path, architecture: str | None, untrained: bool) -> Backbone:
    state = read_canonical(path)
    if architecture is None:
        raise ValueError(
            f"{path} does not say its architecture, it holds {describe_encoder(state)}: name it, for example "
            "vit_base_patch16_224"
        )
    projection = state.get("encoder.patch_embed.proj.weight")
    channels = 3 if projection is None or projection.ndim != 4 else projection.shape[1]
    config = parse_architecture(architecture, in_channels=channels)
    return _imported(path, config, default_mean(channels), default_std(channels), untrained)


def _imported(
    path: Path, config: ViTConfig, mean: tuple[float, ...], std: tuple[float, ...], untrained: bool
) -> Backbone:
    if untrained:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = ViT(config)
    else:
        model = load_encoder(path, config)
    name = path.name if path.is_dir() else path.stem
    return Backbone(
        model=model.eval(),
        mean=mean,
        std=std,
        weights="untrained" if untrained else "imported",
        label=f"{name}-untrained" if untrained else name,
        source=str(path),
        digest=weights_digest(model.state_dict()),
    )
