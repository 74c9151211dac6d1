"""The journal survives kills, full disks and non-finite numbers, and its curves leave superseded points out."""

import errno
import json
import math
import os
import threading
from pathlib import Path

import pytest

from pretrain.tracking.journal import JOURNAL_NAME, JournalWriter, read_journal, read_lines, read_metrics


def write_metrics(run_dir: Path, *points: tuple[int, float], name: str = "train/loss") -> None:
    writer = JournalWriter(run_dir / JOURNAL_NAME)
    for step, value in points:
        writer.append("metrics", {"step": step, "metrics": {name: value}})
    writer.close()


def test_every_record_is_in_the_file_before_append_returns(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path / "run" / JOURNAL_NAME)
    writer.append("tags", {"tags": {"who": "größe <&>\n"}}, time_ms=5)
    assert list(read_journal(tmp_path / "run")) == [{"time_ms": 5, "type": "tags", "tags": {"who": "größe <&>\n"}}]
    writer.flush_to_disk()
    writer.close()
    writer.close()
    with pytest.raises(ValueError, match="was closed"):
        writer.append("tags", {"tags": {}})


def test_non_finite_values_come_back_and_lines_stay_strict_json(tmp_path: Path) -> None:
    write_metrics(tmp_path, (1, math.nan), (2, math.inf), (3, -math.inf), (4, 0.1))
    values = [point.value for point in read_metrics(tmp_path)["train/loss"]]
    assert math.isnan(values[0])
    assert values[1:] == [math.inf, -math.inf, 0.1]

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    for line in (tmp_path / JOURNAL_NAME).read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_torn_last_line_is_ignored_and_the_next_writer_starts_on_a_fresh_one(tmp_path: Path) -> None:
    write_metrics(tmp_path, (1, 1.0), (2, 2.0))
    journal = tmp_path / JOURNAL_NAME
    whole = journal.read_bytes()
    for cut in range(len(whole.splitlines()[0]) + 2, len(whole) - 1):
        journal.write_bytes(whole[:cut])
        assert [point.step for point in read_metrics(tmp_path)["train/loss"]] == [1]
        assert len(list(read_lines(journal))) == 1, "a torn line must not be passed by whoever reads on from an offset"
        write_metrics(tmp_path, (3, 3.0))
        assert [point.step for point in read_metrics(tmp_path)["train/loss"]] == [1, 3]


def test_offsets_lead_from_line_to_line_past_damage(tmp_path: Path) -> None:
    write_metrics(tmp_path, (1, 1.0))
    journal = tmp_path / JOURNAL_NAME
    with journal.open("ab") as file:
        file.write(b"\0\0\0\n[1]\n\xff\xfe\n" + b'{"no": "type"}\n')
    write_metrics(tmp_path, (2, 2.0))
    lines = list(read_lines(journal))
    assert [record is None for record, _ in lines] == [False, True, True, True, True, False]
    assert list(read_lines(journal, lines[0][1])) == lines[1:]
    assert lines[-1][1] == journal.stat().st_size


def test_a_resume_supersedes_later_points_and_a_step_counts_once(tmp_path: Path) -> None:
    write_metrics(tmp_path, (10, 1.0), (20, 2.0), (30, 3.0), (40, 4.0))
    write_metrics(tmp_path, (40, 9.0), name="only/later")
    writer = JournalWriter(tmp_path / JOURNAL_NAME)
    writer.append("resume", {"step": 20})
    writer.close()
    write_metrics(tmp_path, (20, 2.5), (30, 3.5))
    curves = read_metrics(tmp_path)
    assert [(point.step, point.value) for point in curves["train/loss"]] == [(10, 1.0), (20, 2.5), (30, 3.5)]
    assert "only/later" not in curves


def test_threads_never_mix_their_lines(tmp_path: Path) -> None:
    writers = [JournalWriter(tmp_path / JOURNAL_NAME) for _ in range(2)]

    def log(index: int) -> None:
        for step in range(200):
            writers[index % 2].append("metrics", {"step": step, "metrics": {f"m{index}": 1.0}})

    threads = [threading.Thread(target=log, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for writer in writers:
        writer.close()
    assert {name: len(points) for name, points in read_metrics(tmp_path).items()} == {f"m{i}": 200 for i in range(4)}


def test_a_full_disk_delays_lines_and_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    writer, real_write, free_bytes = JournalWriter(tmp_path / JOURNAL_NAME), os.write, [100]

    def write_until_full(descriptor: int, data: bytes) -> int:
        if free_bytes[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        num_written = real_write(descriptor, data[: free_bytes[0]])
        free_bytes[0] -= num_written
        return num_written

    monkeypatch.setattr(os, "write", write_until_full)
    for step in range(5):
        writer.append("metrics", {"step": step, "metrics": {"loss": 1.0}})
    assert len(read_metrics(tmp_path)["loss"]) < 5
    assert len(caplog.records) == 1
    with pytest.raises(OSError, match="No space left"):
        writer.flush_to_disk()
    free_bytes[0] = 10**6
    writer.flush_to_disk()
    assert [point.step for point in read_metrics(tmp_path)["loss"]] == [0, 1, 2, 3, 4]
    writer.close()
