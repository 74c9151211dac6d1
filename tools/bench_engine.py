"""Step time and memory of each strategy, and how long a save blocks training; on CUDA also MFU against transformers.

Strategies take turns, a few steps each, in rounds that swap the order, and the medians over all rounds are compared: a
noisy machine disturbs all alike. "single" is every process on its own: the same work without communication.

    torchrun --nproc-per-node 2 tools/bench_engine.py --json
    torchrun --nproc-per-node 2 tools/bench_engine.py --strategies single ddp fsdp2 --width 384 --depth 12 --batch 16
    python tools/bench_engine.py --models base large huge --device cuda --batch 256 --json
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import importlib.util
import json
import statistics
import sys
import tempfile
import threading
import time
from argparse import Namespace
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch

from data_pipes.batch import Batch
from pretrain.checkpoint.checkpoints import Checkpoints
from pretrain.checkpoint.config import CheckpointConfig
from pretrain.checkpoint.saver import Saver
from pretrain.models.config import MAEConfig, ViTConfig, vit_config
from pretrain.models.mae import mae_flops
from pretrain.objectives.base import Objective
from pretrain.objectives.image_mae import ImageMAEObjective
from pretrain.objectives.mae_config import ImageMAEConfig
from pretrain.optim_config import OptimConfig
from pretrain.parallel.choose import make_strategy
from pretrain.parallel.config import ParallelConfig
from pretrain.parallel.strategy import Strategy
from pretrain.parallel.world import World, join_world, leave_world

STRATEGIES = ("single", "ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3")
OPTIM = OptimConfig(base_lr=None, lr=1e-4, clip_norm=1.0, ema_decay=0.999)


class Trainee:
    """A strategy with its objective, that makes steps."""

    def __init__(self, kind: str, arguments: Namespace, world: World, model: MAEConfig) -> None:
        alone = kind == "single"
        seen = dataclasses.replace(world, rank=0, size=1, control=None, saving=None) if alone else world
        config = ParallelConfig(
            strategy=kind,  # type: ignore[arg-type]
            shards=world.size if kind == "hsdp" else None,
            precision=arguments.precision,
            compile="blocks" if arguments.compile else "off",
            activation_checkpointing=arguments.activation_checkpointing,
        )
        self.device = world.device
        self.strategy: Strategy = make_strategy(config, OPTIM, seen)
        build = lambda: ImageMAEObjective(ImageMAEConfig(model), seed=0)
        self.objective: Objective = self.strategy.prepare(build, lambda whole: whole.start(0))
        shape = (arguments.batch, 3, *model.encoder.image_size)
        images = torch.randint(0, 256, shape, dtype=torch.uint8)
        places = torch.arange(arguments.batch)
        self.batch = Batch(images, torch.zeros_like(places), places, [""] * arguments.batch).to(world.device)

    def step(self) -> None:
        """One micro-batch and one optimizer step."""
        self.strategy.accumulate(True)
        turns = self.objective.turns(self.batch, 0)
        with self.strategy.autocast():
            turn = next(turns)
        self.strategy.backward(turn.loss, turn.player)
        self.strategy.step(turn.player, 1e-4)

    def timed_step(self) -> float:
        """Seconds, the device's queue included."""
        _synchronise(self.device)
        begin = time.perf_counter()
        self.step()
        _synchronise(self.device)
        return time.perf_counter() - begin


class PeakMemory:
    """The highest memory inside, above that at the start: allocated on CUDA, resident in the process on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0
        self._ended = threading.Event()

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            return self
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # what the last strategy freed goes back, and counts for this one anew
        self._process = psutil.Process()
        self._before = self._process.memory_info().rss
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(0.002):
            self.bytes = max(self.bytes, self._process.memory_info().rss - self._before)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
        else:
            self._ended.set()
            self._watcher.join()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    world = join_world(arguments.device, timeout_s=600)
    result: dict[str, Any] = {"torch": torch.__version__, "processes": world.size, "device": _name(world.device)}
    if arguments.models:
        result["models"] = bench_models(arguments, world)
    else:
        result |= bench_strategies(arguments, world)
    leave_world()
    if world.is_main:
        print(json.dumps(result) if arguments.json else describe(result))


def parse_arguments() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--width", type=int, default=192, help="of the encoder")
    parser.add_argument("--depth", type=int, default=6, help="of the encoder")
    parser.add_argument("--image-size", type=int, default=64, help="side of the images, in pixels; patches of 8")
    parser.add_argument("--batch", type=int, default=16, help="images per process and step")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--activation-checkpointing", choices=("none", "full", "selective"), default="none")
    parser.add_argument("--compile", action="store_true", help="compile block by block")
    parser.add_argument("--rounds", type=int, default=6, help="rounds; each times all strategies")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each strategy per round")
    parser.add_argument("--saves", type=int, default=5, help="synchronous and asynchronous saves; 0 = none")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per process")
    parser.add_argument(
        "--models", nargs="+", choices=("base", "large", "huge"), help="only: ViTs against transformers"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")
    return parser.parse_args()


# -- strategies ------------------------------------------------------------------------------------------------------


def bench_strategies(arguments: Namespace, world: World) -> dict[str, Any]:
    """Memory one after the other, time in turns, then saves."""
    encoder = ViTConfig((arguments.image_size,) * 2, (8, 8), 3, arguments.width, arguments.depth, heads=4)
    model = MAEConfig(encoder, decoder_width=arguments.width // 2, decoder_depth=2, decoder_heads=4)
    trainees: dict[str, Trainee] = {}
    found: dict[str, dict[str, float]] = {}
    skipped: dict[str, str] = {}
    for kind in arguments.strategies:
        if reason := _missing(kind, world):
            skipped[kind] = reason
            continue
        with PeakMemory(world.device) as memory:
            trainees[kind] = Trainee(kind, arguments, world, model)
            for _ in range(3):
                trainees[kind].step()
        highest = world.max(torch.tensor([memory.bytes], dtype=torch.float64))
        found[kind] = {"peak_mb": float(highest[0]) / 1e6}
    times: dict[str, list[float]] = {kind: [] for kind in trainees}
    for number in range(arguments.rounds):
        for kind in list(trainees) if number % 2 == 0 else reversed(list(trainees)):
            for step in range(arguments.steps + 1):
                taken_s = trainees[kind].timed_step()
                if step:  # the first one finds the caches cold
                    times[kind].append(taken_s)
    for kind, taken in times.items():
        slowest = world.max(torch.tensor(taken, dtype=torch.float64)).tolist()
        found[kind]["median_ms"] = 1e3 * statistics.median(slowest)
    first = next(iter(found))
    for figures in found.values():
        figures[f"relative_to_{first}"] = figures["median_ms"] / found[first]["median_ms"]
    result: dict[str, Any] = {"settings": vars(arguments), "strategies": found, "skipped": skipped}
    if arguments.saves:
        result["saves"] = {
            kind: bench_saves(trainee, arguments.saves, world) for kind, trainee in trainees.items() if kind != "single"
        }
    return result


def bench_saves(trainee: Trainee, num_saves: int, world: World) -> dict[str, float]:
    """How long the loop is blocked by a save that it waits for, and by one that runs beside it."""
    with tempfile.TemporaryDirectory() as own:
        folder = Path(world.broadcast(own))
        saver = Saver(Checkpoints(folder, CheckpointConfig(), world))
        blocked: dict[str, list[float]] = {"synchronous": [], "asynchronous": []}
        for number in range(2 * num_saves + 2):
            kind = ("synchronous", "asynchronous")[number % 2]
            begin = time.perf_counter()
            saver.save(number + 1, trainee.strategy.state(), {"position": number}, "")
            if kind == "synchronous":
                saver.wait()
            blocked_s = time.perf_counter() - begin
            for _ in range(3):
                trainee.step()
            saver.wait()  # not counted: a run saves more rarely than a save takes
            if number >= 2:  # the first of each kind allocates
                blocked[kind].append(blocked_s)
        saver.close()
        world.barrier()
    medians = {
        kind: statistics.median(world.max(torch.tensor(values, dtype=torch.float64)).tolist())
        for kind, values in blocked.items()
    }
    return {f"{kind}_ms": 1e3 * value for kind, value in medians.items()} | {
        "blocked_share": medians["asynchronous"] / medians["synchronous"]
    }


def _missing(kind: str, world: World) -> str | None:
    if kind.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        return "DeepSpeed is not installed"
    if kind != "single" and world.size == 1:
        return "one process; start several by torchrun --nproc-per-node N"
    return None


# -- whole models on CUDA --------------------------------------------------------------------------------------------


def bench_models(arguments: Namespace, world: World) -> dict[str, Any]:
    """ViT MAE at 224, eager and compiled, against transformers' ViTMAE at the same precision, in turns."""
    from pretrain.metrics import peak_flops
    from tools.bench_step import their_step

    peak = peak_flops(world.device, bf16=arguments.precision == "bf16")
    result: dict[str, Any] = {"peak_flops_of": peak.source}
    for size in arguments.models:
        model = MAEConfig(vit_config(size))
        steps: dict[str, Any] = {}
        memory: dict[str, float] = {}
        for name, compiled in (("eager", False), ("compiled", True)):
            chosen = Namespace(**{**vars(arguments), "compile": compiled})
            with PeakMemory(world.device) as used:
                trainee = Trainee("single", chosen, world, model)
                for _ in range(3):
                    trainee.step()
            steps[name], memory[name] = trainee.step, used.bytes / 1e9
        images = torch.randn(arguments.batch, 3, *model.encoder.image_size, device=world.device)
        for name, compiled in (("transformers", False), ("transformers_compiled", True)):
            with PeakMemory(world.device) as used:
                steps[name] = their_step(model, images, arguments.precision, compiled)
                for _ in range(3):
                    steps[name]()
            memory[name] = used.bytes / 1e9
        result[size] = _in_turns(steps, memory, arguments, world.device, mae_flops(model), peak.flops_per_s)
        steps.clear()
        gc.collect()
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
    return result


def _in_turns(
    steps: dict[str, Any],
    memory: dict[str, float],
    arguments: Namespace,
    device: torch.device,
    flops_per_image: float,
    peak_flops_per_s: float,
) -> dict[str, dict[str, float]]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(arguments.rounds):
        for name in list(steps) if number % 2 == 0 else reversed(list(steps)):
            steps[name]()
            for _ in range(arguments.steps):
                _synchronise(device)
                begin = time.perf_counter()
                steps[name]()
                _synchronise(device)
                times[name].append(time.perf_counter() - begin)
    figures = {}
    for name, taken in times.items():
        images_per_s = arguments.batch / statistics.median(taken)
        figures[name] = {
            "images_per_s": images_per_s,
            "mfu": images_per_s * flops_per_image / peak_flops_per_s,
            "peak_gb": memory[name],
        }
    return figures


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def describe(result: dict[str, Any]) -> str:
    """A few lines for people."""
    lines = [f"{result['processes']} processes, {result['device']}, torch {result['torch']}"]
    for size, figures in result.get("models", {}).items():
        if isinstance(figures, dict):
            lines += [
                f"{size:>6} {name:<22} {f['images_per_s']:8.1f} images/s  MFU {100 * f['mfu']:5.1f}%  "
                f"{f['peak_gb']:.1f} GB"
                for name, f in figures.items()
            ]
    for kind, figures in result.get("strategies", {}).items():
        relative = next(value for name, value in figures.items() if name.startswith("relative"))
        lines.append(f"{kind:>6}: {figures['median_ms']:8.1f} ms ({relative:.2f}x), {figures['peak_mb']:8.1f} MB")
    lines += [f"{kind:>6}: skipped, {reason}" for kind, reason in result.get("skipped", {}).items()]
    lines += [
        f"{kind:>6}: a save blocks {s['asynchronous_ms']:.1f} ms, a synchronous one {s['synchronous_ms']:.1f} ms "
        f"({100 * s['blocked_share']:.1f}%)"
        for kind, s in result.get("saves", {}).items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
