"""What the loop measures between two log points, without waiting for the device at every step.

Names carry scope and unit: `train/...` are means over the interval and all ranks, `throughput/...` count samples over
all ranks, `data/wait_*` is the worst rank's, `memory/...` the largest rank's.
"""

from __future__ import annotations

import functools
import resource
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pretrain.parallel.world import World

GPU_PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "V100": 125e12}
"""Dense bf16/fp16 tensor-core peaks from the vendor's data sheets, by a part of the device's name."""


@dataclass(frozen=True)
class PeakFlops:
    """What MFU divides by."""

    flops_per_s: float
    """Of one rank's device."""
    source: str
    """`data sheet`, or `measured` where no data sheet is known (then MFU is a share of the matmul library's speed)."""


_MEASURING_S = 0.15
"""How long a peak is measured, after which only what has begun is completed."""


def peak_flops(device: torch.device, *, bf16: bool) -> PeakFlops:
    """The device's peak by its data sheet, else by a short matrix product (CPU: 1024^3, with this rank's threads)."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, peak in GPU_PEAK_FLOPS.items():
            if part in name and bf16:
                return PeakFlops(peak, f"data sheet of {part}, dense bf16")
    return _measured_peak(device, bf16, torch.get_num_threads())


@functools.cache
def _measured_peak(device: torch.device, bf16: bool, num_threads: int) -> PeakFlops:
    """The peak by a matrix product; once per process, as it depends on nothing else.

    In bf16 runs it is the faster of both precisions: some CPUs multiply bf16 matrices more slowly than fp32 ones, by so
    much that a quarter of the size says which.
    """
    size = 1024 if device.type == "cpu" else 8192
    seconds = {torch.float32: _fastest_product_s(device, torch.float32, size)}
    if bf16:
        bf16_s, fp32_s = (_fastest_product_s(device, dtype, size // 4) for dtype in (torch.bfloat16, torch.float32))
        if bf16_s < fp32_s:
            seconds[torch.bfloat16] = _fastest_product_s(device, torch.bfloat16, size)
    fastest = min(seconds, key=lambda dtype: seconds[dtype])
    fastest_s = seconds[fastest]
    name = str(fastest).removeprefix("torch.")
    return PeakFlops(2.0 * size**3 / fastest_s, f"measured, {size}^3 matmul in {name}")


def _fastest_product_s(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Seconds of a matrix product: the least of up to ten, within `_MEASURING_S`."""
    matrix, seconds = torch.ones(size, size, dtype=dtype, device=device), [float("inf")]
    started = time.perf_counter()
    while len(seconds) <= 10 and (len(seconds) < 3 or time.perf_counter() - started < _MEASURING_S):
        _synchronize(device)
        begin = time.perf_counter()
        torch.mm(matrix, matrix)
        _synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


@dataclass
class StepResult:
    """What one optimizer step computed on this rank. Tensors lie on the device; nothing here waits for it."""

    losses: list[Tensor] = field(default_factory=list)
    """0-d, detached: the backbone player's loss of each micro-batch."""
    grad_norms: dict[str, Tensor] = field(default_factory=dict)
    """0-d, over all ranks: of each player that moved."""
    turns: list[Mapping[str, Tensor]] = field(default_factory=list)
    """The metrics of each turn of each micro-batch."""
    num_micro_batches: int = 0
    wait_s: float = 0.0
    """For data, of all micro-batches."""


@dataclass
class Interval:
    """Sums since the last log point, on one rank."""

    world: World
    flops_per_sample: float
    peak: PeakFlops
    begin_s: float = field(default_factory=time.perf_counter)
    num_steps: int = 0
    num_samples: int = 0
    """Over all ranks."""
    num_micro_batches: int = 0
    waits_s: list[float] = field(default_factory=list)
    """For data, of each step."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    grad_norm_sums: dict[str, Tensor] = field(default_factory=dict)
    """By player; a norm that is not finite makes the mean so too."""
    grad_norm_counts: Counter[str] = field(default_factory=Counter)
    """Steps in which a player moved."""

    def add(self, result: StepResult, num_samples: int) -> None:
        """Takes in a step of `num_samples` samples over all ranks; no number is read from the device here."""
        self.num_steps += 1
        self.num_samples += num_samples
        self.num_micro_batches += result.num_micro_batches
        self.waits_s.append(result.wait_s)
        for metrics in result.turns:
            _add_to(self.sums, {name: value.float() for name, value in metrics.items()})
        _add_to(self.grad_norm_sums, result.grad_norms)
        self.grad_norm_counts.update(result.grad_norms.keys())

    def report(self, num_bad: int) -> dict[str, float]:
        """The interval's metrics by name, over all ranks; then starts a new interval. A collective.

        Args:
            num_bad: bad samples that this rank met since the run's start.
        """
        wall_s = time.perf_counter() - self.begin_s
        names = sorted(self.sums)
        # One copy to the host for all: each number read on its own would wait for the device anew.
        sums = torch.stack([self.sums[name] for name in names]).tolist() if names else []
        means = [total / max(1, self.num_micro_batches) for total in sums]
        *totals, bad = self.world.sum(torch.tensor([*means, num_bad], dtype=torch.float64)).tolist()
        memory = float(_memory_bytes(self.world.device))
        wait_s, slowest_s, memory = self.world.max(
            torch.tensor([sum(self.waits_s), wall_s, memory], dtype=torch.float64)
        ).tolist()
        samples_per_s = self.num_samples / slowest_s
        result = {f"train/{name}": total / self.world.size for name, total in zip(names, totals, strict=True)}
        result |= {
            **self._grad_norms(),
            "throughput/samples_per_s": samples_per_s,
            "throughput/step_ms": 1e3 * slowest_s / max(1, self.num_steps),
            "throughput/mfu": samples_per_s * self.flops_per_sample / (self.peak.flops_per_s * self.world.size),
            "data/wait_ms_per_step": 1e3 * wait_s / max(1, self.num_steps),
            "data/wait_fraction": wait_s / slowest_s,
            "data/bad_samples": bad,
            "memory/peak_bytes_per_rank": memory,
        }
        self.restart()
        return result

    def _grad_norms(self) -> dict[str, float]:
        means = {player: float(total) / self.grad_norm_counts[player] for player, total in self.grad_norm_sums.items()}
        if len(means) == 1:
            return {"train/grad_norm": next(iter(means.values()))}
        return {f"train/grad_norm_{player}": mean for player, mean in means.items()}

    def restart(self) -> None:
        """Starts a new interval now, so that validation and pictures do not count as training time."""
        self.begin_s = time.perf_counter()
        self.num_steps = self.num_samples = self.num_micro_batches = 0
        self.waits_s = []
        self.sums, self.grad_norm_sums, self.grad_norm_counts = {}, {}, Counter()


def _add_to(sums: dict[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        known = sums.get(name)
        sums[name] = value if known is None else known + value


def _memory_bytes(device: torch.device) -> int:
    """Peak allocated device memory on CUDA, peak resident memory of the process on the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
