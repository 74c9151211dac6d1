"""THE loop: build, step, log, save. Linear, read top to bottom; execution order is reading order.

Enters: one `RunConfig`. Leaves: checkpoints, a journal, pictures. Everything that can be wrong with the input is looked
at before a process group or an accelerator is touched.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data_pipes.batch import Batch, BatchPlan
from data_pipes.loader import Loader, open_loader
from data_pipes.loading.unindexed_loader import UnindexedLoader
from pretrain.checkpoint.checkpoints import Checkpoints
from pretrain.checkpoint.saver import Saver
from pretrain.config import RunConfig
from pretrain.garbage import ScheduledGC
from pretrain.metrics import StepResult
from pretrain.objectives.base import Objective, Turn
from pretrain.optim import LearningRate
from pretrain.parallel.choose import make_strategy
from pretrain.parallel.launch import Launch
from pretrain.parallel.strategy import Strategy
from pretrain.parallel.world import World, change_timeout, join_world, leave_world
from pretrain.preflight import TrainingData, check, total_samples
from pretrain.recovery import Recovery, Verdict
from pretrain.run_folder import enter_run_folder
from pretrain.run_log import RunLog
from pretrain.run_owner import own_run
from pretrain.run_state import Due, RunState
from pretrain.signals import StopRequest
from pretrain.snapshots import Snapshots, restore
from pretrain.validation import open_validator
from pretrain.watchdog.watchdog import Watchdog
from pretrain.weights.starting import initialize


def train(
    config: RunConfig,
    *,
    config_path: Path,
    overrides: Sequence[str] = (),
    world: World | None = None,
    may_exit: bool = True,
) -> dict[str, Any]:
    """Runs `config` on this process, or on those that torchrun started, to its end or to a stop signal.

    Continues from the run's newest complete checkpoint where there is one.

    Args:
        config: resolved.
        config_path: the YAML file that it came from, for `run.json`.
        overrides: the `key=value` arguments that were given, for `run.json`.
        world: for several runs one after the other, from `join_world`, because a process group cannot be left and
            joined again safely; without it the processes join here and leave at the end.
        may_exit: whether the watchdog may end the process when it hangs. False: it does not watch.

    Returns:
        A summary; rank 0's is complete.

    Raises:
        ValueError: a mistake of the user's (ConfigError, ShardError, CheckpointError).
    """
    with StopRequest() as stop:
        plan, data = check(config, Launch.from_environment())
        joined = world or join_world(config.device, config.parallel.timeout_s)
        watching = replace(config.watchdog, enabled=config.watchdog.enabled and may_exit)
        with own_run(config, joined), Watchdog(config.run_dir, joined, watching, stop) as watchdog:
            identity = enter_run_folder(config, config_path=config_path, overrides=overrides, world=joined)
            summary = _train(config, plan, data, joined, stop, watchdog, identity)
            if world is None:
                leave_world()
    return summary


def _train(
    config: RunConfig,
    plan: BatchPlan,
    data: TrainingData,
    world: World,
    stop: StopRequest,
    watchdog: Watchdog,
    identity: Mapping[str, Any],
) -> dict[str, Any]:
    # 1. Model, optimizer, engine. A run that goes on does not look for the weights that it once started from.
    checkpoints = Checkpoints(config.run_dir, config.checkpoint, world)
    checkpoint = checkpoints.find()
    init_from = config.init_from if checkpoint is None else None
    torch.manual_seed(config.seed + world.rank)
    strategy = make_strategy(config.parallel, config.optim, world)
    objective = strategy.prepare(config.build_objective, partial(initialize, seed=config.seed, init_from=init_from))

    # 2. Resume: weights, optimizer, average, generator states, and the one integer that is the data position.
    kept = restore(checkpoints, checkpoint, strategy, world) if checkpoint is not None else RunState().to_dict()
    state = RunState.from_dict(kept)
    first_step = state.step

    # 3. Data, schedule, validation, what people and trackers are told, and what takes the run back.
    loader = _open_loader(config, plan, data, objective, kept.get("order"))
    total = total_samples(config, data.num_samples)
    rates = learning_rates(config, plan, data, objective, total)
    validator = open_validator(config, data, plan, objective, world)
    log = RunLog(config, plan, data, world, objective, loader, strategy.bf16, total)
    log.start(identity, state, resumed_from=checkpoint)
    saver = Saver(checkpoints)
    snapshots = Snapshots(config, checkpoints, saver, strategy, world, loader, log, watchdog, identity["run_uid"])
    recovery = Recovery(config, plan, world, loader, snapshots, log)

    # 4. Steps.
    with log, ScheduledGC(config.train.gc_every) as collector:
        batches = loader.batches(state.position)
        verdict = Verdict(stopping=stop.on_any_rank(world))
        while (left := state.steps_left(total, plan.global_batch)) and not verdict.stopping:
            if (ahead := state.skipped.next_position(state.position)) != state.position:
                log.say(f"samples {state.position:,} to {ahead:,} are left out")
                state.position, batches = ahead, loader.batches(ahead)
            lrs = {player: rate.at(state.position) for player, rate in rates.items()}
            result = train_step(objective, strategy, batches, plan, lrs, state.step, world, watchdog)
            if state.step == first_step:
                change_timeout(world, config.watchdog.longest_later_s + 60)
            state.advance(plan.global_batch)
            collector.after_step(state.step)
            log.add(result)

            due = Due.after(state.step, config, end=left == 1)
            verdict = recovery.settle(result, state, due, stop.received is not None)
            if verdict.rollback is not None:
                recovery.go_back(verdict.rollback, state)
                batches = loader.batches(state.position)
                continue
            if due.log:
                log.saves(checkpoints.take_events())
                log.point(state, lrs, watchdog.metrics() | saver.stats())
            if due.save or verdict.stopping:
                snapshots.save(state, trusted=verdict.trusted, last=due.end or verdict.stopping)
            if due.validate and not verdict.stopping:
                if validator is not None:
                    log.validation(validator.look(objective, strategy, state.step, stop, watchdog), state.step)
                verdict = replace(verdict, stopping=stop.on_any_rank(world))
                if verdict.stopping and not due.save:  # the signal came while the run validated
                    snapshots.save(state, trusted=verdict.trusted, last=True)
            if verdict.stopping and not due.end:
                log.say(f"{stop.name}: saving step {state.step}, then leaving; start the same command to go on")

        # 5. Leave nothing half done.
        watchdog.beat("close", state.step)
        loader.close()
        try:
            saver.wait()
        finally:
            log.saves(checkpoints.take_events())
            saver.close()
        status = "stopped" if state.steps_left(total, plan.global_batch) else "finished"
        log.finish("FINISHED" if status == "finished" else "KILLED")
    return log.summary(status, state, checkpoints.folder / f"step-{state.step:08d}")


def _open_loader(
    config: RunConfig, plan: BatchPlan, data: TrainingData, objective: Objective, order: Mapping[str, Any] | None
) -> Loader | UnindexedLoader:
    """This rank's training data; `order` is what a checkpoint kept of it."""
    return open_loader(
        config.data,
        plan,
        image_size=objective.image_size,
        channels=objective.in_channels,
        state=order,
        collection=data.collection,
        quarantine_dir=config.run_dir / "quarantine",
    )


def learning_rates(
    config: RunConfig, plan: BatchPlan, data: TrainingData, objective: Objective, total: int
) -> dict[str, LearningRate]:
    """Each player's learning rate over a run of `total` samples."""
    return {
        player: LearningRate(config.optim.of(player), plan.global_batch, data.num_samples, total)
        for player in objective.players
    }


def train_step(
    objective: Objective,
    strategy: Strategy,
    batches: Iterator[Batch],
    plan: BatchPlan,
    lrs: Mapping[str, float],
    step: int,
    world: World,
    watchdog: Watchdog,
) -> StepResult:
    """One optimizer step: its micro-batches, the turns of each, backward passes, and a step of each player.

    Args:
        objective: prepared by `strategy`.
        strategy: the engine.
        batches: endless, of this rank; `plan.accumulate` of them are taken.
        plan: how the step's samples are divided.
        lrs: the learning rate of each player.
        step: optimizer steps done before this one.
        world: the processes.
        watchdog: is told where the step is.
    """
    result = StepResult(num_micro_batches=plan.accumulate)
    for micro_batch in range(plan.accumulate):
        with watchdog.phase("data", step):
            waiting_s = time.perf_counter()
            batch = next(batches).to(world.device)
            result.wait_s += time.perf_counter() - waiting_s
        last = micro_batch == plan.accumulate - 1
        strategy.accumulate(last)
        for turn in each_turn(objective, strategy, batch, step, watchdog):
            with watchdog.phase("step", step):
                strategy.backward(turn.loss / plan.accumulate, turn.player)
                if last:
                    result.grad_norms[turn.player] = strategy.step(turn.player, lrs[turn.player])
            result.turns.append(turn.metrics)
            if turn.player == objective.backbone_player:
                result.losses.append(turn.loss.detach())
    return result


def each_turn(objective: Objective, strategy: Strategy, batch: Batch, step: int, watchdog: Watchdog) -> Iterator[Turn]:
    """The objective's turns; each forward pass runs in an autocast context of its own.

    Autocast caches the weights that it casts until its context ends: one context over two turns would compute the
    second with weights from before the first one's optimizer step.
    """
    turns = objective.turns(batch, step)
    while True:
        with watchdog.phase("forward", step), strategy.autocast():
            turn = next(turns, None)
        if turn is None:
            return
        yield turn
