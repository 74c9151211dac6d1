"""The watchdog's parts without processes: what a beat costs, what is published, who is to blame."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from pretrain.parallel.world import World, pick_device
from pretrain.signals import StopRequest
from pretrain.watchdog.config import LIMIT_OF, WatchdogConfig
from pretrain.watchdog.heartbeats import Heartbeat, publish, read_heartbeats, slowness, verdicts_on
from pretrain.watchdog.report import Report, all_stacks, report_stacks, report_table
from pretrain.watchdog.watchdog import Watchdog
from tests.processes import wait_until

ALONE = World(0, 1, 0, pick_device("cpu"), None, None)
HOST = socket.gethostname()
HERE = Heartbeat(
    attempt="now",
    rank=0,
    host=HOST,
    pid=os.getpid(),
    process_created_s=psutil.Process().create_time(),
    sequence=1,
    phase="step",
    step=7,
    idle_s=100.0,
    limit_s=50.0,
    beat_time_s=1e9,
    local_step_s=0.010,
    waits=True,
    ended=None,
)


def _order(*heartbeats: Heartbeat, silent: frozenset[int] = frozenset()) -> list[tuple[int, str]]:
    by_rank = {rank: replace(heartbeat, rank=rank) for rank, heartbeat in enumerate(heartbeats)}
    verdicts = verdicts_on(by_rank, len(heartbeats), host=HOST, silent=set(silent), slow_factor=2.0)
    return [(verdict.rank, verdict.kind) for verdict in verdicts]


def test_a_beat_costs_less_than_20_us(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path, ALONE, WatchdogConfig(enabled=False))
    costs_s = []
    for _ in range(20):
        begin = time.thread_time()  # other work on the cores does not count
        for step in range(200):
            watchdog.beat("data", step)
            watchdog.beat("forward", step)
        costs_s.append((time.thread_time() - begin) / 400)
    assert min(costs_s) < 20e-6


def test_it_publishes_where_the_rank_stands_and_that_it_left(tmp_path: Path) -> None:
    with Watchdog(tmp_path, ALONE, WatchdogConfig(interval_s=0.01)) as watchdog:
        for step in range(3):
            watchdog.beat("data", step)
            watchdog.beat("step", step)
        watchdog.beat("save", 3)

        def published() -> Heartbeat | None:
            return read_heartbeats(watchdog.folder, 1, watchdog.attempt).get(0)

        wait_until(
            lambda: (heartbeat := published()) is not None and heartbeat.phase == "save", "a heartbeat of the save"
        )
        heartbeat = published()
        assert heartbeat is not None
        assert (heartbeat.step, heartbeat.ended, heartbeat.pid) == (3, None, os.getpid())
    assert read_heartbeats(watchdog.folder, 1, watchdog.attempt)[0].ended == "left"
    assert read_heartbeats(watchdog.folder, 1, "another start") == {}


def test_a_failure_is_published(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path, ALONE, WatchdogConfig())
    with pytest.raises(RuntimeError, match="broke"), watchdog:
        raise RuntimeError("it broke")
    assert read_heartbeats(watchdog.folder, 1, watchdog.attempt)[0].ended == "failed: RuntimeError: it broke"


def test_the_first_step_of_a_start_has_its_own_limit(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path, ALONE, WatchdogConfig(enabled=False))
    places = []
    for phase, step in (("data", 40), ("forward", 40), ("save", 41), ("data", 41)):
        watchdog.beat(phase, step)
        places.append(watchdog._place[0])
    assert places == ["first_step", "first_step", "save", "data"]


def test_after_a_phase_comes_the_rest_of_the_step_and_an_error_stays_where_it_was_raised(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path, ALONE, WatchdogConfig(enabled=False))
    watchdog.beat("data", 0)
    with watchdog.phase("data", 3):
        assert watchdog._place[:2] == ("data", 3)
    assert watchdog._place[:2] == ("step", 3)
    with pytest.raises(RuntimeError, match="broke"), watchdog.phase("save", 3):
        raise RuntimeError("it broke")
    assert watchdog._place[:2] == ("save", 3)


def test_a_rank_that_works_alone_longer_than_the_others_is_slow() -> None:
    heartbeats = {
        rank: replace(HERE, rank=rank, local_step_s=seconds) for rank, seconds in enumerate((0.01, 0.03, 0.011))
    }
    assert slowness(heartbeats)[1] == pytest.approx(0.03 / 0.0105)
    assert slowness({0: HERE}) == {}


def test_own_work_is_counted_per_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_ns = 0
    monkeypatch.setattr("pretrain.watchdog.watchdog.time.monotonic_ns", lambda: now_ns)
    watchdog = Watchdog(tmp_path, ALONE, WatchdogConfig(enabled=False))
    for step in range(4):
        watchdog.beat("data", step)
        now_ns += 20_000_000
        watchdog.beat("step", step)
        now_ns += 50_000_000
    watchdog.beat("data", 4)
    watchdog._measure()
    assert watchdog._local_step_s == pytest.approx(0.02)


def test_verdicts_name_the_likeliest_culprit_first() -> None:
    gone = replace(HERE, process_created_s=1.0)
    elsewhere = replace(HERE, host="another")
    in_data = replace(HERE, phase="data", waits=False)
    left = replace(HERE, ended="left")
    assert _order(HERE, gone, in_data) == [(1, "killed"), (2, "hung"), (0, "waits")]
    assert _order(HERE, elsewhere, silent=frozenset({1})) == [(1, "silent"), (0, "waits")]
    assert _order(HERE, replace(HERE, step=6)) == [(1, "waits"), (0, "waits")]
    assert _order(left, replace(HERE, idle_s=1.0)) == [(1, "working"), (0, "left")]
    slow = replace(HERE, idle_s=1.0, local_step_s=0.05)
    assert _order(slow, HERE, HERE)[0] == (0, "slow")


def test_a_rank_that_never_published_is_named() -> None:
    verdicts = verdicts_on({1: replace(HERE, rank=1)}, 2, host=HOST, silent=set(), slow_factor=2.0)
    assert (verdicts[0].rank, verdicts[0].text) == (0, "never published where it stands")
    table = report_table("why", verdicts)
    assert table.splitlines()[0] == "why"
    assert "2001-09-09 01:46:40" in table
    assert "no stacks" in report_stacks(verdicts, {1: "stack\n"})


def test_one_rank_writes_the_report(tmp_path: Path) -> None:
    reports = [Report(tmp_path / "start", rank) for rank in range(2)]
    assert not reports[0].is_claimed()
    for report in reports:
        report.add_stacks(f"stacks of {report.rank}")
    assert [report.claim() for report in reports] == [True, False]
    assert reports[1].is_claimed()
    verdicts = verdicts_on(
        {rank: replace(HERE, rank=rank) for rank in range(2)}, 2, host=HOST, silent=set(), slow_factor=2
    )
    reports[0].write("cause", verdicts)
    text = reports[1].path.read_text()
    assert text.index("stacks of 0") < text.index("stacks of 1")


def test_stacks_show_this_line() -> None:
    assert "test_stacks_show_this_line" in all_stacks().split("\n\n")[0]


def test_a_disk_that_refuses_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "watchdog").write_text("a file where the folder should be")
    with Watchdog(tmp_path, ALONE, WatchdogConfig(interval_s=0.01)) as watchdog:
        wait_until(lambda: "cannot publish" in caplog.text, "a warning")
        time.sleep(0.1)  # for more attempts, which say nothing
        watchdog.beat("data", 0)
    assert sum("cannot publish" in record.message for record in caplog.records) == 1


def test_half_a_file_is_no_stand(tmp_path: Path) -> None:
    publish(tmp_path, HERE)
    assert read_heartbeats(tmp_path, 1, "now") == {0: HERE}
    (tmp_path / "rank00000.json").write_text('{"attempt": "now"')
    assert read_heartbeats(tmp_path, 1, "now") == {}


def test_limits_are_checked() -> None:
    assert {WatchdogConfig().limit_s(phase) for phase in LIMIT_OF} <= {600.0, 1800.0}
    assert WatchdogConfig(step_timeout_s=5000.0).longest_later_s == 5000.0
    with pytest.raises(ValueError, match=r"watchdog.step_timeout_s is 0"):
        WatchdogConfig(step_timeout_s=0)
    with pytest.raises(ValueError, match="slow_factor"):
        WatchdogConfig(slow_factor=1.0)


def test_the_launcher_is_known_from_the_beginning() -> None:
    assert StopRequest().launcher_pid == os.getppid()
