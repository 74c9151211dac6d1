"""`tessera cache` as a user calls it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from data_pipes.cache.cache import PINNED, ChunkCache, chunk_key
from data_pipes.cache.folder import CacheConfig
from launchers import cli


@pytest.fixture(autouse=True)
def _known_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "COMMANDS", (*(name for name in cli.COMMANDS if name != "cache"), "cache"))


def test_status_and_clear(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "cache"
    cache = ChunkCache(CacheConfig(str(folder), 64 << 20))
    keys = [chunk_key("s3://b/0.tar", "e", 1 << 30, i << 20, 1 << 20) for i in range(3)]
    for key, next_use_s in zip(keys, (PINNED, 100.0, math.inf), strict=True):
        assert cache.put(key, bytes(1 << 20), next_use_s)

    assert cli.main(["cache", "status", str(folder), "--json"]) == 0
    printed = capsys.readouterr()
    status = json.loads(printed.out)
    assert status["num_chunks"] == 3
    assert status["num_pinned"] == 1
    assert 3 << 20 <= status["chunk_bytes"] < status["used_bytes"] < 64 << 20
    assert [(user["max_bytes"], user["num_claims"]) for user in status["users"]] == [(64 << 20, 2)]
    assert f"{folder}: 3 chunks, 3.2 MB, 1 of them in use; 0 being written; 1 processes use it" in printed.err
    assert "cap 67.1 MB, needs 2 of the chunks again" in printed.err

    cache.close()
    assert cli.main(["cache", "clear", str(folder), "--json"]) == 0
    printed = capsys.readouterr()
    cleared = json.loads(printed.out)
    assert (cleared["freed_bytes"], cleared["num_chunks"], cleared["users"]) == (status["chunk_bytes"], 0, [])
    assert "freed; 0 chunks, 0 bytes, 0 of them in use; 0 being written; no process uses it" in printed.err
    assert not cache.contains(keys[0])


@pytest.mark.parametrize("action", ["status", "clear"])
def test_a_folder_that_is_no_cache_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], action: str
) -> None:
    (tmp_path / "photo.jpg").touch()
    assert cli.main(["cache", action, str(tmp_path)]) == 2
    assert "it holds other things, e.g. 'photo.jpg'" in capsys.readouterr().err
    assert cli.main(["cache", action, str(tmp_path / "none")]) == 2
    assert "no cache here; name the folder that a run has as data.cache.dir" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]
