"""Files of a file system: written in one step, locked, read in pieces."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from data_pipes.store.files import LocalFile, exclusive, new_file, write_atomically

BUSY = RuntimeError("somebody else has it")


def test_a_read_that_comes_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_bytes(bytes(range(100)))
    source = LocalFile(tmp_path / "f")
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda handle, length, offset: pread(handle, min(length, 7), offset))
    assert source.read(10, 50) == bytes(range(10, 60))
    assert source.read(90, 50) == bytes(range(90, 100))
    assert source.size() == 100


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "f"
    write_atomically(path, b"old")

    def interrupted() -> None:
        with new_file(path) as draft:
            draft.file.write(b"new")
            draft.file.flush()
            assert (draft.path.read_bytes(), path.read_bytes()) == (b"new", b"old")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [child.name for child in path.parent.iterdir()] == ["f"]
    assert path.read_bytes() == b"old"
    with new_file(path) as draft:
        draft.keep = False
    assert [child.read_bytes() for child in path.parent.iterdir()] == [b"old"]
    with new_file(path) as draft:
        draft.file.write(b"new")
    assert [child.read_bytes() for child in path.parent.iterdir()] == [b"new"]


def test_content_is_on_the_disk_before_it_has_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append("replace"), replace(old, new)))
    write_atomically(tmp_path / "a", b"data")
    write_atomically(tmp_path / "b", b"data", durable=False)
    assert done == ["fsync", "replace", "replace"]
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no space")))
    with pytest.raises(OSError, match="no space"):
        write_atomically(tmp_path / "a", b"more")
    assert sorted(child.read_bytes() for child in tmp_path.iterdir()) == [b"data", b"data"]


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    with exclusive(tmp_path / "lock", 0, BUSY):
        with pytest.raises(RuntimeError, match="somebody else"), exclusive(tmp_path / "lock", 0, BUSY):
            pass
        failed: list[bool] = []

        def other_thread() -> None:
            with pytest.raises(RuntimeError), exclusive(tmp_path / "lock", 0.1, BUSY):
                pass
            failed.append(True)

        thread = threading.Thread(target=other_thread)
        thread.start()
        thread.join()
        assert failed == [True]
    with exclusive(tmp_path / "lock", 0, BUSY), open(tmp_path / "lock", "rb") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_killed_holder_leaves_nothing_behind(tmp_path: Path) -> None:
    """Not even where it had forked a child that lives on."""
    program = f"""
import os, time
from pathlib import Path
from data_pipes.store.files import exclusive
with exclusive(Path({str(tmp_path / "lock")!r}), 0, RuntimeError()):
    child = os.fork()
    if child == 0:
        time.sleep(60)
    print(child, flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        try:
            with pytest.raises(RuntimeError), exclusive(tmp_path / "lock", 0, BUSY):
                pass
            holder.kill()
            holder.wait()
            with exclusive(tmp_path / "lock", 5, BUSY):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def test_without_locks_the_work_is_done_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
        monkeypatch.setattr(fcntl, "flock", lambda *_, number=number: (_ for _ in ()).throw(OSError(number, "none")))
        done = []
        with exclusive(tmp_path / "lock", 0, BUSY):
            done.append(number)
        assert done
    with pytest.raises(FileNotFoundError), exclusive(tmp_path / "no folder" / "lock", 0, BUSY):
        pass
