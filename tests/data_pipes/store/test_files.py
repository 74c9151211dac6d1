"""Files of a file system: reads in pieces."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_pipes.store.files import LocalFile


def test_a_read_that_comes_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_bytes(bytes(range(100)))
    source = LocalFile(tmp_path / "f")
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda handle, length, offset: pread(handle, min(length, 7), offset))
    assert source.read(10, 50) == bytes(range(10, 60))
    assert source.read(90, 50) == bytes(range(90, 100))
    assert source.size() == 100
