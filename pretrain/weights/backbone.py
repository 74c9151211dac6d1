"""Finds and loads the backbone that a user names: a run, a checkpoint, an export folder, or somebody's weights file.

In: a path. Out: `Backbone`, an unsharded encoder of images or clips on the CPU with the pixel statistics it was trained
with and its identity (step, run, digest of the weights). It exists so that evaluation and export see one thing whatever
the user has.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from data_pipes.transforms.clips import ClipSampling
from pretrain.checkpoint.read import find_damage, load_weights, newest_complete, read_complete
from pretrain.checkpoint.store import Place, RemoteFolder
from pretrain.config import load_run_config
from pretrain.models.normalise import default_mean, default_std
from pretrain.models.video_vit import VideoViT
from pretrain.models.vit import ViT, ViTConfig
from pretrain.weights.files import EXPORT_WEIGHTS, describe_encoder, load_encoder, parse_architecture, read_canonical

if TYPE_CHECKING:
    from pretrain.config import RunConfig

Weights = Literal["trained", "untrained", "ema", "imported"]
EXPORT_CONFIG = "config.json"


@dataclass(frozen=True)
class Backbone:
    """A frozen backbone and where it comes from."""

    model: ViT | VideoViT
    """on the CPU, fp32, in eval mode; a VideoViT takes clips"""
    mean: tuple[float, ...]
    """per channel, on the scale where the stored range is [0, 1]"""
    std: tuple[float, ...]
    """per channel, on the same scale"""
    weights: Weights
    """which weights these are; `imported` ones came from a file without a run"""
    label: str
    """short name for folders and tables, e.g. `step-00001200` or `step-00001200-ema`"""
    source: Place
    """the checkpoint folder, export folder or file that was read"""
    digest: str
    """`weights_digest` of the model"""
    step: int | None = None
    """optimizer step of the checkpoint"""
    config: RunConfig | None = None
    """the run's configuration, when the backbone comes from a checkpoint"""
    complete: Mapping[str, Any] | None = None
    """the checkpoint's COMPLETE record"""
    named_by: Path | None = None
    """the run's folder, when it names a checkpoint that lies elsewhere (`checkpoint.folder`)"""

    @property
    def sampling(self) -> ClipSampling | None:
        """Which frames the model was trained on; None for an encoder of images.

        An encoder of clips without a run: every fourth frame, as the published ones.
        """
        if not isinstance(self.model, VideoViT):
            return None
        trained = None if self.config is None else self.config.data.video
        return trained or ClipSampling(self.model.config.num_frames)

    @property
    def run_dir(self) -> Path | None:
        """The run's folder, when the checkpoint still lies in one or was found by one."""
        return run_of(self.source, self.complete, self.named_by)


def run_of(source: Place, complete: Mapping[str, Any] | None, named_by: Path | None) -> Path | None:
    """The folder of the run that a model came from, by the fields that `Backbone` has; None: it is not known."""
    if named_by is not None or isinstance(source, RemoteFolder):
        return named_by
    folder = source.parent if source.parent.name else source.resolve().parent
    is_run = complete is not None and folder.name == "checkpoints" and (folder.parent / "run.json").is_file()
    return folder.parent if is_run else None


def load_backbone(
    path: Place, *, ema: bool = False, untrained: bool = False, architecture: str | None = None, verify: bool = False
) -> Backbone:
    """The backbone behind `path`.

    Args:
        path: run folder (its newest complete checkpoint), checkpoint folder, export folder, or weights file; in an
            object store, a checkpoint or the folder that holds a run's checkpoints.
        ema: the moving average of the weights; only checkpoints have one.
        untrained: the weights of step 0 instead, from the run's own seed: the baseline of every learning check.
        architecture: timm name or size; required for a weights file, refused otherwise.
        verify: check every file's sha256 of a checkpoint, not only sizes.

    Raises:
        FileNotFoundError: nothing at `path`.
        ValueError: no such model there, a damaged checkpoint, weights that do not fit, or an option that cannot apply.
    """
    if ema and untrained:
        raise ValueError("the moving average and the untrained weights exclude each other: ask for one of them")
    if isinstance(path, RemoteFolder):
        if architecture is not None:
            raise ValueError(f"{path} knows its architecture: leave it out")
        return _from_checkpoint(find_checkpoint(path), ema=ema, untrained=untrained, verify=verify)
    if not path.exists():
        raise FileNotFoundError(f"no model at {path}: expected a run, a checkpoint, an export folder or a weights file")
    is_export = path.is_dir() and (path / EXPORT_CONFIG).is_file() and (path / EXPORT_WEIGHTS).is_file()
    if path.is_file() or is_export:
        if ema:
            raise ValueError(f"{path} has no moving average beside its weights: only checkpoints do")
        if is_export and architecture is not None:
            raise ValueError(f"{path} names its own architecture in {EXPORT_CONFIG}: leave the architecture out")
        return _from_export(path, untrained) if is_export else _from_file(path, architecture, untrained)
    if architecture is not None:
        raise ValueError(f"{path} is a run's or a checkpoint's folder, which knows its architecture: leave it out")
    found = find_checkpoint(path)
    backbone = _from_checkpoint(found, ema=ema, untrained=untrained, verify=verify)
    return replace(backbone, named_by=path) if found.parent != path / "checkpoints" and found != path else backbone


def find_checkpoint(path: Place) -> Place:
    """The checkpoint folder that `path` is, or the newest complete one of the run folder that it is.

    Raises:
        ValueError: neither, or a torn checkpoint.
    """
    if isinstance(path, RemoteFolder):
        is_run = not path.name.startswith("step-")
    else:
        is_run = (path / "checkpoints").is_dir() or (path / "run.json").is_file()
    if is_run:
        newest = newest_complete(path)
        if newest is None:
            raise ValueError(f"{path} has no complete checkpoint yet: wait for the run's first save, or resume the run")
        return newest
    if isinstance(path, RemoteFolder) or (
        path.is_dir() and (path.name.startswith("step-") or (path / "COMPLETE").is_file())
    ):
        read_complete(path)  # raises for a torn one
        return path
    raise ValueError(
        f"{path} is no model: expected a run folder (with checkpoints/), a checkpoint folder (step-...), "
        f"an export folder ({EXPORT_CONFIG} and {EXPORT_WEIGHTS}) or a weights file"
    )


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """sha256, in hex, over every tensor's name, dtype, shape and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _from_checkpoint(checkpoint: Place, *, ema: bool, untrained: bool, verify: bool) -> Backbone:
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
    if not isinstance(model, ViT | VideoViT):
        raise ValueError(
            f"{checkpoint} holds a {type(model).__name__} (objective {config.objective_name}): expected an encoder of "
            "images or clips; tokenizers have their own suites"
        )
    model.load_state_dict({name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)})
    suffix = "-ema" if ema else "-untrained" if untrained else ""
    return Backbone(
        model=model.eval(),
        mean=tuple(objective.mean),
        std=tuple(objective.std),
        weights="ema" if ema else "untrained" if untrained else "trained",
        label=checkpoint.name + suffix,
        source=checkpoint,
        digest=weights_digest(model.state_dict()),
        step=0 if untrained else int(complete["step"]),
        config=config,
        complete=complete,
    )


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
        source=path,
        digest=weights_digest(model.state_dict()),
    )
