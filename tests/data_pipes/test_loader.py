"""The loader over real shards: one sequence of samples, whatever the ranks, workers, batches, stops and bad samples."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipes.batch import Batch, BatchPlan
from data_pipes.config import DataConfig
from data_pipes.decode.tiff import import_tifffile
from data_pipes.errors import BadDataError, ShardError
from data_pipes.loader import Loader
from data_pipes.loading.dataset import Request, SampleDataset
from data_pipes.loading.quarantine import BadSample, Quarantine
from data_pipes.open import open_dataset
from data_pipes.order.order import OrderConfig
from data_pipes.shards.collection import Place
from data_pipes.shards.reader import RawSample
from data_pipes.transforms.image import TrainTransform
from data_pipes.transforms.recipe import ImageRecipe
from tests.data_pipes.tiny_shards import jpeg_header, picture, png_header, write_shards

SHARDS = (5, 23, 31, 2)
NUM_SAMPLES = sum(SHARDS)
ORDER = OrderConfig(seed=3, streams=3, run=2, window=8, chunk_bytes=12_000)
BAD = {
    7: {"png": picture(7)[:60], "cls": b"0"},
    20: {"png": png_header(60_000, 60_000), "cls": b"6"},
    21: {"jpg": jpeg_header(60_000, 60_000), "cls": b"0"},
    33: {"png": picture(33), "cls": b"five"},
    40: {"txt": b"no picture", "cls": b"5"},
    50: {"png": picture(50), "cls": b"7"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("good"), SHARDS).root


@pytest.fixture(scope="module")
def bad_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    classes = [f"class {i}" for i in range(7)]
    return write_shards(tmp_path_factory.mktemp("bad"), SHARDS, BAD, classes).root


def config_for(folder: Path, **fields: object) -> DataConfig:
    return DataConfig(**{"train": str(folder), "order": ORDER, "max_bad_fraction": 1.0, **fields})


def open_tiny(config: DataConfig, state: dict[str, object] | None = None) -> SampleDataset:
    return open_dataset(config, image_size=(8, 8), channels=3, global_batch=24, state=state)


def steps(
    config: DataConfig, world_size: int, global_batch: int, micro_batch: int, position: int, num_steps: int
) -> Iterator[tuple[list[str], list[torch.Tensor]]]:
    """(keys, images) of whole global batches, put together from all ranks in the order of their positions."""
    loaders = [
        Loader(open_tiny(config), BatchPlan(global_batch, micro_batch, rank, world_size), config)
        for rank in range(world_size)
    ]
    try:
        streams = [loader.batches(position) for loader in loaders]
        for step in range(num_steps):
            batches = [batch for stream in streams for batch in islice(stream, loaders[0].plan.accumulate)]
            first = position + step * global_batch
            assert torch.cat([batch.positions for batch in batches]).tolist() == list(
                range(first, first + global_batch)
            )
            assert {len(batch.keys) for batch in batches} == {micro_batch}
            yield [key for batch in batches for key in batch.keys], [image for b in batches for image in b.images]
    finally:
        for loader in loaders:
            loader.close()


@pytest.fixture(scope="module")
def truth(folder: Path) -> tuple[list[str], list[torch.Tensor]]:
    """Keys and images of two and a half epochs, one position at a time."""
    return reference_items(folder)


def reference_items(folder: Path) -> tuple[list[str], list[torch.Tensor]]:
    dataset = open_tiny(config_for(folder))
    items = [dataset.item(position) for position in range(NUM_SAMPLES * 5 // 2)]
    return [key for _, _, key in items], [image for image, _, _ in items]


def test_each_epoch_is_a_permutation(truth: tuple[list[str], list[torch.Tensor]]) -> None:
    keys, _ = truth
    everything = [f"{number:06d}" for number in range(NUM_SAMPLES)]
    assert sorted(keys[:NUM_SAMPLES]) == sorted(keys[NUM_SAMPLES : 2 * NUM_SAMPLES]) == everything
    assert keys[:NUM_SAMPLES] != keys[NUM_SAMPLES : 2 * NUM_SAMPLES] != everything


# (global batch, micro-batch, steps): the global batch changes in the middle of the epoch of 61 samples, twice
SCHEDULE = ((12, 3, 3), (24, 6, 1), (4, 1, 6), (8, 2, 5))


def run_schedule(config: DataConfig, world_size: int) -> tuple[list[str], list[torch.Tensor]]:
    keys, images, position = [], [], 0
    for global_batch, micro_batch, num_steps in SCHEDULE:
        for more_keys, more_images in steps(config, world_size, global_batch, micro_batch, position, num_steps):
            keys += more_keys
            images += more_images
            position += global_batch
    return keys, images


TOPOLOGIES = [(r, w, "thread") for r in (1, 2, 4) for w in (0, 1, 3)] + [
    pytest.param(r, w, "process", marks=[pytest.mark.distributed, *([] if (r, w) == (1, 1) else [pytest.mark.slow])])
    for r in (1, 2, 4)
    for w in (1, 3)
]


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # three workers on two cores, on purpose
@pytest.mark.parametrize(("world_size", "workers", "kind"), TOPOLOGIES)
def test_one_sequence_on_every_topology(
    folder: Path, truth: tuple[list[str], list[torch.Tensor]], world_size: int, workers: int, kind: str
) -> None:
    keys, images = run_schedule(config_for(folder, workers=workers, worker_kind=kind), world_size)
    assert keys == truth[0][: len(keys)]
    assert len(keys) == 124 > 2 * NUM_SAMPLES
    assert all(torch.equal(a, b) for a, b in zip(images, truth[1], strict=False))


@pytest.mark.parametrize(
    ("world_size", "workers", "kind"),
    [
        (1, 3, "thread"),
        (4, 1, "thread"),
        pytest.param(2, 2, "process", marks=[pytest.mark.distributed, pytest.mark.slow]),
    ],
)
def test_bad_samples_change_no_topology(
    bad_folder: Path, folder: Path, tmp_path: Path, world_size: int, workers: int, kind: str
) -> None:
    expected_keys, expected_images = reference_items(bad_folder)
    good_keys, _ = reference_items(folder)
    keys, images = run_schedule(config_for(bad_folder, workers=workers, worker_kind=kind), world_size)
    assert keys == expected_keys[: len(keys)]
    assert all(torch.equal(a, b) for a, b in zip(images, expected_images, strict=False))
    bad_keys = {f"{number:06d}" for number in BAD}
    for key, good in zip(keys, good_keys, strict=False):
        assert (key == good) is (good not in bad_keys)  # only bad samples are replaced, all of them, in their places


def test_resume_at_every_step_on_any_topology(folder: Path, truth: tuple[list[str], list[torch.Tensor]]) -> None:
    topologies = [(1, 12, 3, 0), (2, 8, 2, 3), (4, 4, 1, 1), (3, 6, 2, 2), (1, 24, 24, 1)]
    keys: list[str] = []
    position, number = 0, 0
    while position < 2 * NUM_SAMPLES:  # stop after every single step, and resume elsewhere from the JSON state
        world_size, global_batch, micro_batch, workers = topologies[number % len(topologies)]
        config = config_for(folder, workers=workers)
        state = json.loads(json.dumps(open_tiny(config).order.state(position)))
        position = open_tiny(config, state).order.state(state["position"])["position"]
        (more, _) = next(iter(steps(config, world_size, global_batch, micro_batch, position, 1)))
        keys += more
        position += global_batch
        number += 1
    assert keys == truth[0][: len(keys)]


def test_prefetched_batches_do_not_count(bad_folder: Path) -> None:
    config = config_for(bad_folder, workers=3, prefetch=4)
    loader = Loader(open_tiny(config), BatchPlan(4, 4), config)
    next(loader.batches(0))
    assert loader.bad.num_seen == 4
    loader.close()


def test_undecided_streams_are_kept_when_the_batch_changes(folder: Path) -> None:
    config = config_for(folder, order=OrderConfig(window=4, run=2))
    first = open_dataset(config, image_size=(8, 8), channels=3, global_batch=4)
    again = open_dataset(config, image_size=(8, 8), channels=3, global_batch=999, state=first.order.state(17))
    assert again.order.config == first.order.config
    with pytest.raises(ValueError, match=r"seed is 0 in the checkpoint and 1 now"):
        open_dataset(
            config_for(folder, order=OrderConfig(seed=1)),
            image_size=(8, 8),
            channels=3,
            global_batch=4,
            state=first.order.state(17),
        )


def test_epochs_are_augmented_differently(folder: Path, tmp_path: Path) -> None:
    lonely = open_tiny(config_for(write_shards(tmp_path, [1]).root))  # the same place in every epoch
    assert not torch.equal(lonely.item(0)[0], lonely.item(1)[0])
    dataset = open_tiny(config_for(folder))
    by_key: dict[str, list[torch.Tensor]] = {}
    for position in range(2 * NUM_SAMPLES):
        image, label, key = dataset.item(position)
        assert label == int(key) % 7
        by_key.setdefault(key, []).append(image)
    assert sum(torch.equal(one, other) for one, other in by_key.values()) <= 2


def test_batches_are_what_the_contract_says(folder: Path) -> None:
    config = config_for(folder)
    batch = next(Loader(open_tiny(config), BatchPlan(12, 3, 1, 2), config).batches(24))
    assert batch.images.shape == (3, 3, 8, 8)
    assert batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.to(torch.device("cpu")).images.is_contiguous()
    assert batch.labels.dtype == batch.positions.dtype == torch.int64
    assert batch.positions.tolist() == [30, 31, 32]


def test_every_bad_sample_is_counted_and_written_once(bad_folder: Path, tmp_path: Path) -> None:
    for _ in range(2):  # the second loader continues the file of the first
        config = config_for(bad_folder)
        loader = Loader(open_tiny(config), BatchPlan(NUM_SAMPLES, NUM_SAMPLES), config, quarantine_dir=tmp_path / "q")
        list(islice(loader.batches(0), 3))
        assert loader.bad.num_seen == 3 * NUM_SAMPLES
        assert loader.bad.num_bad == 3 * len(BAD)
        assert set(loader.bad.by_cause) == {"decode", "pixels", "label", "no_image"}
        assert loader.bad.by_cause["pixels"] >= 6
    lines = [json.loads(line) for line in (tmp_path / "q" / "rank00000.jsonl").read_text().splitlines()]
    assert sorted(line["key"] for line in lines) == [f"{number:06d}" for number in sorted(BAD)]
    by_key = {line["key"]: line for line in lines}
    assert by_key["000033"]["shard"] == "shard-000002.tar"
    assert "'five'" in by_key["000033"]["error"]
    assert "expected 0 to 6" in by_key["000050"]["error"]
    assert "60,000" in by_key["000020"]["error"] or "60000" in by_key["000020"]["error"]
    assert by_key["000040"]["cause"] == "no_image"


@pytest.mark.parametrize(("workers", "kind"), [(0, "thread"), (2, "thread"), (2, "process")])
def test_too_many_bad_samples_stop_the_run(bad_folder: Path, workers: int, kind: str) -> None:
    config = config_for(bad_folder, workers=workers, worker_kind=kind, max_bad_fraction=0.05)
    loader = Loader(open_tiny(config), BatchPlan(4, 4), config)
    with pytest.raises(
        BadDataError, match=r"4 of the first \d+ samples of this run are bad .*max_bad_fraction = 0\.05"
    ):
        list(islice(loader.batches(0), 100))
    loader.close()
    lenient = config_for(bad_folder, max_bad_fraction=0.2)
    list(islice(Loader(open_tiny(lenient), BatchPlan(4, 4), lenient).batches(0), 60))


@pytest.mark.parametrize(("workers", "kind"), [(0, "thread"), (2, "thread"), (1, "process")])
def test_a_data_set_of_bad_samples_stops_at_once(tmp_path: Path, workers: int, kind: str) -> None:
    folder = write_shards(tmp_path, [30], {number: {"jpg": b"\xff\xd8\xff junk"} for number in range(30)}).root
    config = config_for(folder, workers=workers, worker_kind=kind)
    loader = Loader(open_tiny(config), BatchPlan(4, 2), config, quarantine_dir=tmp_path / "q")
    with pytest.raises(BadDataError, match=r"position 0 and 16 substitutes are all bad.*shard-000000\.tar"):
        next(loader.batches(0))
    assert (tmp_path / "q" / "rank00000.jsonl").read_text().count("\n") > 5
    loader.close()


def test_the_limit_is_judged_over_enough_samples() -> None:
    bad = [BadSample("s", "k", "decode", "broken", 0)]
    quarantine = Quarantine(None, 0.01, num_samples=10**6)
    for _ in range(10):
        quarantine.record(5, bad)  # 10 of 50, but not yet more than 1% of 1,000
    with pytest.raises(BadDataError, match="11 of the first 55"):
        quarantine.record(5, bad)
    strict = Quarantine(None, 0.0, num_samples=10**6)
    strict.record(100, [])
    with pytest.raises(BadDataError, match=r"1 of the first 101 .*decode: 1"):
        strict.record(1, bad)
    with pytest.raises(ValueError, match="max_bad_fraction is 2"):
        Quarantine(None, 2, 5)


@pytest.mark.parametrize(("workers", "kind"), [(0, "thread"), (2, "thread"), (2, "process")])
def test_a_changed_shard_stops_the_run(tmp_path: Path, workers: int, kind: str) -> None:
    manifest = write_shards(tmp_path, [6, 6])
    path = manifest.shard_path(1)
    path.write_bytes(path.read_bytes() + bytes(512))
    config = config_for(tmp_path, workers=workers, worker_kind=kind)
    loader = Loader(open_tiny(config), BatchPlan(12, 12), config)
    with pytest.raises(ShardError, match=r"shard-000001\.tar: .* bytes, the manifest says"):
        next(loader.batches(0))
    loader.close()


class Broken(ImageRecipe):
    """A recipe with a defect."""

    def __call__(self, raw: RawSample, uniforms: Sequence[float]) -> torch.Tensor:
        raise ZeroDivisionError("defect")


@pytest.mark.parametrize(("workers", "kind"), [(0, "thread"), (2, "thread"), (1, "process")])
def test_a_defect_names_the_sample(folder: Path, workers: int, kind: str) -> None:
    config = config_for(folder, workers=workers, worker_kind=kind)
    dataset = open_tiny(config)
    first_key = dataset.item(0)[2]
    dataset.recipe = Broken(TrainTransform((8, 8)))
    loader = Loader(dataset, BatchPlan(4, 4), config)
    with pytest.raises(ZeroDivisionError, match="defect") as caught:
        next(loader.batches(0))
    text = str(caught.value) + "".join(getattr(caught.value, "__notes__", []))
    assert f"while loading {first_key} of " in text
    assert "shard-00000" in text
    loader.close()


@pytest.mark.distributed
def test_a_dead_worker_is_an_error(folder: Path) -> None:
    config = config_for(folder, workers=2, worker_kind="process", prefetch=1)
    before = set(multiprocessing.active_children())
    loader = Loader(open_tiny(config), BatchPlan(4, 4), config)
    batches = loader.batches(0)
    next(batches)
    for child in set(multiprocessing.active_children()) - before:
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="a data worker process died"):
        list(islice(batches, 50))
    loader.close()


@pytest.mark.distributed
def test_close_stops_processes_and_keeps_the_generator(folder: Path) -> None:
    config = config_for(folder, workers=2, worker_kind="process")
    before = set(multiprocessing.active_children())
    loader = Loader(open_tiny(config), BatchPlan(4, 4), config)
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    next(loader.batches(0))
    assert torch.equal(torch.rand(2), expected)  # starting workers draws nothing from the trainer's generator
    assert len(set(multiprocessing.active_children()) - before) == 2
    loader.close()
    assert set(multiprocessing.active_children()) <= before
    assert next(loader.batches(8)).positions.tolist() == [8, 9, 10, 11]
    loader.close()


def test_close_stops_threads_and_restores_their_number(folder: Path) -> None:
    config = config_for(folder, workers=3)
    dataset = open_tiny(config)
    counts: list[int] = []
    load = dataset.load
    dataset.load = lambda request: (counts.append(torch.get_num_threads()), load(request))[1]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        loader = Loader(dataset, BatchPlan(4, 4), config)
        abandoned = loader.batches(40)
        next(abandoned)
        list(islice(loader.batches(0), 5))  # stops the workers of the first call
        with pytest.raises(StopIteration):
            next(abandoned)
        assert sum(thread.name.startswith("data") for thread in threading.enumerate()) == 3
        assert set(counts) == {1}
        assert torch.get_num_threads() == 2
        loader.close()
    finally:
        torch.set_num_threads(before)
    assert not any(thread.name.startswith("data") for thread in threading.enumerate())


def test_16_bit_data(tmp_path: Path) -> None:
    file = io.BytesIO()
    np.save(file, np.full((9, 9), 40_000, np.uint16))
    folder = write_shards(tmp_path, [4], {1: {"npy": file.getvalue()}}).root
    config = config_for(folder, bit_depth=16)
    dataset = open_tiny(config)
    images = {key: image for image, _, key in (dataset.item(position) for position in range(4))}
    assert {image.dtype for image in images.values()} == {torch.uint16}
    assert images["000001"].float().unique().tolist() == [40_000]
    assert images["000000"].float().max() > 10_000  # 8-bit pictures are widened
    narrow = open_tiny(config_for(folder)).load(Request(np.array([0]), [Place(0, 1)]))
    assert [sample.cause for sample in narrow.bad] == ["bit_depth"]


def test_timings_are_counted(folder: Path) -> None:
    config = config_for(folder)
    loader = Loader(open_tiny(config), BatchPlan(8, 8), config)
    next(loader.batches(0))
    sums = loader.counters.take()
    assert min(sums["read_s"], sums["decode_s"], sums["bytes_used"]) > 0
    assert sums["samples_loaded"] == 8


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ((10, 4, 0, 1), r"global_batch 10 is not a multiple of ranks x micro_batch = 1 x 4 = 4; .*: 8 and 12"),
        ((2, 4, 0, 2), r"the nearest that are: 8$"),
        ((8, 4, 2, 2), "rank 2 of 2"),
        ((8, 0, 0, 2), "micro_batch 0"),
    ],
)
def test_wrong_plans(plan: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchPlan(*plan)


def test_plan_divides_a_step() -> None:
    plans = [BatchPlan(24, 3, rank, 2) for rank in (0, 1)]
    assert plans[0].accumulate == 4
    assert list(islice(plans[0].micro_batch_starts(100), 5)) == [100, 103, 106, 109, 124]
    assert list(islice(plans[1].micro_batch_starts(100), 5)) == [112, 115, 118, 121, 136]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train": ""}, r"data\.train is missing"),
        ({"train": "???"}, r"data\.train is missing"),
        ({"max_pixels": 10**9}, "PIL reads at most"),
        ({"bit_depth": 12}, r"data\.bit_depth is 12"),
        ({"flip": 2.0}, r"data\.flip"),
    ],
)
def test_wrong_settings(folder: Path, fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_tiny(config_for(folder, **fields))


@pytest.mark.parametrize("fields", [{"workers": -1}, {"prefetch": 0, "workers": 1}, {"worker_kind": "x", "workers": 1}])
def test_wrong_workers(folder: Path, fields: dict[str, object]) -> None:
    config = config_for(folder, **fields)
    with pytest.raises(ValueError, match=r"data\.(workers|worker_kind)"):
        Loader(open_tiny(config), BatchPlan(4, 4), config)


def test_pinned_batches() -> None:
    if not torch.cuda.is_available():
        pytest.skip("page-locked memory needs CUDA")
    batch = Batch(torch.zeros(1, 1, 2, 2), torch.zeros(1), torch.zeros(1), ["k"]).pin_memory()
    assert batch.images.is_pinned()


def test_tiffs_without_what_reads_them_end_a_run_at_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(file, "TIFF")
    samples = {5: {"tif": file.getvalue(), "cls": b"0"}}
    late, early = (
        write_shards(tmp_path / "late", [5, 5], samples).root,
        write_shards(tmp_path / "early", [9], samples).root,
    )
    open_tiny(config_for(early))
    import_tifffile.cache_clear()
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    with pytest.raises(ValueError, match=r"shard-000000\.tar: has TIFFs; .* pip install 'tessera-pretrain\[tiff\]'"):
        open_tiny(config_for(early))
    loader = Loader(open_tiny(config_for(late)), BatchPlan(10, 10), config_for(late))
    with pytest.raises(ImportError, match=r"tessera-pretrain\[tiff\]"):
        next(iter(loader.batches(0)))
