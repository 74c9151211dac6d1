"""What is looked at before a run starts: the data, the batch accounting, the length, the engine, the model.

Enters: a `RunConfig` and what the launcher said. Leaves: the division of the batch and the opened data sets, or an
error that says what to do. Why it exists: a mistake must be found before a process group or an accelerator is touched.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from data_pipes.batch import BatchPlan
from data_pipes.config import DataConfig
from data_pipes.open import open_collection
from data_pipes.shards.collection import Collection
from data_pipes.shards.manifest import Manifest
from data_pipes.store.storage import Storage
from pretrain.checkpoint.open_folder import open_folder
from pretrain.checkpoint.read import newest_complete
from pretrain.config import ConfigError, RunConfig, TrainConfig
from pretrain.objectives.named import check_backbone
from pretrain.objectives.table import OBJECTIVES
from pretrain.parallel.batches import fit_micro_batch
from pretrain.parallel.choose import check_strategy
from pretrain.parallel.launch import Launch
from pretrain.parallel.world import pick_device
from pretrain.weights.starting import checkpoint_at


@dataclass(frozen=True)
class TrainingData:
    """The data sets of a run, opened."""

    collection: Collection | None
    """What is trained on; None: shards that cannot be indexed."""
    val: Manifest | None
    num_samples: int
    """Of an epoch; 0 where nobody knows."""

    @property
    def preview(self) -> Manifest | None:
        """Where validation and pictures come from: the validation data, else the training data's first source."""
        return self.val or (None if self.collection is None else self.collection.manifests[0])


def open_data(data: DataConfig) -> TrainingData:
    """The manifests that a configuration names.

    Raises:
        ValueError: one is missing or malformed.
    """
    collection = None if data.unindexed is not None else open_collection(data)
    val = None if data.val is None else Manifest.load(data.val, Storage(data.storage))
    num_samples = collection.num_samples if collection is not None else 0
    return TrainingData(collection, val, num_samples)


def check(config: RunConfig, launch: Launch) -> tuple[BatchPlan, TrainingData]:
    """Finds the user's mistakes that can be found without a device: data, batch accounting, length, engine, model.

    Args:
        config: resolved.
        launch: what the launcher told this process.

    Returns:
        How a step's samples are divided, and the opened data sets.

    Raises:
        ValueError: a mistake; the message says what was found, what was expected, and what to do.
    """
    data = open_data(config.data)
    plan = plan_batches(config.train, launch)
    check_length(config, data.num_samples)
    device = pick_device(config.device, launch.local_rank)
    accounting = {
        "train_batch_size": plan.global_batch,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulate,
    }
    check_strategy(config.parallel, config.optim, launch, device_type=device.type, batch=accounting)
    check_objective(config)
    return plan, data


def plan_batches(train: TrainConfig, launch: Launch) -> BatchPlan:
    """The division of the global batch.

    Raises:
        ValueError: this number of processes cannot share it.
    """
    return BatchPlan(
        global_batch=train.global_batch,
        micro_batch=fit_micro_batch(train.global_batch, launch.size, train.micro_batch),
        rank=launch.rank,
        world_size=launch.size,
        ranks_per_node=launch.ranks_per_node,
    )


def check_length(config: RunConfig, num_samples: int) -> None:
    """Looks whether the run has exactly one length, of at least one step.

    Args:
        config: resolved.
        num_samples: of an epoch; 0: nobody knows.

    Raises:
        ConfigError: it has not.
    """
    if (config.train.epochs is None) == (config.train.steps is None):
        raise ConfigError(
            f"train.epochs is {config.train.epochs} and train.steps is {config.train.steps}; give exactly one"
        )
    if num_samples == 0 and (config.train.epochs is not None or config.optim.warmup_epochs):
        raise ConfigError(
            "train.epochs and optim.warmup_epochs need the number of samples, which nobody knows for data.unindexed; "
            "give train.steps and optim.warmup_steps"
        )
    if total_samples(config, num_samples) < config.train.global_batch:
        raise ConfigError(
            f"the run is shorter than one step: {num_samples} training samples, "
            f"train.epochs={config.train.epochs}, train.global_batch={config.train.global_batch}; lower "
            "the batch or train longer"
        )
    for player, optim in {"": config.optim, **{name: config.optim.of(name) for name in config.optim.players}}.items():
        key = f"optim.players.{player}" if player else "optim"
        warmup = optim.warmup_steps * config.train.global_batch + optim.warmup_epochs * num_samples
        if warmup > total_samples(config, num_samples):
            raise ConfigError(
                f"{key}.warmup_steps={optim.warmup_steps} and {key}.warmup_epochs={optim.warmup_epochs:g} make a "
                f"warm-up of {warmup:,.0f} samples, and the run has {total_samples(config, num_samples):,}: it would "
                "never reach its learning rate. Shorten the warm-up or train longer"
            )


def total_samples(config: RunConfig, num_samples: int) -> int:
    """The run's length in samples."""
    if config.train.steps is not None:
        return config.train.steps * config.train.global_batch
    assert config.train.epochs is not None
    return round(config.train.epochs * num_samples)


def check_objective(config: RunConfig) -> None:
    """Builds the objective on the meta device.

    Raises:
        ValueError: it cannot be built, or expects other data.
    """
    init_from = config.init_from
    if init_from is not None and newest_complete(open_folder(config.run_dir)) is None:
        checkpoint_at(init_from)  # not where a run goes on, which has its own weights
    with torch.device("meta"):
        objective = config.build_objective()
        if config.objective_name not in OBJECTIVES:
            check_backbone(objective, config.objective_name)
    for player in config.optim.players:
        if player not in objective.players or player == objective.backbone_player:
            others = [name for name in objective.players if name != objective.backbone_player]
            raise ConfigError(
                f"optim.players names {player!r}; this objective's other players are {others or 'none'}, and the "
                f"settings of {objective.backbone_player!r} are those of optim itself"
            )
    video = config.data.video
    wanted = objective.num_frames, objective.repeats
    given = (None, 1) if video is None else (video.num_frames, video.repeats)
    if wanted != given:
        raise ConfigError(
            f"the objective {config.objective_name} trains on {describe_clips(*wanted)}, and the data are "
            f"{describe_clips(*given)}; set data.video.num_frames and data.video.repeats, or data.video=null for images"
        )


def describe_clips(num_frames: int | None, repeats: int) -> str:
    """In words, for errors."""
    return "images" if num_frames is None else f"{repeats} clips of {num_frames} frames per video"
