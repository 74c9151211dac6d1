"""What the data order costs at full size: start, memory, manifest, and how much a node reads for what it uses.

From a synthetic manifest of 1e9 samples of 100 KB in 100,000 shards, for 1,024 ranks and a global batch of 16,384.

start      a fresh process makes the order and locates one rank's first batch, at some places of an epoch
manifest   size, time and memory of loading manifest.json, in a fresh process
reading    one node of 8 ranks over a whole epoch, by the rule of data_pipes/loading/prefetch.py: if the node needs at
least
           half of a chunk and there is room, the chunk is fetched whole at its first use and kept up to its last one;
           other samples are read one by one
           - all whole: bytes fetched / bytes used without that rule, if every chunk in use were fetched and kept
           - amplification: bytes fetched / bytes used, under --cache-gb
           - cache: the most bytes of whole chunks in use at one time
           - singly: share of the samples that are read one by one
           The elastic case changes the number of ranks for the whole of what is simulated.

    python tools/bench_scale.py
    python tools/bench_scale.py --samples 2e9 --json
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipes.order.hashing import Int64s
from data_pipes.order.mixture import MixtureOrder, SourceCounts
from data_pipes.order.mixture_config import MixtureConfig, SourceConfig
from data_pipes.order.order import Order, OrderConfig

SAMPLE_BYTES, RANKS_PER_NODE = 100_000, 8
_ROWS_AT_ONCE = 1 << 18
PLACES = (0.0, 0.5, 0.99)


@dataclass(frozen=True)
class Setup:
    """The synthetic run."""

    num_samples: int
    num_shards: int
    global_batch: int
    ranks: int

    def counts(self, share: float = 1.0) -> tuple[Int64s, Int64s]:
        """(samples, bytes) per shard of the first `share` of the shards."""
        samples = np.full(max(1, round(self.num_shards * share)), self.num_samples // self.num_shards, np.int64)
        return samples, samples * SAMPLE_BYTES

    def order(self, config: OrderConfig | None = None) -> Order:
        samples, size_bytes = self.counts()
        decided = (config or OrderConfig()).with_streams(int(samples.sum()), self.global_batch)
        return Order(samples, size_bytes, decided, "f" * 64)

    def mixture(self, config: OrderConfig | None = None) -> MixtureOrder:
        """Half, 0.3 and 0.2 of the samples from sources of 60 %, 39.9 % and 0.1 % of the shards."""
        names, weights, sizes = ("large", "middle", "small"), (0.5, 0.3, 0.2), (0.6, 0.399, 0.001)
        sources = [SourceConfig(name, weight) for name, weight in zip(names, weights, strict=True)]
        counts = [SourceCounts(*self.counts(size), name) for name, size in zip(names, sizes, strict=True)]
        return MixtureOrder.create(MixtureConfig(sources, []), counts, config or OrderConfig(), self.global_batch)


@dataclass(frozen=True)
class Reading:
    """What one node reads for the samples that it uses."""

    samples: int
    all_whole: float
    # bytes fetched / bytes used if every chunk in use were fetched whole and kept
    amplification: float
    # bytes fetched / bytes used by the rule, under the cap; at most 2
    cache_bytes: int
    # of the whole chunks in use at one time, at most, without the cap
    read_singly: float
    # share of the samples, under the cap
    requests_per_sample: float
    # under the cap: whole chunks and single samples


def main() -> None:
    arguments = parse_arguments()
    setup = Setup(int(arguments.samples), arguments.shards, arguments.global_batch, arguments.ranks)
    if arguments.measure is not None:
        print(json.dumps(MEASURES[arguments.measure](setup, arguments.at)))
        return
    result = {
        "setup": asdict(setup),
        "start": {f"{place:.0%}": in_fresh_process("start", arguments, place) for place in PLACES},
        "manifest": in_fresh_process("manifest", arguments, 0.0),
        "reading": {name: asdict(found) for name, found in readings(setup, arguments)},
    }
    print(json.dumps(result) if arguments.json else describe(result, arguments.cache_gb))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=float, default=1e9, help=f"of {SAMPLE_BYTES:,} bytes")
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--elastic-ranks", type=int, default=960, help="the run goes on with so many")
    parser.add_argument("--global-batch", type=int, default=16_384)
    parser.add_argument("--cache-gb", type=float, default=100.0, help="cap of a node's cache, in 1e9 bytes")
    parser.add_argument("--steps", type=int, help="steps simulated per case; without: an epoch")
    parser.add_argument("--json", action="store_true", help="one JSON object on one line")
    parser.add_argument("--measure", choices=("start", "manifest"), help=argparse.SUPPRESS)
    parser.add_argument("--at", type=float, default=0.0, help=argparse.SUPPRESS)
    return parser.parse_args()


def in_fresh_process(measure: str, arguments: argparse.Namespace, place: float) -> dict[str, float]:
    options = ("samples", "shards", "ranks", "global_batch")
    command = [sys.executable, __file__, "--measure", measure, "--at", str(place)]
    command += [f"--{name.replace('_', '-')}={getattr(arguments, name)}" for name in options]
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def measure_start(setup: Setup, place: float) -> dict[str, float]:
    """Seconds to the first located batch of a rank, to the next one, and for one look at a chunk's uses; MB."""
    before, started = peak_mb(), time.perf_counter()
    order = setup.order()
    position = int(place * order.num_samples) // setup.global_batch * setup.global_batch
    own = np.arange(position, position + setup.global_batch // setup.ranks)
    chunk = int(order.locate(own).chunk[0])
    first = time.perf_counter()
    order.locate(own + setup.global_batch)
    second, peak = time.perf_counter(), peak_mb()
    for offset in range(100):
        order.uses((chunk + offset) % order.num_chunks, position - position % order.num_samples)
    return {
        "first_batch_s": first - started,
        "next_batch_ms": (second - first) * 1e3,
        "uses_ms": (time.perf_counter() - second) / 100 * 1e3,
        "peak_mb": peak,
        "peak_before_mb": before,
        "num_chunks": order.num_chunks,
        "streams": order.config.streams or 0,
    }


def measure_manifest(setup: Setup, _: float) -> dict[str, float]:
    """Bytes of the file; seconds and MB to load it, with its fingerprint. The file is written by another process."""
    from data_pipes.shards.manifest import MANIFEST_NAME, Manifest, ShardEntry

    samples, size_bytes = (counts.tolist() for counts in setup.counts())
    with tempfile.TemporaryDirectory(prefix="bench_scale") as folder:
        child = os.fork()  # so that the memory of writing does not count
        if child == 0:
            shards = tuple(
                ShardEntry(f"{i // 1000:05d}/shard-{i:06d}.tar", count, size, f"{i:064x}")
                for i, (count, size) in enumerate(zip(samples, size_bytes, strict=True))
            )
            Manifest(folder, shards).save(folder)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            raise RuntimeError("the manifest could not be written")
        file_bytes, before, started = os.path.getsize(f"{folder}/{MANIFEST_NAME}"), peak_mb(), time.perf_counter()
        Manifest.load(folder)
        return {"file_bytes": file_bytes, "load_s": time.perf_counter() - started, "added_mb": peak_mb() - before}


MEASURES = {"start": measure_start, "manifest": measure_manifest}


def readings(setup: Setup, arguments: argparse.Namespace) -> Iterator[tuple[str, Reading]]:
    """The cases, one after the other."""
    order, cap = setup.order(), int(arguments.cache_gb * 1e9)
    elastic = replace(setup, ranks=arguments.elastic_ranks)
    largest = setup.global_batch // elastic.ranks * elastic.ranks
    rounder = setup.global_batch // (16 * elastic.ranks) * 16 * elastic.ranks or largest
    rows = max(1, setup.global_batch // OrderConfig().run)
    cases: list[tuple[str, Order | MixtureOrder, int, int]] = [
        ("same ranks", order, setup.ranks, setup.global_batch),
        ("half the ranks", order, setup.ranks // 2, setup.global_batch),
        (f"{elastic.ranks} ranks, batch {largest}", order, elastic.ranks, largest),
        (f"{elastic.ranks} ranks, batch {rounder}", order, elastic.ranks, rounder),
        (f"streams = {24 * rows}", setup.order(OrderConfig(streams=24 * rows)), setup.ranks, setup.global_batch),
        (f"streams = {rows}", setup.order(OrderConfig(streams=rows)), setup.ranks, setup.global_batch),
        ("mixture of 3", setup.mixture(), setup.ranks, setup.global_batch),
    ]
    for name, case, ranks, batch in cases:
        steps = arguments.steps or case.num_samples // batch
        yield name, read_of_node(case, node_positions(0, steps, batch, ranks, node=ranks // RANKS_PER_NODE // 2), cap)


def node_positions(first_step: int, num_steps: int, global_batch: int, ranks: int, node: int) -> Int64s:
    """The positions of one node's ranks over some steps, in the order of time."""
    per_node = global_batch * RANKS_PER_NODE // ranks
    steps = np.arange(first_step, first_step + num_steps)
    return ((steps * global_batch)[:, None] + node * per_node + np.arange(per_node)).ravel()


def read_of_node(order: Order | MixtureOrder, positions: Int64s, cache_bytes: int) -> Reading:
    """What a node reads for the samples at `positions`, of SAMPLE_BYTES each."""
    parts = range(0, len(positions), _ROWS_AT_ONCE)
    located = np.concatenate([order.locate(positions[at : at + _ROWS_AT_ONCE]).chunk for at in parts])
    chunks, first, number, used = np.unique(located, return_index=True, return_inverse=True, return_counts=True)
    last = np.empty(len(chunks), np.int64)
    last[number] = np.arange(len(located))
    sizes = np.array([order.chunk_samples(chunk)[2] for chunk in chunks.tolist()])
    whole = 2 * used >= sizes
    size_bytes = SAMPLE_BYTES * sizes[whole]
    _, largest = keep(first[whole], last[whole], size_bytes, sys.maxsize)
    fits, _ = keep(first[whole], last[whole], size_bytes, cache_bytes)
    singly = len(located) - int(used[whole][fits].sum())
    used_bytes = SAMPLE_BYTES * len(located)
    return Reading(
        samples=len(located),
        all_whole=float(SAMPLE_BYTES * sizes.sum() / used_bytes),
        amplification=float((size_bytes[fits].sum() + SAMPLE_BYTES * singly) / used_bytes),
        cache_bytes=largest,
        read_singly=singly / len(located),
        requests_per_sample=(int(fits.sum()) + singly) / len(located),
    )


def keep(first: Int64s, last: Int64s, size_bytes: Int64s, cap: int) -> tuple[NDArray[np.bool_], int]:
    """(which chunks find room at their first use, if none gives way before its last; the most bytes held)."""
    fits, held, most = np.zeros(len(first), np.bool_), 0, 0
    events = np.concatenate([first * 2, last * 2 + 1])
    sizes: Sequence[int] = size_bytes.tolist()
    for event in np.argsort(events, kind="stable").tolist():
        chunk = event % len(first)
        if event < len(first):
            if held + sizes[chunk] <= cap:
                fits[chunk] = True
                held += sizes[chunk]
                most = max(most, held)
        elif fits[chunk]:
            held -= sizes[chunk]
    return fits, most


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 10 if sys.platform != "darwin" else 1 << 20)


def describe(result: dict[str, Any], cache_gb: float) -> str:
    setup, manifest = result["setup"], result["manifest"]
    lines = [
        f"{setup['num_samples']:,} samples of {SAMPLE_BYTES:,} bytes, {setup['num_shards']:,} shards; "
        f"{setup['ranks']:,} ranks, global batch {setup['global_batch']:,}; "
        f"{result['start']['0%']['num_chunks']:,} chunks, {result['start']['0%']['streams']:,} streams",
        f"{'start at':>10}{'first batch s':>15}{'next batch ms':>15}{'uses ms':>9}{'peak MB':>9}{'of it before':>14}",
    ]
    lines += [
        f"{place:>10}{found['first_batch_s']:15.2f}{found['next_batch_ms']:15.2f}{found['uses_ms']:9.2f}"
        f"{found['peak_mb']:9.0f}{found['peak_before_mb']:14.0f}"
        for place, found in result["start"].items()
    ]
    lines.append(
        f"manifest.json: {manifest['file_bytes'] / 1e6:.1f} MB, loaded in {manifest['load_s']:.2f} s with "
        f"{manifest['added_mb']:.0f} MB"
    )
    lines.append(
        f"{'one node':<28}{'samples':>12}{'all whole':>11}{'amplification':>15}{'cache GB':>10}{'singly':>9}"
        f"{'requests/sample':>17}   (cap of {cache_gb:g} GB)"
    )
    lines += [
        f"{name:<28}{found['samples']:12,}{found['all_whole']:11.3f}{found['amplification']:15.3f}"
        f"{found['cache_bytes'] / 1e9:10.1f}{found['read_singly']:9.1%}{found['requests_per_sample']:17.3f}"
        for name, found in result["reading"].items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
