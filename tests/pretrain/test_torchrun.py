"""The start itself: ranks that torchrun starts do what the forked ones of all other tests do."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pretrain.runs import CONFIG, assert_same_weights, losses, overrides_of, run_several, torchrun
from tests.process_server import ENVIRONMENT, ProcessServer
from tests.processes import run_to_end


@pytest.mark.distributed
def test_torchrun_starts_the_same_run(tiny_dataset: Path, tmp_path: Path, process_server: ProcessServer) -> None:
    """To the bit, with processes that hash strings with seeds of their own."""

    def run(name: str) -> list[str]:
        return overrides_of(tiny_dataset, tmp_path, name, "train.steps=6", "parallel.strategy=fsdp2")

    done = run_to_end(torchrun(2, "-m", "pretrain", str(CONFIG), *run("started")), env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-4000:]
    run_several(process_server, 2, [run("forked")])
    assert losses(tmp_path / "started") == losses(tmp_path / "forked")
    assert len(losses(tmp_path / "forked")) == 6
    assert_same_weights(tmp_path / "started", tmp_path / "forked")
