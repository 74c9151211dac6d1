"""Exports of video models from the file on: transformers' own preprocessing makes our evaluation's pixels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import webdataset

from data_pipes.index.index import index_shards
from data_pipes.sequential.clips import SequentialClips, cut_crops
from data_pipes.transforms.clip_sampling import ClipSampling
from pretrain.export import transformers_video
from pretrain.export.pictures import detail, pixel_error
from pretrain.export.publish import ExportError
from pretrain.export.transformers_video import export_videomae
from pretrain.models.normalise import Normalise
from pretrain.models.video_config import VideoViTConfig
from tests.data_pipes.tiny_videos import decode_all, video
from tests.pretrain.export.random_backbones import backbone_of

transformers = pytest.importorskip("transformers", minversion="5.0")

CLIPS = VideoViTConfig(4, (32, 32), 2, (16, 16), 3, 24, 1, 2)
FRAMES = [(340, 256), (320, 240), (426, 240), (352, 288), (256, 340), (240, 426), (288, 288), (31, 47)]
"""Width and height of frames."""


@pytest.mark.parametrize("side", [32, 112, 224])
def test_frames_of_usual_sizes_become_our_evaluations_pixels(tmp_path: Path, side: int) -> None:
    backbone = backbone_of(replace(CLIPS, image_size=(side, side)), tmp_path)
    exported = export_videomae(backbone, tmp_path / "out")
    assert {f"clip of {width} x {height}" for width, height in FRAMES[:4]} <= set(exported.pictures)
    assert max(max(errors.values()) for errors in exported.pictures.values()) < 1e-4
    processor = transformers.VideoMAEImageProcessor.from_pretrained(exported.folder)
    for width, height in FRAMES:
        frames = (detail(height, width, 3) * 255).round().byte()[None].expand(4, -1, -1, -1)
        theirs = processor([list(frames.numpy())], input_data_format="channels_first", return_tensors="pt").pixel_values
        ours = Normalise(backbone.mean, backbone.std)(cut_crops(frames, (side, side), None, 1)[0])
        assert pixel_error("clip", theirs[0], ours, backbone.std) < 1e-4, (width, height)


def test_a_video_file_becomes_our_evaluations_pixels(tmp_path: Path) -> None:
    data = video(4, size=(240, 426))
    with webdataset.TarWriter(str(tmp_path / "shard-000000.tar")) as writer:
        writer.write({"__key__": "0", "mp4": data, "cls": b"0"})
    index_shards([tmp_path / "shard-000000.tar"], tmp_path)
    backbone = backbone_of(CLIPS, tmp_path)
    processor = transformers.VideoMAEImageProcessor.from_pretrained(export_videomae(backbone, tmp_path / "out").folder)
    views, _ = SequentialClips(tmp_path, ClipSampling(4, 1), (32, 32))[0]
    theirs = processor(list(decode_all(data)), return_tensors="pt").pixel_values
    ours = Normalise(backbone.mean, backbone.std)(views[0].transpose(0, 1))
    assert pixel_error("clip", theirs[0], ours, backbone.std) < 1e-4


@pytest.mark.parametrize(
    "changed", [{"size": {"shortest_edge": 33}}, {"size": {"height": 32, "width": 32}}, {"resample": 3}], ids=str
)
def test_other_preprocessing_of_clips_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]
) -> None:
    """Also without `compare_pixels`, whose frames need no resizing."""
    right = transformers_video.preprocessor
    monkeypatch.setattr(transformers_video, "preprocessor", lambda source: right(source) | changed)
    monkeypatch.setattr(transformers_video, "compare_pixels", lambda *given: 0.0)
    with pytest.raises(ExportError, match="other pixels than our evaluation for the clip of 320 x 240"):
        export_videomae(backbone_of(CLIPS, tmp_path), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_clips_that_are_not_square_need_a_size_which_the_card_says(tmp_path: Path) -> None:
    exported = export_videomae(backbone_of(replace(CLIPS, image_size=(32, 64)), tmp_path), tmp_path / "out")
    assert max(max(errors.values()) for errors in exported.pictures.values()) < 1e-4
    assert 'Pass that size: `processor(frames, size={"height": ...' in (tmp_path / "out/README.md").read_text()
