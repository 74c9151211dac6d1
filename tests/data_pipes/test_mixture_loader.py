"""A mixture through the loader: one sequence, whatever the ranks and stops, and labels that mean the same."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from dataclasses import replace

import pytest
import torch

from data_pipes.batch import BatchPlan
from data_pipes.config import DataConfig
from data_pipes.loader import Loader
from data_pipes.open import open_dataset
from data_pipes.order.mixture_config import MixtureConfig, SourceConfig, WeightChange
from data_pipes.order.order import OrderConfig
from tests.data_pipes.tiny_shards import picture, write_shards

GLOBAL_BATCH = 24
STEPS = 20
CLASSES = {"photos": [f"photo {i}" for i in range(7)], "web": [f"web {i}" for i in range(6)] + ["photo 0"], "small": []}
Row = tuple[int, str, int, int, int]
"""Position, key, source, label, sum of the pixels."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Three sources: 103, 41 and 5 samples, with classes, with others, without; one sample is bad."""
    root = tmp_path_factory.mktemp("mixture")
    bad = {3: {"png": picture(3)[:60], "cls": b"0"}}
    for (name, classes), shards in zip(CLASSES.items(), ((50, 53), (41,), (5,)), strict=True):
        write_shards(root / name, shards, bad if name == "photos" else None, classes)
    sources = [SourceConfig(str(root / name), weight) for name, weight in zip(CLASSES, (5.0, 3.0, 2.0), strict=True)]
    mixture = MixtureConfig(sources, [WeightChange(10 * GLOBAL_BATCH, [1.0, 3.0, 0.0])])
    order = OrderConfig(seed=7, run=2, window=16, chunk_bytes=6_000)
    return DataConfig(mixture=mixture, order=order, max_bad_fraction=1.0)


def loader_for(config: DataConfig, rank: int = 0, size: int = 1, state: dict[str, object] | None = None) -> Loader:
    dataset = open_dataset(config, image_size=(8, 8), channels=3, global_batch=GLOBAL_BATCH, state=state)
    return Loader(dataset, BatchPlan(GLOBAL_BATCH, GLOBAL_BATCH // size, rank, size), config, pin_memory=False)


def rows(loader: Loader, num_steps: int, position: int) -> list[Row]:
    found: list[Row] = []
    with closing(loader):
        batches = loader.batches(position)
        for _ in range(num_steps):
            batch = next(batches)
            assert batch.sources is not None
            sums = batch.images.sum((1, 2, 3)).tolist()
            columns = (batch.positions.tolist(), batch.keys, batch.sources.tolist(), batch.labels.tolist(), sums)
            found += zip(*columns, strict=True)
    return found


def test_resumed_on_2_3_and_1_ranks_it_is_the_sequence_of_one_process(config: DataConfig) -> None:
    expected = rows(loader_for(config), STEPS, 0)
    found: list[Row] = []
    position, state = 0, None
    for size, num_steps, workers, kind in ((2, 5, 0, "thread"), (3, 7, 2, "thread"), (1, 8, 1, "process")):
        here = replace(config, workers=workers, worker_kind=kind)  # type: ignore[arg-type]
        loaders = [loader_for(here, rank, size, state) for rank in range(size)]
        for loader in loaders:
            found += rows(loader, num_steps, position)
        position += num_steps * GLOBAL_BATCH
        state = loaders[0].state(position)
    assert sorted(found) == expected
    assert {row[0] for row in expected} == set(range(STEPS * GLOBAL_BATCH))


def test_the_shares_are_the_wanted_ones_before_and_after_the_change(config: DataConfig) -> None:
    found = rows(loader_for(config), STEPS, 0)
    before = Counter(row[2] for row in found if row[0] < 10 * GLOBAL_BATCH)
    after = Counter(row[2] for row in found if row[0] >= 10 * GLOBAL_BATCH)
    assert [before[source] / (10 * GLOBAL_BATCH) for source in range(3)] == pytest.approx([0.5, 0.3, 0.2], abs=0.05)
    assert [after[source] / (10 * GLOBAL_BATCH) for source in range(3)] == pytest.approx([0.25, 0.75, 0], abs=0.05)
    loader = loader_for(config)
    assert loader.wanted_shares(0) == pytest.approx([0.5, 0.3, 0.2])
    assert loader.wanted_shares(10 * GLOBAL_BATCH) == pytest.approx([0.25, 0.75, 0])
    with closing(loader):
        batches = loader.batches(0)
        for _ in range(3):
            next(batches)
    counted = loader.counters.take()
    assert [counted[f"source_{number}"] for number in range(3)] == [
        Counter(row[2] for row in found[: 3 * GLOBAL_BATCH])[number] for number in range(3)
    ]


def test_labels_of_several_sources_share_one_list(config: DataConfig) -> None:
    loader = loader_for(config)
    classes = loader.dataset.collection.classes
    assert classes == (*CLASSES["photos"], *CLASSES["web"][:6])  # "photo 0" of both is one class
    for _, key, source, label, _ in rows(loader, STEPS, 0):
        own = int(key) % 7  # as tiny_shards labels
        assert label == (-1 if source == 2 else classes.index(list(CLASSES.values())[source][own]))


def test_a_bad_sample_is_replaced_from_its_own_source(config: DataConfig) -> None:
    loader = loader_for(config)
    found = rows(loader, STEPS, 0)
    assert loader.bad.num_bad > 0
    wanted = loader.dataset.order.locate(torch.arange(STEPS * GLOBAL_BATCH).numpy()).source.tolist()
    assert [row[2] for row in found] == wanted
    assert not any(key == "000003" and source == 0 for _, key, source, _, _ in found)


def test_a_resumed_mixture_with_another_past_is_refused(config: DataConfig) -> None:
    state = loader_for(config).state(5 * GLOBAL_BATCH)
    assert config.mixture is not None
    later = replace(config.mixture, schedule=[WeightChange(8 * GLOBAL_BATCH, [1.0, 1.0, 1.0])])
    loader_for(replace(config, mixture=later), state=state)  # the future may change
    past = replace(config.mixture, schedule=[WeightChange(4 * GLOBAL_BATCH, [1.0, 1.0, 1.0])])
    with pytest.raises(ValueError, match="weights"):
        loader_for(replace(config, mixture=past), state=state)
