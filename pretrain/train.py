"""THE loop: build, step, log, save. Linear, read top to bottom; execution order is reading order.

Enters: one `RunConfig`. Leaves: checkpoints, a journal, pictures. Everything that can be wrong with the input is looked
at before a process group or an accelerator is touched.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_pipes.collection import Collection
from data_pipes.image import EvalTransform
from data_pipes.loader import Batch, BatchPlan, DataConfig, open_collection, open_loader
from data_pipes.manifest import Manifest
from data_pipes.sequential import SequentialImages
from data_pipes.storage import Storage
from pretrain.checkpoint import Checkpointer, rng_state, set_rng_state
from pretrain.config import ConfigError, RunConfig
from pretrain.data_metrics import DataMeter
from pretrain.metrics import Interval, peak_flops
from pretrain.objectives.base import Objective, Turn
from pretrain.optim import scheduled_lr
from pretrain.parallel import dist
from pretrain.parallel.native import NativeStrategy
from pretrain.parallel.strategy import Strategy
from pretrain.progress import ProgressLine
from pretrain.run_folder import open_run_folder
from pretrain.signals import StopRequest
from pretrain.tracking import Tracker
from pretrain.validation import Validator


def train(
    config: RunConfig, *, config_path: Path, overrides: Sequence[str] = (), world: dist.World | None = None
) -> dict[str, Any]:
    """Runs `config` on this process, or on those that torchrun started, to its end or to a stop signal.

    Continues from the run's newest complete checkpoint where there is one. Returns a summary (rank 0's is complete).
    world: for several runs one after the other, from `dist.start`, because a process group cannot be left and joined
    again safely; without it the processes join here and leave at the end.
    Raises ValueError (ConfigError, ShardError, CheckpointError) for the user's mistakes.
    """
    plan, data = check(config)
    joined = world or dist.start(config.device, config.parallel.timeout_s)
    with StopRequest() as stop:
        summary = _train(config, plan, data, joined, stop, config_path, overrides)
    if world is None:
        dist.stop()
    return summary


@dataclass(frozen=True)
class TrainingData:
    """The data sets of a run, opened."""

    collection: Collection | None
    """What is trained on; None: shards that cannot be indexed."""
    val: Manifest | None
    num_samples: int
    """Of an epoch; 0 where nobody knows."""

    @property
    def looked_at(self) -> Manifest | None:
        """Where validation and pictures come from."""
        return self.val or (None if self.collection is None else self.collection.manifests[0])


def open_data(data: DataConfig) -> TrainingData:
    """The manifests that a configuration names. Raises ValueError for what is missing or malformed."""
    collection = None if data.unindexed is not None else open_collection(data)
    val = None if data.val is None else Manifest.load(data.val, Storage(data.storage))
    num_samples = collection.num_samples if collection is not None else 0
    return TrainingData(collection, val, num_samples)


def check(config: RunConfig) -> tuple[BatchPlan, TrainingData]:
    """Finds the user's mistakes that can be found without a device: data, batch accounting, model, length."""
    data = open_data(config.data)
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    global_batch = config.train.global_batch
    plan = BatchPlan(
        global_batch=global_batch,
        micro_batch=config.train.micro_batch or max(1, global_batch // world_size),
        rank=rank,
        world_size=world_size,
        ranks_per_node=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    )
    if (config.train.epochs is None) == (config.train.steps is None):
        raise ConfigError(
            f"train.epochs is {config.train.epochs} and train.steps is {config.train.steps}; give exactly one"
        )
    if data.num_samples == 0 and (config.train.epochs is not None or config.optim.warmup_epochs):
        raise ConfigError(
            "train.epochs and optim.warmup_epochs need the number of samples, which nobody knows for data.unindexed; "
            "give train.steps and optim.warmup_steps"
        )
    if total_samples(config, data.num_samples) < global_batch:
        raise ConfigError(
            f"the run is shorter than one step: {data.num_samples} training samples, "
            f"train.epochs={config.train.epochs}, train.global_batch={global_batch}; lower the batch or train longer"
        )
    if config.parallel.strategy == "single" and world_size > 1:
        raise ConfigError(f"parallel.strategy is single, but {world_size} processes were started; use ddp or fsdp2")
    if config.parallel.strategy in ("ddp", "fsdp2", "hsdp") and "RANK" not in os.environ:
        raise ConfigError(
            f"parallel.strategy is {config.parallel.strategy}, but this process was not started by torchrun; run "
            "`torchrun --nproc-per-node N -m pretrain CONFIG`, or set parallel.strategy=auto"
        )
    init_from = getattr(config.objective, "init_from", None)
    if init_from and not Path(init_from).is_file():
        raise ConfigError(f"objective.init_from is {init_from}, which is no file; give the path of a weights file")
    with torch.device("meta"):
        config.build_objective()
    dist.pick_device(config.device, int(os.environ.get("LOCAL_RANK", "0")))
    return plan, data


def initialize(objective: Objective, config: RunConfig) -> None:
    """Starting weights on the CPU: seeded, then overwritten by `objective.init_from` where it is given."""
    objective.start(config.seed)
    if getattr(config.objective, "init_from", None):
        from pretrain.export.official import load_initial_weights
        from pretrain.models.mae import MAE

        autoencoder = objective.players[objective.backbone_player]
        assert isinstance(autoencoder, MAE)
        load_initial_weights(Path(config.objective.init_from), autoencoder)


def each_turn(objective: Objective, strategy: Strategy, batch: Batch, step: int) -> Iterator[Turn]:
    """The objective's turns; each forward pass runs in an autocast context of its own.

    Autocast caches the weights that it casts until its context ends: one context over two turns would compute the
    second with weights from before the first one's optimizer step.
    """
    turns = objective.turns(batch, step)
    while True:
        with strategy.autocast():
            turn = next(turns, None)
        if turn is None:
            return
        yield turn


@contextmanager
def failing(tracker: Tracker | None) -> Iterator[None]:
    """Marks the tracked run as failed when the loop raises."""
    try:
        yield
    except BaseException:
        if tracker is not None:
            tracker.finish("FAILED")
        raise


def total_samples(config: RunConfig, num_samples: int) -> int:
    """The run's length in samples."""
    if config.train.steps is not None:
        return config.train.steps * config.train.global_batch
    assert config.train.epochs is not None
    return round(config.train.epochs * num_samples)


def _train(
    config: RunConfig,
    plan: BatchPlan,
    data: TrainingData,
    world: dist.World,
    stop: StopRequest,
    config_path: Path,
    overrides: Sequence[str],
) -> dict[str, Any]:
    # 1. The run's folder and identity.
    run_dir, num_samples = config.run_dir, data.num_samples
    identity: dict[str, Any] | None = None
    refusal: ValueError | None = None
    if world.is_main:
        try:
            identity = open_run_folder(config, config_path=config_path, overrides=overrides, world_size=world.size)
        except ValueError as error:
            refusal = error
    if refusal := world.broadcast(refusal):
        raise refusal
    identity = world.broadcast(identity)
    assert identity is not None

    # 2. Model, optimizer, strategy.
    torch.manual_seed(config.seed + world.rank)
    strategy = NativeStrategy(config.parallel, config.optim, world)
    objective = strategy.prepare(config.build_objective, lambda whole: initialize(whole, config))

    # 3. Resume: weights, optimizer, average, generator states, and the one integer that is the data position.
    checkpointer = Checkpointer(run_dir, config.checkpoint, world)
    checkpoint = checkpointer.find()
    loop: dict[str, Any] = {"step": 0, "position": 0, "order": None}
    if checkpoint is not None:
        state = strategy.state() | {"rng": rng_state(world)}
        loop = checkpointer.load(checkpoint, state)
        strategy.load_state(state)
        set_rng_state(state["rng"], world)
    step, position = int(loop["step"]), int(loop["position"])

    # 4. Data, schedule, validation.
    loader = open_loader(
        config.data,
        plan,
        image_size=objective.image_size,
        channels=objective.in_channels,
        state=loop["order"],
        collection=data.collection,
        quarantine_dir=run_dir / "quarantine",
    )
    total = total_samples(config, num_samples)
    warmup = config.optim.warmup_epochs * num_samples + config.optim.warmup_steps * plan.global_batch
    peak_lr = config.optim.peak_lr(plan.global_batch)
    last_step = step + max(0, total - position) // plan.global_batch
    validator = None
    if data.looked_at is not None and config.data.video is None:
        samples = SequentialImages(
            data.looked_at,
            EvalTransform(objective.image_size),
            channels=objective.in_channels,
            bit_depth=config.data.bit_depth,
            max_pixels=config.data.max_pixels,
            label_key=config.data.label_key,
            storage=config.data.storage,
        )
        validator = Validator(samples, config.train.val_samples, plan.micro_batch, config.train.num_pictures, world)
    save_every, val_every = config.checkpoint.every_steps, config.train.val_every or config.checkpoint.every_steps

    # 5. Tracking, on rank 0 alone.
    tracker: Tracker | None = None
    if world.is_main:
        tracker = Tracker(run_dir, config.tracking, config.name, identity["run_uid"], resume=checkpoint is not None)
        tracker.start(config.as_dict(), identity, step=step)
    peak = peak_flops(world.device, bf16=strategy.bf16)
    interval = Interval(world, objective.flops_per_sample(), peak)
    data_meter = DataMeter(world, loader.source_names)
    skipped_in_a_row, grad_norms = 0, dict[str, float]()
    first_step, started_s, metrics = step, time.perf_counter(), dict[str, float]()

    def look() -> dict[str, float]:
        """Validation loss and pictures, outside of the interval's time."""
        if validator is None:
            return {}
        found = validator.run(objective, strategy, step) if data.val is not None else {}
        picture = run_dir / "pictures" / f"step-{step:08d}.png"
        validator.draw(objective, strategy, picture)
        if tracker is not None:
            tracker.log_metrics(found, step)
            tracker.log_artifact(picture, "pictures")
        interval.restart()
        return found

    def save() -> None:
        if tracker is not None:
            tracker.flush_to_disk()
        extra = {
            "position": position,
            "order": loader.state(position),
            "run_uid": identity["run_uid"],
            "mlflow_run_id": tracker.mlflow_run_id if tracker is not None else None,
            "samples_per_epoch": num_samples,
        }
        checkpointer.save(step, strategy.state() | {"rng": rng_state(world)}, extra, config.to_yaml())

    # 6. Steps.
    status = "finished"
    with failing(tracker), ProgressLine(config.name, last_step, enabled=world.is_main) as progress:
        if checkpoint is not None:
            progress.say(f"resumed from {checkpoint} at sample {position:,} of {total:,}")
        if data.collection is None:
            progress.say("data.unindexed: the shards are read from front to back, so resume is approximate")
        batches = loader.batches(position)
        while step < last_step:
            lr = scheduled_lr(
                position,
                peak=peak_lr,
                total=total,
                warmup=warmup,
                minimum=config.optim.min_lr,
                schedule=config.optim.schedule,
            )
            wait_s = 0.0
            for micro in range(plan.accumulate):
                waiting_s = time.perf_counter()
                batch = next(batches).to(world.device)
                wait_s += time.perf_counter() - waiting_s
                last = micro == plan.accumulate - 1
                strategy.accumulate(last)
                for turn in each_turn(objective, strategy, batch, step):
                    strategy.backward(turn.loss / plan.accumulate, turn.player)
                    interval.add_turn(turn.metrics)
                    if last:
                        grad_norms[turn.player] = strategy.step(turn.player, lr)
                interval.num_micro_batches += 1
            step += 1
            position += plan.global_batch
            interval.add_step(plan.global_batch, grad_norms, wait_s)

            all_finite = all(norm < float("inf") for norm in grad_norms.values())
            skipped_in_a_row = 0 if all_finite else skipped_in_a_row + 1
            if skipped_in_a_row:
                progress.say(f"step {step}: the gradient norms are {grad_norms}; every rank skipped the update")
            if skipped_in_a_row >= config.train.max_skipped_steps:
                checkpointer.wait()
                raise FloatingPointError(
                    f"the gradient was not finite in {skipped_in_a_row} steps in a row, up to step {step}; the last "
                    f"complete checkpoint is untouched. Lower optim.base_lr, set optim.clip_norm, or use fp32"
                )

            if step % config.train.log_every == 0 or step == last_step:
                metrics = data_meter.report(
                    loader.tally.take(),
                    loader.bad.by_cause,
                    interval.waits_s,
                    time.perf_counter() - interval.begin_s,
                    loader.wanted_shares(position - 1),
                )
                metrics |= interval.report(loader.bad.num_bad) | {"train/lr": lr, "data/position": position}
                metrics |= {"train/epoch": position / num_samples} if num_samples else {}
                metrics |= {"checkpoint/blocked_ms": 1e3 * checkpointer.blocked_s}
                checkpointer.blocked_s = 0.0
                left_s = (last_step - step) * metrics["throughput/step_ms"] / 1e3
                progress.update(step, metrics, left_s)
                if tracker is not None:
                    tracker.log_metrics(metrics, step)

            stopping = world.any(stop.received is not None)
            if step == last_step or (save_every is not None and step % save_every == 0) or stopping:
                save()
            if not stopping and (step == last_step or (val_every is not None and step % val_every == 0)):
                metrics |= look()
            if stopping and step < last_step:
                name = stop.received.name if stop.received is not None else "a signal to another rank"
                progress.say(f"{name}: saving step {step}, then leaving; start the same command to go on")
                status = "stopped"
                break

    # 7. Leave nothing half done.
    loader.close()
    checkpointer.wait()
    checkpointer.close()
    if tracker is not None:
        tracker.finish("FINISHED" if status == "finished" else "KILLED")
    return {
        "run": str(run_dir),
        "status": status,
        "step": step,
        "samples": position,
        "steps_this_start": step - first_step,
        "seconds": round(time.perf_counter() - started_s, 2),
        "checkpoint": str(run_dir / "checkpoints" / f"step-{step:08d}"),
        "mfu_of": peak.source,
        **{name: metrics[name] for name in ("train/loss", "val/loss", "throughput/samples_per_s") if name in metrics},
    }
