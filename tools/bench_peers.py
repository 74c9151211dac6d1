"""The loaders that bench_data.py compares, each over a copy of the same pictures in its own format.

Every variant does the same work: read, decode, RandomResizedCrop 224 bicubic with antialias, flip, shuffled batches.
`recipe` is the usual way, PIL + torchvision in float32 with ToTensor and Normalize; `transforms` is ours, on the stored
bytes. A peer that is not installed is left out, with a line that says so.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import simplejpeg
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from data_pipes.batch import BatchPlan
from data_pipes.config import DataConfig
from data_pipes.index.index import index_shards
from data_pipes.loader import Loader
from data_pipes.loading.dataset import SampleDataset
from data_pipes.open import open_dataset
from data_pipes.order.hashing import hash_uniform
from data_pipes.shards.members import encoded_picture
from data_pipes.shards.reader import RawSample
from data_pipes.transforms.image import TrainTransform
from data_pipes.transforms.recipe import ImageRecipe, Recipe

SIZE, SCALE, BATCH, PREFETCH = 224, (0.2, 1.0), 32, 2
Run = Callable[[int], Iterator[object]]
"""From a round's number to its batches."""
Transform = Callable[[bytes], torch.Tensor]


class OurTransforms:
    """From stored bytes to uint8 [3, 224, 224]."""

    def __init__(self) -> None:
        self.transform, self.count = TrainTransform((SIZE, SIZE), SCALE), 0

    def __call__(self, data: bytes) -> torch.Tensor:
        self.count += 1
        uniforms = hash_uniform(0, [self.count], 0, self.transform.num_uniforms)[0].tolist()
        return self.transform.load(data, uniforms, channels=3)


class UsualRecipe:
    """From stored bytes to float32 [3, 224, 224], as training scripts have it."""

    def __init__(self) -> None:
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(SIZE, SCALE, interpolation=transforms.InterpolationMode.BICUBIC),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )

    def __call__(self, data: bytes) -> torch.Tensor:
        image: torch.Tensor = self.transform(Image.open(io.BytesIO(data)).convert("RGB"))
        return image


class UsualInOurs(Recipe):
    """The usual recipe inside our loader."""

    extensions, num_uniforms, shape, dtype = ("jpg",), 1, (3, SIZE, SIZE), torch.float32

    def __init__(self) -> None:
        self.transform = UsualRecipe()

    def __call__(self, raw: RawSample, uniforms: Sequence[float]) -> torch.Tensor:
        return self.transform(encoded_picture(raw))


TRANSFORMS: dict[str, Callable[[], Transform]] = {"transforms": OurTransforms, "recipe": UsualRecipe}


def decode_alone(pictures: list[bytes]) -> dict[str, Run]:
    """A full decode of each picture to RGB in this thread, and nothing else."""

    def run(number: int) -> Iterator[object]:
        endless = itertools.cycle(pictures)
        while True:
            yield [simplejpeg.decode_jpeg(data, "RGB").shape for data in itertools.islice(endless, BATCH)]

    return {"decode alone": run}


def ours(folder: Path, pictures: list[bytes], workers: int) -> dict[str, Run]:
    """Our loader, over shards of webdataset's writer."""
    manifest = index_shards(write_shards(folder, pictures), folder)

    def variant(count: int, kind: str, recipe: Recipe) -> Run:
        config = DataConfig(train=str(folder), workers=count, worker_kind=kind, prefetch=PREFETCH, crop_scale=SCALE)  # type: ignore[arg-type]
        order = open_dataset(config, image_size=(SIZE, SIZE), channels=3, global_batch=BATCH).order
        dataset = SampleDataset(manifest, order, recipe)

        def run(number: int) -> Iterator[object]:
            with closing(Loader(dataset, BatchPlan(BATCH, BATCH), config)) as loader:
                yield from loader.batches(number * 64 * BATCH)

        return run

    made = ImageRecipe(TrainTransform((SIZE, SIZE), SCALE))
    return {
        "ours": variant(0, "thread", made),
        "ours, recipe": variant(0, "thread", UsualInOurs()),
        f"ours, {workers} threads": variant(workers, "thread", made),
        f"ours, {workers} processes": variant(workers, "process", made),
        f"ours, recipe, {workers} threads": variant(workers, "thread", UsualInOurs()),
        f"ours, recipe, {workers} processes": variant(workers, "process", UsualInOurs()),
    }


def imagefolder(folder: Path, pictures: list[bytes], workers: int) -> dict[str, Run]:
    """torchvision's ImageFolder and torch's DataLoader, over one file a picture."""
    for number, data in enumerate(pictures):
        path = folder / str(number % 10) / f"{number:06d}.jpg"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(data)

    def variant(transform: Transform, count: int) -> Run:
        dataset = datasets.ImageFolder(str(folder), transform=transform, loader=lambda path: Path(path).read_bytes())
        return lambda number: iter(torch_loader(dataset, count, shuffle=True))

    return for_all(variant, "imagefolder", workers)


def stock_webdataset(folder: Path, pictures: list[bytes], workers: int) -> dict[str, Run]:
    """Stock webdataset and its WebLoader: its tar reader, its shuffle."""
    urls = [str(path) for path in write_shards(folder, pictures)]

    def variant(transform: Transform, count: int) -> Run:
        def decode(sample: dict[str, Any]) -> tuple[torch.Tensor, int]:
            return transform(sample["jpg"]), int(sample["cls"])

        def run(number: int) -> Iterator[object]:
            data = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=number, empty_check=False).shuffle(100)
            data = data.map(decode).batched(BATCH, partial=False).repeat()
            prefetch = {"prefetch_factor": PREFETCH} if count else {}
            return iter(webdataset.WebLoader(data, batch_size=None, num_workers=count, **prefetch))

        return run

    return for_all(variant, "webdataset", workers)


def litdata(folder: Path, pictures: list[bytes], workers: int) -> dict[str, Run]:
    """litdata's StreamingDataset and StreamingDataLoader, over its own chunks."""
    import litdata as package
    from litdata.streaming.cache import Cache

    cache = Cache(str(folder), chunk_bytes=64 << 20)
    for number, data in enumerate(pictures):
        cache[number] = {"jpg": data, "cls": 0}
    cache.done()
    cache.merge()

    def variant(transform: Transform, count: int) -> Run:
        class Pictures(package.StreamingDataset):  # type: ignore[misc]
            def __getitem__(self, index: Any) -> tuple[torch.Tensor, int]:
                sample = super().__getitem__(index)
                return transform(bytes(sample["jpg"])), sample["cls"]  # stored as a memoryview

        def run(number: int) -> Iterator[object]:
            dataset = Pictures(str(folder), shuffle=True, seed=number, drop_last=True)
            prefetch = {"prefetch_factor": PREFETCH} if count else {}
            return iter(package.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=count, **prefetch))

        return run

    return for_all(variant, "litdata", workers)


def mosaic(folder: Path, pictures: list[bytes], workers: int) -> dict[str, Run]:
    """mosaicml-streaming's StreamingDataset in torch's DataLoader, over its own shards."""
    import streaming

    with streaming.MDSWriter(out=str(folder), columns={"jpg": "bytes", "cls": "int"}) as writer:
        for data in pictures:
            writer.write({"jpg": data, "cls": 0})

    def variant(transform: Transform, count: int) -> Run:
        class Pictures(streaming.StreamingDataset):  # type: ignore[misc]
            def __getitem__(self, index: Any) -> tuple[torch.Tensor, int]:
                sample = super().__getitem__(index)
                return transform(sample["jpg"]), sample["cls"]

        def run(number: int) -> Iterator[object]:
            streaming.base.util.clean_stale_shared_memory()
            dataset = Pictures(local=str(folder), shuffle=True, shuffle_seed=number, batch_size=BATCH)
            return iter(torch_loader(dataset, count))

        return run

    return for_all(variant, "mosaic", workers)


PEERS = {"imagefolder": imagefolder, "webdataset": stock_webdataset, "litdata": litdata, "mosaic": mosaic}


def make_variants(folder: Path, pictures: list[bytes], workers: int, peers: Sequence[str]) -> dict[str, Run]:
    """Writes the data sets below `folder`; prints a line for each peer that is not installed."""
    runs = decode_alone(pictures) | ours(new_folder(folder, "ours"), pictures, workers)
    for name in peers:
        try:
            runs |= PEERS[name](new_folder(folder, name), pictures, workers)
        except ImportError as error:
            print(
                f"{name} is left out: {error}. It does not install beside transformers 5; in an environment of its own:"
                " pip install -e '.[peers]'"
            )
    return runs


def for_all(variant: Callable[[Transform, int], Run], name: str, workers: int) -> dict[str, Run]:
    return {
        f"{name}, {label}" + (f", {count} processes" if count else ""): variant(make(), count)
        for count in (0, workers)
        for label, make in TRANSFORMS.items()
    }


def torch_loader(dataset: Any, count: int, shuffle: bool = False) -> DataLoader[Any]:
    prefetch = {"prefetch_factor": PREFETCH} if count else {}
    return DataLoader(dataset, BATCH, shuffle, num_workers=count, drop_last=True, **prefetch)  # type: ignore[arg-type]


def new_folder(folder: Path, name: str) -> Path:
    (folder / name).mkdir(parents=True)
    return folder / name


def write_shards(folder: Path, pictures: list[bytes]) -> list[Path]:
    """100 pictures to a shard, by webdataset's writer."""
    paths: list[Path] = []
    with webdataset.ShardWriter(
        f"{folder}/shard-%06d.tar", maxcount=100, verbose=0, post=lambda name: paths.append(Path(name))
    ) as writer:
        for number, data in enumerate(pictures):
            writer.write({"__key__": f"{number:06d}", "jpg": data, "cls": "0"})
    return paths
