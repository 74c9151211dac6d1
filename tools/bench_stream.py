"""Training data from an object store: what a run waits for, asks for and reads twice.

A server on loopback that takes 30 ms for every request (and can fail) stands for the store. Each variant reads the same
epochs in the same order, with a pause after each batch that stands for the training step; their samples are compared
with the local run's. Read amplification: bytes that the store sent / bytes of the samples used.

    python tools/bench_stream.py
    python tools/bench_stream.py --source ../shared/data/photos_300.zip --copies 8 --json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import webdataset

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from bench_data import cpu_seconds, read_jpegs, resized  # noqa: E402

from data_pipes.batch import BatchPlan  # noqa: E402
from data_pipes.cache.folder import CacheConfig  # noqa: E402
from data_pipes.config import DataConfig  # noqa: E402
from data_pipes.index.index import index_shards  # noqa: E402
from data_pipes.loader import Loader  # noqa: E402
from data_pipes.open import open_dataset  # noqa: E402
from data_pipes.order.order import OrderConfig  # noqa: E402
from data_pipes.shards.manifest import Manifest  # noqa: E402
from data_pipes.store.transport import StorageConfig  # noqa: E402
from tests.data_pipes.store.faulty_server import FaultyServer  # noqa: E402

FAULTS = {"503": 0.01, "500": 0.01, "reset": 0.01, "drop": 0.01, "short": 0.01}


@dataclass(frozen=True)
class Row:
    """One variant."""

    name: str
    images_per_s: float
    cpu_ms_per_image: float
    wait_p50_ms: float
    wait_p99_ms: float
    # for a batch, after the first
    first_batch_ms: float
    requests_per_image: float
    retries: float
    amplification: float
    cache_hits: float
    # share of the samples
    same_as_local: bool


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="bench_stream") as name:
        folder = Path(name)
        manifest = write_shards(folder / "set", arguments.source, arguments.copies)
        rows = measure(manifest, folder, arguments)
    text = {"num_samples": manifest.num_samples, "size_bytes": manifest.size_bytes}
    print(json.dumps({**text, "rows": [asdict(row) for row in rows]}) if arguments.json else describe(rows, manifest))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    photographs = ROOT.parent / "shared" / "data" / "photos_300.zip"
    default = photographs if photographs.exists() else None
    parser.add_argument("--source", type=Path, default=default, help="zip or folder of JPEGs; without: generated ones")
    parser.add_argument("--copies", type=int, default=8, help="how often the pictures are repeated")
    parser.add_argument("--delay", type=float, default=0.03, help="seconds that the server takes for a request")
    parser.add_argument("--step", type=float, default=0.1, help="seconds that stand for the training step")
    parser.add_argument("--batch", type=int, default=32, help="images per step")
    parser.add_argument("--workers", type=int, default=2, help="threads")
    parser.add_argument("--json", action="store_true", help="one JSON object on one line")
    return parser.parse_args()


def write_shards(folder: Path, source: Path | None, copies: int) -> Manifest:
    """Shards of 200 pictures of 500x375."""
    folder.mkdir(parents=True)
    pictures = [resized(data, (500, 375)) for data in read_jpegs(source)]
    paths: list[Path] = []
    with webdataset.ShardWriter(
        f"{folder}/shard-%06d.tar", maxcount=200, verbose=0, post=lambda name: paths.append(Path(name))
    ) as writer:
        for number, data in enumerate(islice(cycle(pictures), copies * len(pictures))):
            writer.write({"__key__": f"{number:06d}", "jpg": data, "cls": "0"})
    return index_shards(paths, folder)


def measure(manifest: Manifest, folder: Path, arguments: argparse.Namespace) -> list[Row]:
    order = OrderConfig(window=512, chunk_bytes=1 << 20)
    local = DataConfig(train=manifest.root, order=order, workers=arguments.workers)
    steps = manifest.num_samples // arguments.batch
    rows, expected = [], None
    working_set = manifest.size_bytes
    caches = {"no cache": None, "cache of everything": 4 * working_set, "cache of a third": working_set // 3}
    expected, row = run("local files", local, arguments, steps, 0, None)
    rows.append(row)
    for faults in ({}, FAULTS):
        with FaultyServer(folder / "set", chances=faults, delay_s=arguments.delay) as server:
            for name, max_bytes in caches.items():
                cache = CacheConfig()
                if max_bytes is not None:
                    cache = CacheConfig(str(folder / f"cache {len(rows)}"), max(max_bytes, 4 << 20))
                config = replace(local, train=server.url, cache=cache, storage=StorageConfig(backoff_s=0.05))
                title = f"store, {name}" + (", 5% of the requests fail" if faults else "")
                rows.append(run(title, config, arguments, steps, 0, expected)[1])
                if max_bytes is not None and max_bytes > working_set and not faults:
                    rows.append(run(f"{title}, second epoch", config, arguments, steps, steps, None)[1])
    return rows


def run(
    name: str, config: DataConfig, arguments: argparse.Namespace, steps: int, first: int, expected: list[str] | None
) -> tuple[list[str], Row]:
    """Digests of the batches, and the figures."""
    dataset = open_dataset(config, image_size=(224, 224), channels=3, global_batch=arguments.batch)
    loader = Loader(dataset, BatchPlan(arguments.batch, arguments.batch), config, pin_memory=False)
    digests, waits = [], []
    with closing(loader):
        cpu, begin = cpu_seconds(), time.perf_counter()
        batches = loader.batches(first * arguments.batch)
        for _ in range(steps):
            waiting = time.perf_counter()
            batch = next(batches)
            waits.append(1e3 * (time.perf_counter() - waiting))
            digests.append(hashlib.sha256(batch.images.numpy().tobytes()).hexdigest())
            time.sleep(arguments.step)
        seconds, cpu = time.perf_counter() - begin, cpu_seconds() - cpu
    sums, images = loader.counters.take(), steps * arguments.batch
    p50, p99 = np.quantile(waits[1:], (0.5, 0.99)).tolist()
    return digests, Row(
        name,
        images / seconds,
        1e3 * cpu / images,
        p50,
        p99,
        waits[0],
        sums.get("requests", 0) / images,
        sums.get("retries", 0),
        sums.get("bytes_fetched", 0) / sums["bytes_used"],
        sums.get("cache_hits", 0) / images,
        expected is None or digests == expected,
    )


def describe(rows: list[Row], manifest: Manifest) -> str:
    head = f"{manifest.num_samples:,} pictures, {manifest.size_bytes / 1e6:,.0f} MB in {len(manifest.shards)} shards"
    columns = "images/s  CPU ms  wait p50  p99 ms  first ms  requests/image  retries  amplification  cache hits  same"
    lines = [head, f"{'':58}{columns}"]
    lines += [
        f"{row.name:58}{row.images_per_s:8.0f}{row.cpu_ms_per_image:8.2f}{row.wait_p50_ms:10.1f}{row.wait_p99_ms:8.1f}"
        f"{row.first_batch_ms:10.0f}{row.requests_per_image:16.2f}{row.retries:9.0f}{row.amplification:15.2f}"
        f"{100 * row.cache_hits:11.0f}%{row.same_as_local!s:>6}"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
