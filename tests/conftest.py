"""Fixtures of the whole suite: real data where it is at hand, and one thread per process (tests run side by side).

Under pytest-xdist a file is run by one worker, so that what its tests share is made once; files with tests of several
processes, the longest, come first. Nothing else knows of other workers: each has its own folders, servers and ports.
"""

from __future__ import annotations

import gc
import importlib.util
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.process_server import DEEPSPEED_RUNS, RUNS, ProcessServer

ROOT = Path(__file__).resolve().parent.parent
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
DISTRIBUTED_TIMEOUT_S = 1800
"""Of a test of several processes, which share the cores with others."""
SHARE_DEEPSPEED = {
    "tests/faults/test_kills.py",
    "tests/pretrain/parallel/test_deepspeed.py",
    "tests/pretrain/parallel/test_two_players.py",
}
"""Files that one worker runs, so that DeepSpeed is imported once."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of several processes may take longer than others. Beside other workers, their files come first."""
    distributed = [item for item in items if item.get_closest_marker("distributed")]
    for item in distributed:
        if not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(DISTRIBUTED_TIMEOUT_S))
    if hasattr(config, "workerinput"):
        first = {item.path for item in distributed}
        items.sort(key=lambda item: item.path not in first)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Gives each worker a whole file at a time, in the order of the collection."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "deepspeed" if file in SHARE_DEEPSPEED else file

    config.option.loadscopereorder = False
    return ByFile(config, log)


_collected_before: dict[str, Path] = {}


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Takes what the suite has imported out of the garbage collections that each training makes, 0.6 s of a core each.

    A training ends with everything thawed. What is garbage by then is collected once per file.
    """
    if gc.get_freeze_count() == 0:
        if _collected_before.get("file") != item.path:
            gc.collect()
            _collected_before["file"] = item.path
        gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    import torch

    torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real pictures beside the repository; tests that need it skip where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data beside the repository ({folder.name}/ with cifar10_*.zip and photos_300.zip)")
    return folder


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """61 grey pictures of 8 x 8 pixels in 3 shards, written by stock webdataset and indexed."""
    import numpy as np
    import webdataset as wds
    from PIL import Image

    from data_pipes.index.index import index_shards

    folder = tmp_path_factory.mktemp("tiny") / "train"
    folder.mkdir()
    generator = np.random.Generator(np.random.PCG64(0))
    for shard in range(3):
        with wds.TarWriter(str(folder / f"shard-{shard:06d}.tar")) as writer:
            for index in range(shard, 61, 3):
                rows = np.linspace(0, 255, 8)[:, None] * generator.random() + generator.integers(0, 60, (8, 8))
                file = io.BytesIO()
                Image.fromarray(rows.clip(0, 255).astype(np.uint8)).save(file, "PNG")
                writer.write({"__key__": f"{index:04d}", "png": file.getvalue(), "cls": str(index % 4).encode()})
    index_shards(sorted(folder.glob("*.tar")), folder, classes=("a", "b", "c", "d"))
    return folder


@pytest.fixture(scope="session")
def process_server() -> Iterator[ProcessServer]:
    """Forks the processes of all tests that have several; started by the first of them."""
    with ProcessServer(*RUNS) as started:
        yield started


@pytest.fixture(scope="session")
def deepspeed_server() -> Iterator[ProcessServer]:
    """As `process_server`, with DeepSpeed imported."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs the extra deepspeed")
    with ProcessServer(*DEEPSPEED_RUNS) as started:
        yield started
