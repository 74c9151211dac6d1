"""A real step followed by torch's tools, and the memory that it needed: in a test's own process, or on several ranks.

torch's profiler reports every allocation of the CPU allocator, those of C++ (DDP's buckets, kernels) included.
"""

from __future__ import annotations

import dataclasses
import gc
import json
from pathlib import Path
from typing import Any

import torch
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from data_pipes.batch import Batch
from pretrain.config import RunConfig, load_config
from pretrain.memory.estimate import MemoryEstimate, estimate
from pretrain.parallel.native import NativeStrategy
from pretrain.parallel.world import World, join_world, leave_world


def measured_peak(config: RunConfig, world: World, found: MemoryEstimate) -> int:
    """Peak bytes of a steady step on this rank. found: the estimate, which says how the batch is divided."""
    strategy = NativeStrategy(config.parallel, config.optim, world)
    objective = strategy.prepare(config.build_objective, lambda whole: whole.start(0))
    batch = random_batch(objective, found.micro_batch)
    for _ in range(2):  # optimizer state and DDP's final buckets come into being
        step(strategy, objective, batch, found.accumulate)
    gc.collect()
    module = objective.players["model"]
    if isinstance(module, FSDPModule):
        # gloo's threads free what others allocated, which the profiler does not see; this tracker follows FSDP2 itself.
        tracker = FSDPMemTracker(module, strategy.optimizers["model"])
        averages = strategy.averages["model"].values()
        tracker.track_external(*(t.to_local() if isinstance(t, DTensor) else t for t in averages))
        tracker.track_inputs((batch.images, batch.labels, batch.positions))
        with tracker:
            step(strategy, objective, batch, found.accumulate)
        return int(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])
    own = [*module.parameters(), *module.buffers(), *strategy.averages["model"].values(), *vars(batch).values()]
    own += [value for state in strategy.optimizers["model"].state.values() for value in state.values()]
    live = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in own if torch.is_tensor(t)}.values())
    if isinstance(module, DistributedDataParallel):
        live += sum(p.numel() * p.element_size() for p in module.parameters())  # the buckets, which live in C++
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        step(strategy, objective, batch, found.accumulate)
    peak = live
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def random_batch(objective: Any, micro_batch: int) -> Batch:
    """Images of random uint8 values; what is in them does not change the memory."""
    shape = (micro_batch, objective.in_channels, *objective.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    return Batch(images, torch.zeros(micro_batch, dtype=torch.int64), torch.arange(micro_batch), [""] * micro_batch)


def step(strategy: NativeStrategy, objective: Any, batch: Batch, accumulate: int) -> None:
    """One optimizer step of the only player, as the training loop makes it."""
    for micro in range(accumulate):
        strategy.accumulate(micro == accumulate - 1)
        turns = objective.turns(batch, 0)
        with strategy.autocast():
            turn = next(turns)
        strategy.backward(turn.loss / accumulate, turn.player)
    strategy.step("model", 1e-3)


def main(config_path: str, cases: list[list[str]]) -> None:
    """Prints a JSON list of what was measured and estimated. cases: overrides (key=value)."""
    torch.set_num_threads(1)
    world = join_world("cpu", timeout_s=1800)
    results = []
    for overrides in cases:
        config = load_config(Path(config_path), overrides)
        found = estimate(config, world.size)
        peak = int(world.max(torch.tensor([measured_peak(config, world, found)], dtype=torch.float64))[0])
        results.append({"overrides": overrides, "measured": peak, "estimate": dataclasses.asdict(found)})
    if world.is_main:
        print(json.dumps(results))
    leave_world()
