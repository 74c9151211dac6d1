"""Whole runs on clips: from mp4 members in a tar to a checkpoint, resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import webdataset

from data_pipes.index.index import index_shards
from pretrain.config import ConfigError, load_config
from pretrain.tracking.journal import read_metrics
from pretrain.train import train
from tests.data_pipes.tiny_videos import video
from tests.pretrain.runs import assert_same_weights, losses, run_several

RUN = """
name: run
device: cpu
data: {video: {num_frames: 4, stride: 2, repeats: 2}}
objective:
  name: video_mae
  repeats: 2
  mask_ratio: 0.75
  model:
    encoder: {num_frames: 4, image_size: [16, 16], patch_size: [4, 4], width: 16, depth: 2, heads: 2}
    decoder_width: 16
    decoder_depth: 1
    decoder_heads: 2
optim: {base_lr: null, lr: 1.0e-3, clip_norm: 1.0, ema_decay: 0.9}
train: {global_batch: 4, steps: 4, log_every: 1, val_samples: 5, num_pictures: 2}
checkpoint: {every_steps: 2}
tracking: {ship: false}
"""


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    with webdataset.TarWriter(str(folder / "shard-000000.tar")) as writer:
        for number in range(9):
            writer.write({"__key__": f"{number:03d}", "mp4": video(12 + number), "cls": str(number % 2).encode()})
    index_shards(sorted(folder.glob("*.tar")), folder)
    return folder


def run(videos: Path, folder: Path, name: str, *more: str) -> dict[str, object]:
    path = folder / "run.yaml"
    path.write_text(RUN)
    overrides = [f"data.train={videos}", f"data.val={videos}", f"output_dir={folder}", f"name={name}", *more]
    return train(load_config(path, overrides), config_path=path, overrides=overrides)


def test_a_run_on_clips_resumes_to_the_bit(videos: Path, tmp_path: Path) -> None:
    run(videos, tmp_path, "whole")
    found = losses(tmp_path / "whole")
    assert list(found) == [1, 2, 3, 4]
    validated = {point.step: point.value for point in read_metrics(tmp_path / "whole")["val/loss"]}
    assert list(validated) == [2, 4]
    assert all(0.5 < value < 2.0 for value in validated.values())  # of normalised pixels: the prediction 0 has 1
    figures = {name: points[-1].value for name, points in read_metrics(tmp_path / "whole").items()}
    assert figures["throughput/clips_per_s"] == pytest.approx(2 * figures["throughput/samples_per_s"])
    assert figures["data/position"] == 16  # 4 steps of 4 videos: repeats are not counted
    assert (tmp_path / "whole" / "pictures" / "step-00000004.png").is_file()
    run(videos, tmp_path, "parts", "data.workers=2", "data.worker_kind=thread")
    for path in sorted((tmp_path / "parts" / "checkpoints").glob("step-*"))[-1:]:
        (path / "COMPLETE").unlink()  # as a kill in the last save leaves it
    summary = run(videos, tmp_path, "parts")
    assert summary["steps_this_start"] == 2
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    assert losses(tmp_path / "parts") == found


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("names", "server"),
    [
        (("ddp", "fsdp2"), "process_server"),
        pytest.param(("zero2", "zero3"), "deepspeed_server", marks=pytest.mark.slow),
    ],
)
def test_clips_under_every_engine(
    videos: Path, tmp_path: Path, names: tuple[str, ...], server: str, request: pytest.FixtureRequest
) -> None:
    """Batches are videos, so that a rank's share is whole videos with all their clips."""
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    run(videos, tmp_path, "single", "checkpoint.every_steps=null")
    runs = [
        [
            f"data.train={videos}",
            f"output_dir={tmp_path}",
            f"name={name}",
            f"parallel.strategy={name}",
            "checkpoint.every_steps=null",
        ]
        for name in names
    ]
    run_several(request.getfixturevalue(server), 2, runs, config=path)
    for name in names:
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "single"), rel=1e-5), name
        assert_same_weights(tmp_path / "single", tmp_path / name, to_the_bit=False)


def test_clips_that_the_objective_does_not_expect(videos: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 clips of 4 frames per video, and the data are 1 clips of 4 frames"):
        run(videos, tmp_path, "run", "data.video.repeats=1")
    with pytest.raises(ConfigError, match=r"and the data are images; set data\.video\.num_frames"):
        run(videos, tmp_path, "run", "data.video=null")
    assert not (tmp_path / "run").exists()
