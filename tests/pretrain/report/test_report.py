"""The report is one self-contained page for every state a run can be in."""

import argparse
import html.parser
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from launchers.commands import report as report_command
from pretrain.report.curves import MAX_COLUMNS, format_value, line_chart
from pretrain.report.picture_strips import save_films, save_pictures
from pretrain.report.report import build_report, collect
from pretrain.report.rows import MAX_FILMS, MAX_PICTURES
from pretrain.tracking.journal import JournalWriter, now_ms


def write_run(run_dir: Path) -> None:
    """A finished run of 400 steps that crashed at 300 and resumed from 200, with everything a run can have."""
    writer, begin_ms = JournalWriter(run_dir / "journal.jsonl"), now_ms() - 7_200_000
    writer.append("run", {"run_uid": "u", "run_name": "r", "experiment": "e", "tracking_uri": None}, begin_ms)
    writer.append("status", {"status": "RUNNING"}, begin_ms)
    for first, last in ((0, 310), (210, 410)):
        if first:
            writer.append("resume", {"step": 200}, begin_ms + 3_000_000)
        for step in range(first, last, 10):
            superseded = first == 0 and step > 200
            loss = math.nan if step == 100 else 777.0 if superseded else 2 - step / 400
            metrics = {"train/loss": loss, "train/lr": 1e-3, "train/grad_norm": 1.5, "custom/thing": 3.0}
            metrics |= {"throughput/samples_per_s": 1234.0, "throughput/mfu": 0.4, "data/wait_fraction": 0.02}
            writer.append(
                "metrics", {"step": step, "metrics": metrics | {"memory/peak_bytes_per_rank": 2.0**31}}, begin_ms
            )
    writer.append("metrics", {"step": 400, "metrics": {"val/loss": 1.1, "eval/digits/top1": 0.9}}, begin_ms)
    skipped = {"name": "skipped_step", "at_step": 300, "loss": math.nan, "samples": ["a.tar:<7>"], "num_samples": 1}
    for _ in range(60):
        writer.append("event", skipped, begin_ms)
    writer.append("artifact_skipped", {"path": "gone.png", "reason": "the file is gone"}, begin_ms)
    writer.append("status", {"status": "FINISHED"}, begin_ms + 3_600_000)
    writer.close()
    (run_dir / "config.yaml").write_text("name: r\ntrain:\n  global_batch: 64\n  steps: 400\n")
    identity = {"name": "<script>alert(1)</script>", "world_size": 2, "command": ["tessera", "u=http://a:hunter2@b"]}
    identity |= {"resume_command": "tessera train a.yaml", "reproduce_command": "tessera train c.yaml name=NEW_NAME"}
    (run_dir / "run.json").write_text(json.dumps(identity))
    (run_dir / "mlflow.json").write_text(
        json.dumps({"mlflow_run_id": "abc123", "tracking_uri": "sqlite:///x", "offset": 5})
    )
    for step in range(0, 400, 20):
        picture = torch.full((2, 1, 8, 8), step % 256, dtype=torch.uint8)
        save_pictures({"input": picture}, run_dir / "pictures" / f"step-{step:08d}.png")
    for evaluated, weights, top1 in ((None, "untrained", 0.25), (400, "trained", 0.9375)):
        result: dict[str, Any] = {
            "protocol": "knn",
            "task": "digits <b>",
            "step": evaluated,
            "weights": weights,
            "model_digest": "d" * 64,
        }
        result |= {
            "num_train": 100,
            "num_test": 32,
            "settings": {"k": 10},
            "selection": "k on held-out training samples",
        }
        folder = run_dir / "eval" / str(evaluated) / "digits-12ab"
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(result | {"metrics": {"top1": top1}}))


class References(html.parser.HTMLParser):
    """Collects what a browser would fetch, and checks that tags are closed in order."""

    VOID = frozenset({"meta", "img", "br", "line", "link"})

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID or tag == "line":
            self.open.append(tag)
        self.found += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def read_page(path: Path) -> tuple[str, References]:
    page, references = path.read_text(), References()
    references.feed(page)
    assert references.open == []
    return page, references


def test_a_full_run_has_every_section_and_refers_to_nothing(tmp_path: Path) -> None:
    write_run(tmp_path)
    page, references = read_page(build_report(tmp_path))
    assert len(page) < 500_000
    assert all(reference.startswith("data:image/") for reference in references.found)
    assert len(references.found) == MAX_PICTURES
    assert "script" not in references.tags
    assert "link" not in references.tags
    assert "@import" not in page
    assert "url(" not in page
    for text in (
        "&lt;script&gt;alert(1)", "FINISHED", "400", "25.6k", "1 h 0 min", "train/loss", "val/loss", "Gradient norm",
        "1,234", "Waiting for data", "Model FLOPs", "step 380", "step 0", "untrained", "0.9375", "digits &lt;b&gt;",
        "100 / 32", "k=10", "k on held-out", "global_batch: 64", "tessera train a.yaml", "name=NEW_NAME", "abc123",
        "resumed at step 200", "step 100: nan", "custom/thing", "gone.png is not in MLflow", "eval/digits/top1",
        "skipped step", "a.tar:&lt;7&gt;",
        "10 older ones are in the journal",
    ):  # fmt: skip
        assert text in page, text
    assert "hunter2" not in page
    assert "777" not in re.sub(r"base64,[^\"]*", "", page), "superseded points are shown"


def test_films_are_in_the_page_the_newest_first_and_few(tmp_path: Path) -> None:
    write_run(tmp_path)
    for step in range(0, 500, 100):
        film = torch.arange(6, dtype=torch.uint8).mul(40).view(1, 6, 1, 1, 1).expand(2, 6, 1, 8, 8)
        save_films({"input": film}, tmp_path / "films" / f"step-{step:08d}.gif")
    (tmp_path / "films" / "step-00000400.gif").write_bytes(b"torn")
    page, references = read_page(build_report(tmp_path))
    moving = [reference for reference in references.found if reference.startswith("data:image/gif;base64,")]
    assert len(moving) == MAX_FILMS - 1  # the newest is torn
    assert len(references.found) == MAX_PICTURES + len(moving)
    assert [row["caption"] for row in collect(tmp_path)["films"]] == ["step 200", "step 0"]
    assert "film of reconstructions at step 200" in page


def test_a_run_with_films_alone_shows_them(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text("")
    save_films({"input": torch.zeros(1, 2, 1, 8, 8, dtype=torch.uint8)}, tmp_path / "films" / "step-00000007.gif")
    page, references = read_page(build_report(tmp_path))
    assert len(references.found) == 1
    assert "No pictures" not in page


def test_an_untrained_baseline_comes_before_the_checkpoints(tmp_path: Path) -> None:
    write_run(tmp_path)
    assert [row["weights"] for row in collect(tmp_path)["evaluations"]] == ["untrained", "trained"]


@pytest.mark.parametrize("content", [{}, {"config.yaml": "name: ["}, {"run.json": "{"}, {"journal.jsonl": '{"time'}])
def test_runs_that_have_almost_nothing(tmp_path: Path, content: dict[str, str]) -> None:
    for name, text in (content or {"journal.jsonl": ""}).items():
        (tmp_path / name).write_text(text)
    broken = tmp_path / "eval" / "1"
    broken.mkdir(parents=True)
    (broken / "results.json").write_text('{"metrics": 3}')
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "step-00000001.png").write_bytes(b"no picture")
    page, references = read_page(build_report(tmp_path))
    assert references.found == []
    for text in ("EMPTY", "no metrics yet", "No pictures", "Nothing was evaluated"):
        assert text in page


def test_silence_tells_a_crashed_run_from_a_running_one(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path / "journal.jsonl")
    writer.append("status", {"status": "RUNNING"}, now_ms() - 5_000)
    assert "RUNNING" in build_report(tmp_path).read_text()
    assert collect(tmp_path)["status"] == {"word": "RUNNING", "note": "last record 5 s ago"}
    writer.append("metrics", {"step": 1, "metrics": {"train/loss": 1.0}}, now_ms() - 7_200_000)
    writer.close()
    assert collect(tmp_path)["status"] == {
        "word": "INTERRUPTED?",
        "note": "says RUNNING, but its last record is 2 h 0 min old",
    }


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    report_command.add_arguments(parser)
    with pytest.raises(ValueError, match="not a run's folder"):
        report_command.run(parser.parse_args([str(tmp_path)]))
    with pytest.raises(FileNotFoundError, match="no folder"):
        report_command.run(parser.parse_args([str(tmp_path / "absent")]))
    write_run(tmp_path)
    answer: dict[str, Any] = report_command.run(
        parser.parse_args([str(tmp_path), "--out", str(tmp_path / "x" / "page.html")])
    )
    assert answer["report"] == str(tmp_path / "x" / "page.html")
    assert answer["size_bytes"] == (tmp_path / "x" / "page.html").stat().st_size
    assert "page.html" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_long_curves_stay_small_and_keep_their_extremes() -> None:
    points = [(float(step), 5.0 if step == 70_001 else 1.0) for step in range(100_000)]
    svg = line_chart({"a": points})
    assert len(svg) < 12_000
    polyline = re.search(r'polyline points="([^"]*)"', svg)
    polygon = re.search(r'polygon points="([^"]*)"', svg)
    assert polyline is not None
    assert polygon is not None
    pixels = [tuple(map(float, pair.split(","))) for pair in polyline.group(1).split()]
    assert len(pixels) <= MAX_COLUMNS
    heights = [float(pair.split(",")[1]) for pair in polygon.group(1).split()]
    flat, top = pixels[0][1], min(heights)
    assert flat - top > 150, "the single high point must be visible in the band"


@pytest.mark.parametrize(
    "points",
    [
        [(3.0, 2.0)],
        [(0.0, 0.0), (1.0, 0.0)],
        [(0.0, math.nan)],
        [(0.0, math.inf), (1.0, -1e300)],
        [(0.0, 1e-12), (9.0, 1e12)],
    ],
)
def test_odd_curves_draw_finite_numbers(points: list[tuple[float, float]]) -> None:
    svg = line_chart({"a": points}, log=True, from_zero=True, marks=[0.5])
    coordinates = re.findall(r'(?:points|x|y|x1|y1|cx|cy)="([^"]*)"', svg)
    assert all(math.isfinite(float(number)) for text in coordinates for number in re.split(r"[ ,]+", text) if number)
    assert line_chart({"a": []}) == ""


def test_format_value() -> None:
    numbers = [0, 0.00015, 0.25, 1234.5, 25600, 2.56e6, 3e9, math.nan]
    assert [format_value(number) for number in numbers] == [
        "0",
        "1.50e-4",
        "0.25",
        "1234",
        "25.6k",
        "2.56M",
        "3G",
        "nan",
    ]
