"""CPU time per image of our loader, against decoding alone and against other loaders, on the same pictures.

What is compared is in bench_peers.py. Rounds are interleaved and swap their order, ratios are medians of the rounds'
ratios, and CPU time is counted (of this process and its children, user + system), since wall time on a shared machine
measures the neighbours. The clock starts after the second batch: the start of processes and the filling of queues do
not count. `decode alone` is a full decode of the same bytes in one thread and nothing else.

    python tools/bench_data.py
    python tools/bench_data.py --source ../shared/data/photos_300.zip --size 500x375 --rounds 9 --json
    python tools/bench_data.py --peers webdataset imagefolder --require-decode 1.35 --require-parity 1.0
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: every variant's work is one thread's per worker

import numpy as np
import psutil
import torch
from bench_peers import BATCH, PEERS, PREFETCH, Run, make_variants
from PIL import Image

PHOTOGRAPHS = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "photos_300.zip"


@dataclass(frozen=True)
class Result:
    """Medians over the rounds, of one size of pictures. By the names of variants, or pairs of them."""

    size: str
    image_bytes: int
    num_images: int
    rounds: int
    images_per_round: int
    cpu_ms_per_image: dict[str, float]
    wall_images_per_s: dict[str, float]
    ratios: dict[str, float]
    # of CPU times


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    results = []
    for size in arguments.size:
        pictures = [resized(data, size) for data in islice(read_jpegs(arguments.source), arguments.images)]
        ahead = 2 + arguments.batches + PREFETCH * arguments.workers + 1
        repeated = pictures * -(-ahead * BATCH // len(pictures))  # an epoch holds a round
        with tempfile.TemporaryDirectory(prefix="bench_data") as folder:
            runs = make_variants(Path(folder), repeated, arguments.workers, arguments.peers)
            result = measure(runs, "x".join(map(str, size)), pictures, arguments.rounds, arguments.batches)
        results.append(result)
        if not arguments.json:
            print(describe(result), flush=True)
    if arguments.json:
        print(json.dumps({"source": str(arguments.source or "generated"), "results": [asdict(one) for one in results]}))
    failures = [failure for result in results for failure in check(result, arguments)]
    if failures:
        print("; ".join(failures), file=sys.stderr)
        raise SystemExit(1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = PHOTOGRAPHS if PHOTOGRAPHS.exists() else None
    sizes = [(500, 375), (1024, 768)]
    parser.add_argument("--source", type=Path, default=default, help="zip or folder of JPEGs; without: generated ones")
    parser.add_argument("--images", type=int, default=300, help="at most so many pictures of the source")
    parser.add_argument("--size", type=parse_size, nargs="+", default=sizes, help="the pictures are resized to these")
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS), help="besides ours")
    parser.add_argument("--workers", type=int, default=2, help="threads or processes, where a variant has some")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--batches", type=int, default=8, help=f"timed batches of {BATCH} per variant and round")
    parser.add_argument("--require-decode", type=float, help="exit 1 when ours/decode alone is above this, e.g. 1.35")
    parser.add_argument("--require-parity", type=float, help="exit 1 when ours/a peer (our transforms) is above this")
    parser.add_argument("--require-speedup", type=float, help="exit 1 when a peer (recipe)/ours is below this")
    parser.add_argument("--json", action="store_true", help="one JSON object on one line")
    return parser.parse_args()


def parse_size(text: str) -> tuple[int, int]:
    width, height = text.split("x")
    return int(width), int(height)


def check(result: Result, arguments: argparse.Namespace) -> Iterator[str]:
    """What is not as required."""
    limits = (
        ("ours/decode alone", -1, arguments.require_decode),
        ("ours/peer", -1, arguments.require_parity),
        ("recipe/ours", 1, arguments.require_speedup),
    )
    for pair, ratio in result.ratios.items():
        kind = (
            "ours/decode alone" if "decode alone" in pair else "ours/peer" if pair.startswith("ours") else "recipe/ours"
        )
        for name, sign, limit in limits:
            if kind == name and limit is not None and sign * ratio < sign * limit:
                yield f"{result.size}: {pair} is {ratio:.2f}, expected {'at least' if sign > 0 else 'at most'} {limit}"


def read_jpegs(source: Path | None) -> Iterator[bytes]:
    if source is None:
        for number in range(300):
            yield generated_jpeg(number)
    elif source.is_dir():
        for path in sorted(path for path in source.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg")):
            yield path.read_bytes()
    else:
        with zipfile.ZipFile(source) as archive:
            for name in sorted(archive.namelist()):
                if name.lower().endswith((".jpg", ".jpeg")):
                    yield archive.read(name)


def generated_jpeg(number: int) -> bytes:
    """Smoothed noise of 1024x768, with about the bytes of a photograph."""
    rng = np.random.default_rng(number)
    layers = [rng.integers(0, 256, (768 // step + 1, 1024 // step + 1, 3), np.uint8) for step in (100, 24, 8)]
    blurred = [
        np.asarray(Image.fromarray(layer).resize((1024, 768), Image.Resampling.BICUBIC), int) for layer in layers
    ]
    file = io.BytesIO()
    Image.fromarray(np.mean(blurred, axis=0).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def resized(data: bytes, size: tuple[int, int]) -> bytes:
    """size: (width, height); of upright pictures (height, width)."""
    image, file = Image.open(io.BytesIO(data)).convert("RGB"), io.BytesIO()
    size = size if image.width >= image.height else size[::-1]
    image.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def measure(runs: dict[str, Run], size: str, pictures: list[bytes], rounds: int, batches: int) -> Result:
    """Medians over the rounds; the first round warms up and is dropped."""
    cpu_ms: dict[str, list[float]] = {name: [] for name in runs}
    wall_ms: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name in list(runs) if number % 2 else list(runs)[::-1]:
            cpu, wall = time_batches(runs[name](number), batches)
            if number:
                cpu_ms[name].append(cpu)
                wall_ms[name].append(wall)
    ratios = {
        f"{one}/{other}": statistics.median(a / b for a, b in zip(cpu_ms[one], cpu_ms[other], strict=True))
        for one, other in compared(list(runs))
    }
    return Result(
        size,
        sum(map(len, pictures)) // len(pictures),
        len(pictures),
        rounds,
        batches * BATCH,
        {name: statistics.median(values) for name, values in cpu_ms.items()},
        {name: 1000 / statistics.median(values) for name, values in wall_ms.items()},
        ratios,
    )


def compared(names: list[str]) -> Iterator[tuple[str, str]]:
    """Pairs whose ratio counts: like with like, in the process itself, or ours in threads with theirs in processes."""
    yield "ours", "decode alone"
    threads = next(name for name in names if name.startswith("ours, ") and name.endswith("threads"))
    for name in names:
        mine = threads if name.endswith("processes") else "ours"
        if ", transforms" in name:
            yield mine, name
        elif ", recipe" in name and not name.endswith("threads"):
            yield name, mine


def time_batches(batches: Iterator[object], count: int) -> tuple[float, float]:
    """(CPU, wall) milliseconds per image. With workers, what they loaded ahead before the clock started and after it
    stopped is alike, so that a whole number of batches is paid for.
    """
    next(batches)
    next(batches)
    cpu, wall = cpu_seconds(), time.perf_counter()
    for _ in range(count):
        next(batches)
    taken = cpu_seconds() - cpu, time.perf_counter() - wall
    if hasattr(batches, "close"):
        batches.close()
    del batches
    return taken[0] / count / BATCH * 1000, taken[1] / count / BATCH * 1000


def cpu_seconds() -> float:
    """User and system time of this process and its living descendants."""
    children = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return time.process_time() + float(sum(times.user + times.system for times in children))


def describe(result: Result) -> str:
    lines = [
        f"{result.num_images} pictures of {result.size}, {result.image_bytes:,} bytes each; "
        f"{result.rounds} rounds of {result.images_per_round} images",
        f"{'':36}{'CPU ms/image':>14}{'images/s':>10}",
    ]
    cpu, wall = result.cpu_ms_per_image, result.wall_images_per_s
    lines += [f"{name:36}{cpu[name]:14.3f}{wall[name]:10.0f}" for name in cpu]
    lines += ["ratios of CPU times", *(f"{name:60}{value:6.2f}" for name, value in result.ratios.items())]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
