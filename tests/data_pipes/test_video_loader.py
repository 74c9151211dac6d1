"""Videos through the loader: exact resume and elastic order with repeats; every kind of broken file in one set."""

from __future__ import annotations

import gc
import json
import re
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import webdataset

from data_pipes.batch import BatchPlan
from data_pipes.config import DataConfig
from data_pipes.errors import BadDataError
from data_pipes.index.index import index_shards
from data_pipes.loader import Loader
from data_pipes.open import open_dataset
from data_pipes.order.order import OrderConfig
from data_pipes.transforms.clip_sampling import ClipSampling
from tests.data_pipes.tiny_videos import encode, pictures, rotated, sound, video

ORDER = OrderConfig(seed=3, streams=2, run=2, window=8, chunk_bytes=60_000)
SAMPLING = ClipSampling(4, 2, repeats=2)
MAX_PIXELS = 1 << 16


def write(folder: Path, members: list[dict[str, bytes]], per_shard: int) -> Path:
    folder.mkdir(exist_ok=True)
    paths = []
    for first in range(0, len(members), per_shard):
        paths.append(folder / f"shard-{first // per_shard:06d}.tar")
        with webdataset.TarWriter(str(paths[-1])) as writer:
            for number, sample in enumerate(members[first : first + per_shard], first):
                writer.write({"__key__": f"{number:03d}", **sample, "cls": str(number % 3).encode()})
    index_shards(paths, folder, ["a", "b", "c"])
    return folder


def config_for(folder: Path, **fields: object) -> DataConfig:
    known = {"train": str(folder), "order": ORDER, "video": SAMPLING, "max_bad_fraction": 1.0, "max_pixels": MAX_PIXELS}
    return DataConfig(**{**known, **fields})  # type: ignore[arg-type]


def load(
    config: DataConfig, num_steps: int, *, world_size: int = 1, micro_batch: int = 2, start: int = 0
) -> tuple[list[str], list[torch.Tensor], list[Loader]]:
    """Keys and clips of whole steps of 4 videos, put together from all ranks in the order of their positions."""
    loaders = [
        Loader(
            open_dataset(config, image_size=(16, 16), channels=3, global_batch=4),
            BatchPlan(4, micro_batch, rank, world_size),
            config,
        )
        for rank in range(world_size)
    ]
    keys, clips = [], []
    try:
        streams = [loader.batches(start) for loader in loaders]
        for step in range(num_steps):
            batches = [batch for stream in streams for batch in islice(stream, loaders[0].plan.accumulate)]
            positions = torch.cat([batch.positions for batch in batches]).tolist()
            assert positions == list(range(start + 4 * step, start + 4 * step + 4))
            keys += [key for batch in batches for key in batch.keys]
            clips += [clip.clone() for batch in batches for clip in batch.images]
    finally:
        for loader in loaders:
            loader.close()
    return keys, clips, loaders


def assert_same(
    found: tuple[list[str], list[torch.Tensor], object], keys: list[str], clips: list[torch.Tensor]
) -> None:
    assert found[0] == keys
    assert all(torch.equal(a, b) for a, b in zip(found[1], clips, strict=True))


# --- order and resume, with repeats


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("good"), [{"mp4": video(10 + number)} for number in range(14)], 5)


@pytest.mark.parametrize(
    ("sampling", "fields"),
    [
        (SAMPLING, {}),
        (ClipSampling(4, 2, repeats=3, shared_window=True), {"crop": "multi_scale", "interpolation": "bicubic"}),
    ],
    ids=["own windows", "crops of one window"],
)
def test_one_order_of_clips_whatever_loads_them(good: Path, sampling: ClipSampling, fields: dict[str, object]) -> None:
    keys, clips, _ = load(config_for(good, video=sampling, **fields), 5)
    assert sorted(keys[:14]) == [f"{number:03d}" for number in range(14)]  # two steps into the second epoch
    assert clips[0].shape == (sampling.repeats, 3, 4, 16, 16)
    assert not torch.equal(clips[0][0], clips[0][1]), "the repeats are the same clip"
    for world_size, micro_batch, workers in ((2, 1, 2), (1, 4, 3)):
        config = config_for(good, video=sampling, workers=workers, **fields)
        assert_same(load(config, 5, world_size=world_size, micro_batch=micro_batch), keys, clips)


def test_resume_is_exact_from_every_step_and_on_other_ranks(good: Path) -> None:
    keys, clips, _ = load(config_for(good), 6)
    for step in range(1, 6):
        world_size, micro_batch = ((1, 2), (2, 1), (2, 2))[step % 3]
        found = load(config_for(good), 6 - step, world_size=world_size, micro_batch=micro_batch, start=4 * step)
        assert_same(found, keys[4 * step :], clips[4 * step :])


# --- settings


def test_settings_of_the_crop_reach_the_clips(good: Path) -> None:
    def recipe(**fields: object) -> object:
        return open_dataset(config_for(good, **fields), image_size=(16, 16), channels=3, global_batch=4).recipe

    transform = recipe(crop="multi_scale", interpolation="bicubic", flip=0.0).transform  # type: ignore[attr-defined]
    assert (transform.crop, transform.interpolation, transform.flip) == ("multi_scale", "bicubic", 0.0)
    default = recipe().transform  # type: ignore[attr-defined]
    assert (default.crop, default.interpolation, default.scale) == ("random", "bilinear", (0.2, 1.0))
    with pytest.raises(ValueError, match=r"data\.crop_scale is \(0\.5, 1\.0\), and data\.crop is multi_scale"):
        recipe(crop="multi_scale", crop_scale=(0.5, 1.0))
    with pytest.raises(ValueError, match="the crop of clips is 'centre'"):
        recipe(crop="centre")
    for fields in ({"crop": "multi_scale"}, {"interpolation": "bilinear"}):
        with pytest.raises(ValueError, match="the data are pictures: expected random and bicubic"):
            recipe(video=None, **fields)
    with pytest.raises(ValueError, match=r"no sample has a picture; .*these are videos: see data\.video"):
        recipe(video=None, interpolation="bicubic")


# --- every kind of broken file in one shard set


def without_index(data: bytes) -> bytes:
    """The mp4 of a recorder that was switched off: frames, and no `moov` box that says where they are."""
    place = data.index(b"moov") - 4
    return data[:place] + data[place + int.from_bytes(data[place : place + 4], "big") :]


def shortened(data: bytes) -> bytes:
    """Frames are gone, and the last box says that this is all."""
    place = data.index(b"mdat") - 4
    cut = data[: place + 4000]
    return cut[:place] + struct.pack(">I", len(cut) - place) + cut[place + 4 :]


def damaged(data: bytes) -> bytes:
    """Random bytes in place of all frames but the first few."""
    kept = data.index(b"mdat") + 4 + (len(data) - data.index(b"mdat")) // 4
    return data[:kept] + np.random.default_rng(0).bytes(len(data) - kept)


def huge(data: bytes) -> bytes:
    """A motion JPEG whose frames declare 60,000 x 60,000 pixels."""
    out = bytearray(data)
    for place in [match.start() for match in re.finditer(b"\xff\xc0", data)]:
        out[place + 5 : place + 9] = struct.pack(">HH", 60_000, 60_000)
    return bytes(out)


@lru_cache
def corpus() -> tuple[tuple[dict[str, bytes], str | None], ...]:
    """(members, cause; None for a good one), 38 of them."""
    whole = video(30, b_frames=0, gop=30)
    mjpeg = video(4, "avi", "mjpeg", pix_fmt="yuvj420p")
    kinds = (
        ({"mp4": video(20)}, None),
        ({"mp4": video(20)[:-700]}, "video"),  # truncated
        ({"mp4": shortened(whole)}, "video"),
        ({"mp4": sound()}, "no_video"),
        ({"mp4": b""}, "video"),
        ({"mp4": b"<html>404 Not Found</html>" * 9}, "video"),
        ({"mp4": without_index(whole)}, "video"),
        ({"webm": video(20, "webm", "libvpx")}, None),
        ({"mp4": damaged(whole)}, "frames"),
        ({"mp4": encode(pictures(8), [0, 40, 80, 400, 440, 1000, 1040, 1080], b_frames=0)}, None),  # irregular times
        ({"mp4": rotated(video(20), 1)}, None),
        ({"mp4": video(1)}, None),  # one frame
        ({"avi": huge(mjpeg)}, "frames"),
        ({"mp4": video(4, size=(272, 256))}, "pixels"),  # 69,632 of at most 65,536
        ({"avi": encode(pictures(4), None, "avi", "flv")}, "codec"),
        ({"mp4": b"ffconcat version 1.0\nfile /etc/passwd\n"}, "video"),
        ({"txt": b"a sample without a video"}, "no_video"),
        ({"mp4": video(12, options=(("x264-params", "open-gop=1"),))}, None),
        ({"avi": video(20, "avi", "mpeg4", b_frames=2)}, None),  # no times of presentation
    )
    # the order replaces a broken sample by a neighbour: good ones lie between, as in any data set worth training on
    return tuple(pair for number, kind in enumerate(kinds) for pair in (kind, ({"mp4": video(10 + number)}, None)))


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("broken"), [members for members, _ in corpus()], 7)


STEPS = 19
"""Of 4 videos: two epochs."""


def expected_keys(folder: Path) -> Iterator[str | None]:
    """The key at each position of the order, None where that sample is broken."""
    dataset = open_dataset(config_for(folder), image_size=(16, 16), channels=3, global_batch=4)
    for place in dataset.request(np.arange(4 * STEPS)).places:
        number = 7 * place.shard + place.sample
        yield None if corpus()[number][1] else f"{number:03d}"


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 2)])
def test_every_kind_of_broken_file(broken: Path, world_size: int, workers: int) -> None:
    config = config_for(broken, workers=workers)
    before = threading.active_count()
    keys, clips, loaders = load(config, STEPS, world_size=world_size)
    expected = list(expected_keys(broken))
    assert [key for key, wanted in zip(keys, expected, strict=True) if wanted] == [key for key in expected if key]
    causes = {f"{number:03d}": cause for number, (_, cause) in enumerate(corpus())}
    assert all(causes[key] is None for key in keys), "a broken file was delivered"
    assert all(clip.float().std() > 5 for clip in clips)
    found: Counter[str] = Counter()
    for loader in loaders:
        found.update(loader.bad.by_cause)
        assert loader.bad.num_seen == 4 * STEPS // world_size
    in_order = Counter(cause for cause in causes.values() if cause)
    assert set(found) == set(in_order) == {"video", "no_video", "frames", "pixels", "codec"}
    assert all(found[cause] >= 2 * count for cause, count in in_order.items())
    assert sum(loader.bad.num_bad for loader in loaders) == expected.count(None)
    assert threading.active_count() <= before, "a worker is left behind"
    assert keys == load(config_for(broken), STEPS)[0]


def test_broken_files_are_written_down_with_their_cause(broken: Path, tmp_path: Path) -> None:
    config = config_for(broken)
    dataset = open_dataset(config, image_size=(16, 16), channels=3, global_batch=4)
    with_notes = Loader(dataset, BatchPlan(4, 4), config, quarantine_dir=tmp_path)
    list(islice(with_notes.batches(0), STEPS))
    with_notes.close()
    lines = [json.loads(line) for line in (tmp_path / "rank00000.jsonl").read_text().splitlines()]
    causes = {f"{number:03d}": cause for number, (_, cause) in enumerate(corpus()) if cause}
    assert {line["key"]: line["cause"] for line in lines} == causes
    assert len(lines) == len(causes)
    strict = config_for(broken, max_bad_fraction=0.1)
    loader = Loader(open_dataset(strict, image_size=(16, 16), channels=3, global_batch=4), BatchPlan(4, 4), strict)
    with pytest.raises(BadDataError, match=r"samples of this run are bad \(.*video: \d+"):
        list(islice(loader.batches(0), STEPS))
    loader.close()


def test_broken_files_leave_neither_memory_nor_files_behind(broken: Path) -> None:
    config = config_for(broken)
    dataset = open_dataset(config, image_size=(16, 16), channels=3, global_batch=4)
    process = psutil.Process()

    def epochs(count: int) -> None:
        for position in range(38 * count):
            dataset.item(position)

    epochs(2)
    gc.collect()  # what other tests left
    before, files = process.memory_info().rss, process.num_fds()
    epochs(5)
    assert process.memory_info().rss - before < 12 << 20
    assert process.num_fds() <= files
