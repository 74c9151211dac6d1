"""CPU time per image of our loader, against stock webdataset, on the same tar shards.

The variants do the same work: read, decode, RandomResizedCrop 224 bicubic with antialias, flip, batches. `recipe` is
the usual one: webdataset + PIL + torchvision float32 with ToTensor and Normalize; `webdataset` is stock webdataset (its
shuffle, its tar reader) with our decoder and our uint8 transform. Rounds are interleaved and swap their order, ratios
are medians of the rounds' ratios, and CPU time is counted (of this process and its children, user + system), since wall
time on a shared machine measures the neighbours. The clock starts after the second batch: the start of processes and
the filling of queues do not count.

    python tools/bench_data.py
    python tools/bench_data.py --source ../shared/data/photos_300.zip --original-size --rounds 9 --json
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import torch
import webdataset
from PIL import Image
from torchvision import transforms

from data_pipes.decode import decode_image
from data_pipes.hashing import hash_uniform
from data_pipes.image import TrainTransform
from data_pipes.index import Manifest, index_shards
from data_pipes.loader import BatchPlan, DataConfig, Loader, open_dataset

SIZE, SCALE, BATCH = 224, (0.2, 1.0), 32
PHOTOGRAPHS = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "photos_300.zip"
Run = Callable[[int], Iterator[object]]
"""From a round's number to its batches."""


@dataclass(frozen=True)
class Result:
    """Medians over the rounds. Names of variants -> milliseconds per image; pairs of them -> ratio of CPU times."""

    cpu_ms_per_image: dict[str, float]
    wall_ms_per_image: dict[str, float]
    ratios: dict[str, float]
    image_bytes: int
    num_images: int
    rounds: int
    images_per_round: int


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="bench_data") as folder:
        size = None if arguments.original_size else (500, 375)
        manifest = write_shards(Path(folder), arguments.source, arguments.images, size)
        result = measure(variants(manifest, arguments.workers), manifest, arguments.rounds, arguments.batches)
    source = arguments.source.name if arguments.source else "generated"
    print(json.dumps({"source": source, **asdict(result)}) if arguments.json else describe(result, source))
    too_slow = [
        f"{name} is {result.ratios[name]:.2f}, expected {'at least' if sign > 0 else 'at most'} {limit}"
        for name, sign, limit in (
            ("recipe/ours", 1, arguments.require_speedup),
            ("ours/webdataset", -1, arguments.require_parity),
        )
        if limit is not None and sign * result.ratios[name] < sign * limit
    ]
    if too_slow:
        print("; ".join(too_slow), file=sys.stderr)
        raise SystemExit(1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = PHOTOGRAPHS if PHOTOGRAPHS.exists() else None
    parser.add_argument("--source", type=Path, default=default, help="zip or folder of JPEGs; without: generated ones")
    parser.add_argument("--images", type=int, default=300, help="at most so many pictures of the source")
    parser.add_argument("--original-size", action="store_true", help="do not resize the pictures to 500x375 first")
    parser.add_argument("--workers", type=int, default=2, help="threads or processes, where a variant has some")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--batches", type=int, default=8, help=f"timed batches of {BATCH} per variant and round")
    parser.add_argument("--require-speedup", type=float, help="exit 1 when recipe/ours is below this, e.g. 2.5")
    parser.add_argument("--require-parity", type=float, help="exit 1 when ours/webdataset is above this, e.g. 1.0")
    parser.add_argument("--json", action="store_true", help="one JSON object on one line")
    return parser.parse_args()


def write_shards(folder: Path, source: Path | None, limit: int, size: tuple[int, int] | None) -> Manifest:
    """Packs the pictures with webdataset's writer, 100 to a shard. size: (width, height); None: as they are."""
    paths: list[Path] = []
    with webdataset.ShardWriter(
        f"{folder}/shard-%06d.tar", maxcount=100, verbose=0, post=lambda name: paths.append(Path(name))
    ) as writer:
        for number, data in enumerate(islice(read_jpegs(source), limit)):
            writer.write({"__key__": f"{number:06d}", "jpg": resized(data, size), "cls": "0"})
    return index_shards(paths, folder)


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
    """Smoothed noise of 500x375, with about the bytes of a photograph."""
    rng = np.random.default_rng(number)
    layers = [rng.integers(0, 256, (375 // step + 1, 500 // step + 1, 3), np.uint8) for step in (50, 12, 4)]
    blurred = [np.asarray(Image.fromarray(layer).resize((500, 375), Image.Resampling.BICUBIC), int) for layer in layers]
    file = io.BytesIO()
    Image.fromarray(np.mean(blurred, axis=0).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def resized(data: bytes, size: tuple[int, int] | None) -> bytes:
    if size is None:
        return data
    image, file = Image.open(io.BytesIO(data)).convert("RGB"), io.BytesIO()
    size = size if image.width >= image.height else size[::-1]
    image.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def variants(manifest: Manifest, workers: int) -> dict[str, Run]:
    """What is compared. `ours` and `webdataset`, `recipe` load in the process itself; the others name their workers."""

    def ours(count: int, kind: str) -> Run:
        config = DataConfig(train=str(manifest.root), workers=count, worker_kind=kind, crop_scale=SCALE)  # type: ignore[arg-type]
        dataset = open_dataset(config, image_size=(SIZE, SIZE), channels=3, global_batch=BATCH)

        def run(number: int) -> Iterator[object]:
            with closing(Loader(dataset, BatchPlan(BATCH, BATCH), config)) as loader:
                yield from loader.batches(number * 64 * BATCH)

        return run

    urls = [str(manifest.shard_path(shard)) for shard in range(len(manifest.shards))]

    def stock(decode: Callable[[dict[str, bytes]], tuple[torch.Tensor, int]], count: int) -> Run:
        def run(number: int) -> Iterator[object]:
            data = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=number, empty_check=False).shuffle(100)
            data = data.map(decode).batched(BATCH, partial=False).repeat()
            if count == 0:
                return iter(data)
            return iter(webdataset.WebLoader(data, batch_size=None, num_workers=count, prefetch_factor=2))

        return run

    return {
        "ours": ours(0, "thread"),
        "webdataset": stock(OurRecipe(), 0),
        "recipe": stock(UsualRecipe(), 0),
        f"ours, {workers} threads": ours(workers, "thread"),
        f"ours, {workers} processes": ours(workers, "process"),
        f"webdataset, {workers} processes": stock(OurRecipe(), workers),
        f"recipe, {workers} processes": stock(UsualRecipe(), workers),
    }


class OurRecipe:
    """Our decoder and transform on webdataset's samples."""

    def __init__(self) -> None:
        self.transform, self.count = TrainTransform((SIZE, SIZE), SCALE), 0

    def __call__(self, sample: dict[str, bytes]) -> tuple[torch.Tensor, int]:
        self.count += 1
        uniforms = hash_uniform(0, [self.count], 0, self.transform.num_uniforms)[0].tolist()
        return self.transform(decode_image(sample["jpg"], 3), uniforms), int(sample["cls"])


class UsualRecipe:
    """PIL and torchvision in float32, as training scripts have it."""

    def __init__(self) -> None:
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(SIZE, SCALE, interpolation=transforms.InterpolationMode.BICUBIC),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )

    def __call__(self, sample: dict[str, bytes]) -> tuple[torch.Tensor, int]:
        image: torch.Tensor = self.transform(Image.open(io.BytesIO(sample["jpg"])).convert("RGB"))
        return image, int(sample["cls"])


def measure(runs: dict[str, Run], manifest: Manifest, rounds: int, batches: int) -> Result:
    """Medians over the rounds; the first round warms up and is dropped."""
    cpu_ms: dict[str, list[float]] = {name: [] for name in runs}
    wall_ms: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name in list(runs) if number % 2 else list(runs)[::-1]:
            cpu, wall = time_batches(runs[name](number), batches)
            if number:
                cpu_ms[name].append(cpu)
                wall_ms[name].append(wall)

    def ratio(one: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(cpu_ms[one], cpu_ms[other], strict=True))

    processes = next(name for name in runs if name.startswith("ours,") and name.endswith("processes"))
    threads = next(name for name in runs if name.endswith("threads"))
    recipe_processes, webdataset_processes = (processes.replace("ours", name) for name in ("recipe", "webdataset"))
    return Result(
        cpu_ms_per_image={name: statistics.median(values) for name, values in cpu_ms.items()},
        wall_ms_per_image={name: statistics.median(values) for name, values in wall_ms.items()},
        ratios={
            "recipe/ours": ratio("recipe", "ours"),
            "ours/webdataset": ratio("ours", "webdataset"),
            "recipe/ours, threads": ratio(recipe_processes, threads),
            "ours/webdataset, threads": ratio(threads, webdataset_processes),
            "recipe/ours, processes": ratio(recipe_processes, processes),
            "ours/webdataset, processes": ratio(processes, webdataset_processes),
        },
        image_bytes=manifest.size_bytes // manifest.num_samples,
        num_images=manifest.num_samples,
        rounds=rounds,
        images_per_round=batches * BATCH,
    )


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


def describe(result: Result, source: str) -> str:
    lines = [
        f"{result.num_images} pictures ({source}), {result.image_bytes:,} bytes each; "
        f"{result.rounds} rounds of {result.images_per_round} images",
        f"{'':26}{'CPU ms':>10}{'wall ms':>10}   per image",
    ]
    cpu, wall = result.cpu_ms_per_image, result.wall_ms_per_image
    lines += [f"{name:26}{cpu[name]:10.3f}{wall[name]:10.3f}" for name in cpu]
    lines += [f"{name:40}{value:6.2f}" for name, value in result.ratios.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
