"""THE loop: build, step, log, save. Linear, read top to bottom; execution order is reading order.

Enters: one `RunConfig`. Leaves: checkpoints, a journal, pictures. Everything that can be wrong with the input is looked
at before a process group or an accelerator is touched.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipes.batch import Batch, BatchPlan
from data_pipes.loader import Loader, open_loader
from pretrain.checkpoint.checkpointer import Checkpointer, rng_state, set_rng_state
from pretrain.checkpoint.store import Place
from pretrain.config import RunConfig
from pretrain.garbage import ScheduledGC
from pretrain.guard.evidence import Evidence
from pretrain.guard.guard import Guard, Rollback
from pretrain.guard.settle import Sentinel, are_finite
from pretrain.metrics import DataMeter, Interval, peak_flops
from pretrain.objectives.base import Objective, Turn
from pretrain.optim import LearningRate
from pretrain.parallel.choose import make_strategy
from pretrain.parallel.strategy import Strategy
from pretrain.parallel.world import Launch, World, change_timeout, join_world, leave_world
from pretrain.preflight import TrainingData, check, steps_left, total_samples
from pretrain.progress import ProgressLine
from pretrain.run_folder import open_run_folder
from pretrain.run_state import SkippedSamples
from pretrain.signals import StopRequest
from pretrain.tracking.tracker import Tracker
from pretrain.validation import Validator, open_samples
from pretrain.watchdog.watchdog import Watchdog
from pretrain.weights.starting import initialize


def train(
    config: RunConfig, *, config_path: Path, overrides: Sequence[str] = (), world: World | None = None
) -> dict[str, Any]:
    """Runs `config` on this process, or on those that torchrun started, to its end or to a stop signal.

    Continues from the run's newest complete checkpoint where there is one. Returns a summary (rank 0's is complete).
    world: for several runs one after the other, from `join_world`, because a process group cannot be left and joined
    again safely; without it the processes join here and leave at the end.
    Raises ValueError (ConfigError, ShardError, CheckpointError) for the user's mistakes.
    """
    with StopRequest() as stop:
        plan, data = check(config, Launch.from_environment())
        joined = world or join_world(config.device, config.parallel.timeout_s)
        with Watchdog(config.run_dir, joined, config.watchdog, stop) as watchdog:
            summary = _train(config, plan, data, joined, stop, watchdog, config_path, overrides)
            if world is None:
                leave_world()
    return summary


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


def _train(
    config: RunConfig,
    plan: BatchPlan,
    data: TrainingData,
    world: World,
    stop: StopRequest,
    watchdog: Watchdog,
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

    # 2. Model, optimizer, strategy. A run that goes on does not look for the weights that it once started from.
    checkpointer = Checkpointer(run_dir, config.checkpoint, world)
    checkpoint = checkpointer.find()
    init_from = config.objective.init_from if checkpoint is None else None
    torch.manual_seed(config.seed + world.rank)
    strategy = make_strategy(config.parallel, config.optim, world)
    objective = strategy.prepare(config.build_objective, lambda whole: initialize(whole, config.seed, init_from))

    # 3. Resume: weights, optimizer, average, generator states, and the one integer that is the data position.

    def restore(checkpoint: Place) -> dict[str, Any]:
        state = strategy.state() | {"rng": rng_state(world)}
        loop = checkpointer.load(checkpoint, state)
        strategy.load_state(state)
        set_rng_state(state["rng"], world)
        return loop

    loop: dict[str, Any] = {"step": 0, "position": 0, "order": None} if checkpoint is None else restore(checkpoint)
    checkpointer.reserve(strategy.state() | {"rng": rng_state(world)})
    step, position = int(loop["step"]), int(loop["position"])
    skipped = SkippedSamples(tuple((int(begin), int(end)) for begin, end in loop.get("skipped", ())))
    num_rollbacks = int(loop.get("rollbacks", 0))

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
    rates = {
        player: LearningRate(config.optim.of(player), plan.global_batch, num_samples, total)
        for player in objective.players
    }
    last_step = step + steps_left(total, position, skipped, plan.global_batch)
    validator = None
    if data.looked_at is not None:
        samples = open_samples(config.data, data.looked_at, objective)
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
    guard, sentinel = Guard(config.guard), Sentinel(world)
    dataset = loader.dataset if isinstance(loader, Loader) else None
    evidence = Evidence(run_dir / "guard", world, plan, dataset, config.guard.dump)
    grad_norms, went_back_to = dict[str, Tensor](), -config.guard.window
    first_step, started_s, metrics = step, time.perf_counter(), dict[str, float]()

    def asked_to_stop() -> bool:
        """Between validation batches: whether a rank got a signal. A collective."""
        watchdog.beat("validate", step)
        return world.any(stop.received is not None)

    def look() -> dict[str, float]:
        """Validation loss and pictures, outside of the interval's time; nothing when a signal comes meanwhile."""
        if validator is None:
            return {}
        found = validator.run(objective, strategy, step, asked_to_stop) if data.val is not None else {}
        if asked_to_stop():
            return {}
        drawn = validator.draw(objective, strategy, run_dir, step)
        if tracker is not None:
            tracker.log_metrics(found, step)
            for path in drawn:
                tracker.log_artifact(path, path.parent.name)
        interval.restart()
        return found

    def tell(name: str, fields: dict[str, Any]) -> None:
        if tracker is not None:
            tracker.log_event(name, fields)

    def tell_of_saves() -> None:
        for event in checkpointer.take_events():
            tell(f"checkpoint_{event.pop('event')}", event)

    def save(last: bool) -> None:
        watchdog.beat("save", step)
        begin_s = time.perf_counter()
        if tracker is not None:
            tracker.flush_to_disk()
        extra = {
            "position": position,
            "order": loader.state(position),
            "run_uid": identity["run_uid"],
            "mlflow_run_id": tracker.mlflow_run_id if tracker is not None else None,
            "samples_per_epoch": num_samples,
            "skipped": skipped.ranges,
            "rollbacks": num_rollbacks,
        }
        state = strategy.state()
        if not are_finite(state, world):
            raise FloatingPointError(
                f"step {step} is not saved: a weight is not finite, although every gradient was. The last complete "
                "checkpoint is untouched. Lower optim.base_lr, set optim.clip_norm, or use fp32"
            )
        checkpointer.blocked_s += time.perf_counter() - begin_s
        checkpointer.save(step, state | {"rng": rng_state(world)}, extra, config.to_yaml(), last=last)

    # 6. Steps.
    status = "finished"
    collector = ScheduledGC(config.train.gc_every)
    with failing(tracker), collector, ProgressLine(config.name, last_step, enabled=world.is_main) as progress:
        if checkpoint is not None:
            progress.say(f"resumed from {checkpoint} at sample {position:,} of {total:,}")
        if data.collection is None:
            progress.say("data.unindexed: the shards are read from front to back, so resume is approximate")
        if plan.micro_batch != (config.train.micro_batch or plan.micro_batch):
            progress.say(
                f"train.micro_batch is {config.train.micro_batch}; with {world.size} processes the global batch of "
                f"{plan.global_batch} is reached by {plan.accumulate} x {plan.micro_batch}"
            )
        batches = loader.batches(position)
        if step < last_step and world.any(stop.received is not None):
            status = "stopped"  # before the first step: nothing is new, so nothing is saved
        while step < last_step and status != "stopped":
            if (ahead := skipped.next_position(position)) != position:
                progress.say(f"samples {position:,} to {ahead:,} are left out")
                position = ahead
                batches = loader.batches(position)
            lrs = {player: rate.at(position) for player, rate in rates.items()}
            wait_s, losses = 0.0, list[Tensor]()
            for micro in range(plan.accumulate):
                watchdog.beat("data", step)
                waiting_s = time.perf_counter()
                batch = next(batches).to(world.device)
                wait_s += time.perf_counter() - waiting_s
                watchdog.beat("forward", step)
                last = micro == plan.accumulate - 1
                strategy.accumulate(last)
                for turn in each_turn(objective, strategy, batch, step):
                    watchdog.beat("step", step)
                    strategy.backward(turn.loss / plan.accumulate, turn.player)
                    interval.add_turn(turn.metrics)
                    if turn.player == objective.backbone_player:
                        losses.append(turn.loss.detach())
                    if last:
                        grad_norms[turn.player] = strategy.step(turn.player, lrs[turn.player])
                    watchdog.beat("forward", step)
                watchdog.beat("step", step)
                interval.num_micro_batches += 1
            if step == first_step:
                change_timeout(world, config.watchdog.longest_later_s + 60)
            step += 1
            collector.after_step(step)
            sentinel.add(step, position, losses, list(grad_norms.values()))
            position += plan.global_batch
            interval.add_step(plan.global_batch, grad_norms, wait_s)

            # What all ranks know of the steps by now; everything, where something is about to be kept.
            ending = step == last_step
            saving = ending or (save_every is not None and step % save_every == 0)
            logging = ending or step % config.train.log_every == 0
            stopping, observed = sentinel.settle(stop.received is not None, everything=saving or logging)
            if stopping and not (saving or logging):
                observed += sentinel.settle(True, everything=True)[1]
            rollback: Rollback | None = None
            for seen in observed:
                rollback = rollback or guard.observe(seen)
                if not seen.is_finite:
                    progress.say(f"step {seen.step}: the gradient or loss is not finite; every rank skipped the update")
                    tell("skipped_step", evidence.collect(seen, sentinel.local_losses[seen.step]))
            if ending and rollback is None:
                rollback = guard.give_up()
            if rollback is not None:
                num_rollbacks += 1
                found = evidence.collect(rollback.suspect, sentinel.local_losses.get(rollback.suspect.step, []))
                tell("rollback", {"reason": rollback.reason, **found})
                newest = rollback.newest_good_step
                if step - went_back_to < config.guard.window:  # that checkpoint was spoiled too
                    newest = min(newest, went_back_to - 1)
                good: Place | None = None
                if num_rollbacks <= config.guard.max_rollbacks:
                    checkpointer.settle()
                    good = checkpointer.find(up_to_step=newest)
                if good is None:
                    raise FloatingPointError(
                        f"{rollback.reason}, and the run cannot go back: this would be rollback {num_rollbacks} of at "
                        f"most guard.max_rollbacks={config.guard.max_rollbacks}, to a complete checkpoint of step "
                        f"{newest} or before (checkpoint.every_steps={save_every}). Checkpoints are untouched. Lower "
                        "optim.base_lr, set optim.clip_norm, or use fp32"
                    )
                loop = restore(good)
                step, position = int(loop["step"]), int(loop["position"])
                checkpointer.discard_after(step)
                went_back_to = step
                skipped = skipped.with_range(*rollback.skipped(plan.global_batch))
                last_step = step + steps_left(total, position, skipped, plan.global_batch)
                progress.say(f"{rollback.reason}; going back to step {step}, without the samples {skipped.ranges[-1]}")
                if tracker is not None:
                    tracker.log_resume(step)
                guard.restart()
                sentinel.restart()
                interval.restart()
                batches = loader.batches(position)
                continue

            if logging:
                metrics = data_meter.report(
                    loader.tally.take(),
                    loader.bad.by_cause,
                    interval.waits_s,
                    time.perf_counter() - interval.begin_s,
                    loader.wanted_shares(position - 1),
                )
                metrics |= interval.report(loader.bad.num_bad) | {"data/position": position}
                metrics |= {
                    "train/lr" + (f"_{player}" if player != objective.backbone_player else ""): lr
                    for player, lr in lrs.items()
                }
                metrics |= {"train/epoch": position / num_samples} if num_samples else {}
                if objective.num_frames is not None:  # samples are videos
                    metrics["throughput/clips_per_s"] = metrics["throughput/samples_per_s"] * objective.repeats
                metrics |= watchdog.metrics()
                metrics |= checkpointer.stats() | {"guard/rollbacks": num_rollbacks}
                tell_of_saves()
                for alarm in objective.alarms(metrics, step):
                    progress.say(alarm)
                    tell("alarm", {"step": step, "what": alarm})
                left_s = (last_step - step) * metrics["throughput/step_ms"] / 1e3
                progress.update(step, metrics, left_s)
                if tracker is not None:
                    tracker.log_metrics(metrics, step)

            if guard.is_suspicious and (saving or stopping):
                progress.say(f"step {step} is not saved: the newest losses are not to be trusted")
            elif saving or stopping:
                save(last=ending or stopping)
            if not stopping and (ending or (val_every is not None and step % val_every == 0)):
                metrics |= look()
                stopping = world.any(stop.received is not None)
                if stopping and not saving and not guard.is_suspicious:
                    save(last=True)
            if stopping and step < last_step:
                name = stop.received.name if stop.received is not None else "a signal to another rank"
                progress.say(f"{name}: saving step {step}, then leaving; start the same command to go on")
                status = "stopped"
                break

    # 7. Leave nothing half done.
    watchdog.beat("close", step)
    loader.close()
    try:
        checkpointer.wait()
    finally:
        tell_of_saves()
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
        "checkpoint": str(checkpointer.folder / f"step-{step:08d}"),
        "mfu_of": peak.source,
        **{name: metrics[name] for name in ("train/loss", "val/loss", "throughput/samples_per_s") if name in metrics},
    }
