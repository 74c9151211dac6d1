"""The copy that blocks the loop: what may be copied, that its memory is used again, and how long it takes."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

import pretrain.checkpoint.write as write_module
from pretrain.checkpoint.checkpoints import Checkpoints
from pretrain.checkpoint.config import CheckpointConfig
from pretrain.checkpoint.errors import CheckpointError
from pretrain.checkpoint.open_folder import open_folder
from pretrain.checkpoint.read import load_weights
from pretrain.checkpoint.saver import Saver
from pretrain.parallel.world import World
from tests.process_server import ProcessServer

WORLD = World(0, 1, 0, torch.device("cpu"), None, None)
CONFIG = "name: run\n"


class Boxes:
    """A (4, 6) parameter as two boxes of a flat buffer: DCP's checkpointable protocol, and no tensor."""

    def __init__(self, flat: torch.Tensor) -> None:
        self.flat, self.shape, self.dtype, self.device = flat, torch.Size((4, 6)), flat.dtype, flat.device
        self.boxes = {(0, 0): flat[:12].view(2, 6), (2, 0): flat[12:].view(2, 6)}

    def __create_write_items__(self, name: str, value: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.flat)
        return [
            WriteItem(
                MetadataIndex(name, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offset), box.shape) for offset, box in self.boxes.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None
        return self.boxes[tuple(index.offset)]


def test_plain_tensors_and_objects_of_the_protocol_are_each_others(tmp_path: Path) -> None:
    """Boxes of a flat buffer are saved and read as a plain tensor, and back; odd dtypes and sizes come along."""
    whole = torch.arange(24.0).view(4, 6)
    others = {
        "half": torch.arange(7, dtype=torch.bfloat16),
        "flags": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "strided": torch.arange(12.0).view(3, 4).t(),
    }
    saver = Saver(Checkpoints(tmp_path, CheckpointConfig(), WORLD))
    flat = torch.arange(24.0)
    saver.save(1, {"model.m": {"weight": Boxes(flat), **others}}, {"position": 1}, CONFIG)
    flat.fill_(-1.0)  # the next step comes
    saver.wait()
    loaded = load_weights(open_folder(tmp_path / "checkpoints" / "step-00000001"), "m")
    assert torch.equal(loaded["weight"], whole)
    assert {name: (t.dtype, t.shape) for name, t in loaded.items() if name != "weight"} == {
        name: (t.dtype, t.shape) for name, t in others.items()
    }
    assert all(torch.equal(loaded[name], other) for name, other in others.items())
    saver.save(2, {"model.m": {"weight": whole}}, {"position": 2}, CONFIG)
    saver.wait()
    target = Boxes(torch.zeros(24))
    saver.checkpoints.load(open_folder(tmp_path / "checkpoints" / "step-00000002"), {"model.m": {"weight": target}})
    assert torch.equal(target.flat.view(4, 6), whole)


def test_the_memory_is_used_again(tmp_path: Path) -> None:
    """One copy, laid out once; another structure gets another one in its place."""
    state = {"model.m": {"weight": torch.zeros(50_000), "bias": torch.zeros(3)}}
    saver = Saver(Checkpoints(tmp_path, CheckpointConfig(), WORLD))
    saver.reserve(state)
    buffer = saver._buffer
    places = set()
    for step in range(1, 4):
        saver.save(step, state, {"position": step}, CONFIG)
        saver.wait()
        places.add(buffer._memory.data_ptr())
    assert len(places) == 1
    assert buffer.size_bytes == 200_064
    state["ema.m"] = {"weight": torch.ones(50_000)}
    saver.save(4, state, {"position": 4}, CONFIG)
    saver.wait()
    assert buffer.size_bytes == 400_064
    assert load_weights(open_folder(tmp_path / "checkpoints" / "step-00000004"), "m", ema=True)["weight"].min() == 1.0
    saver.close()
    assert buffer.size_bytes == 0


def test_a_sharding_that_changed_is_not_broadcast(tmp_path: Path) -> None:
    boxes = Boxes(torch.arange(24.0))
    saver = Saver(Checkpoints(tmp_path, CheckpointConfig(), WORLD))
    saver.reserve({"model.m": {"weight": boxes}})
    boxes.boxes[(0, 0)] = boxes.flat[:6]
    with pytest.raises(CheckpointError, match="sharding must not change"):
        saver.save(1, {"model.m": {"weight": boxes}}, {"position": 1}, CONFIG)


def test_the_loop_is_blocked_for_the_copy_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written before the loop goes on; `tools/bench_engine.py` prints how long the copy takes."""
    goes_on, write_pieces = threading.Event(), write_module._write_pieces

    def held(*arguments: Any) -> Any:
        assert goes_on.wait(60), "the loop waits for what is written"
        return write_pieces(*arguments)

    monkeypatch.setattr(write_module, "_write_pieces", held)
    state = {"model.m": {f"w{index}": torch.randn(1_000_000) for index in range(16)}}
    saver = Saver(Checkpoints(tmp_path, CheckpointConfig(), WORLD))
    saver.reserve(state)
    for step in (1, 2):
        goes_on.clear()
        saver.save(step, state, {"position": step}, CONFIG)
        goes_on.set()
        saver.wait()
    stats = saver.stats()
    assert stats["checkpoint/bytes"] > 64e6
    assert stats["checkpoint/save_s"] > 0


@pytest.mark.distributed
def test_shards_of_two_ranks(tmp_path: Path, process_server: ProcessServer) -> None:
    """DTensors and replicas on 2 ranks are saved as one checkpoint, each piece by one rank, and are read by one."""
    process_server.run_ranks(2, "tests.pretrain.checkpoint.shards:main", str(tmp_path))
    loaded = load_weights(open_folder(tmp_path / "checkpoints" / "step-00000001"), "m")
    assert torch.equal(loaded["sharded"], torch.arange(35.0).view(7, 5))
    assert torch.equal(loaded["replica"], torch.arange(100.0))
