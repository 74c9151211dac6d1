"""Evaluation's view of a data set of videos: fixed clips and crops, each video once, nothing replaced."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from torch.nn import functional
from torch.utils.data import DataLoader

from data_pipes.decode.video import Video
from data_pipes.errors import SampleError
from data_pipes.index.index import index_shards
from data_pipes.sequential.clips import SequentialClips, clip_windows, crop_places, resized_size
from data_pipes.transforms.clip_sampling import ClipSampling
from tests.data_pipes.tiny_videos import SIZE, decode_all, video


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of 20, 21, 22 and 3 frames, then a damaged one; the fourth has no label."""
    folder = tmp_path_factory.mktemp("videos")
    with webdataset.TarWriter(str(folder / "shard-000000.tar")) as writer:
        for number, frames in enumerate((20, 21, 22, 3)):
            label = {} if number == 3 else {"cls": str(number % 2).encode()}
            writer.write({"__key__": f"{number:03d}", "mp4": video(frames), **label})
        writer.write({"__key__": "004", "mp4": video(20)[:900], "cls": b"0"})
    index_shards(sorted(folder.glob("*.tar")), folder)
    return folder


def test_views_are_clips_from_start_to_end_by_crops_from_left_to_right(folder: Path) -> None:
    clips = SequentialClips(folder, ClipSampling(4, 2), (24, 24), views=(3, 3))
    views, label = clips[1]
    assert (views.shape, views.dtype, label) == ((9, 3, 4, 24, 24), torch.uint8, 1)
    frames = torch.from_numpy(decode_all(video(21))).permute(0, 3, 1, 2)
    small = functional.interpolate(frames, (24, 32), mode="bilinear", antialias=True)  # 48 x 64 by a half
    for clip, start in enumerate((0, 7, 14)):  # 21 frames, a clip spans 7: the last one ends with frame 20
        for crop, left in enumerate((0, 4, 8)):
            expected = small[start : start + 8 : 2, :, :, left : left + 24].transpose(0, 1)
            assert torch.equal(views[3 * clip + crop], expected), (clip, crop)


def test_one_view_is_the_middle_of_both(folder: Path) -> None:
    views, _ = SequentialClips(folder, ClipSampling(4, 2, repeats=3, shared_window=True), (24, 24))[1]
    frames = torch.from_numpy(decode_all(video(21))).permute(0, 3, 1, 2)
    small = functional.interpolate(frames, (24, 32), mode="bilinear", antialias=True)
    assert torch.equal(views, small[None, 7:15:2, :, :, 4:28].transpose(1, 2))


def test_each_video_once_in_order_and_short_ones_repeat_their_last_frame(folder: Path) -> None:
    clips = SequentialClips(folder, ClipSampling(4, 2), SIZE)
    assert len(clips) == 5
    items = clips.__getitems__([3, 0, 2])
    assert [label for _, label in items] == [-1, 0, 0]
    assert [clips.key(index) for index in (0, 4)] == ["000", "004"]
    frames = torch.from_numpy(decode_all(video(3))).permute(3, 0, 1, 2)
    assert torch.equal(items[0][0][0], frames[:, [0, 2, 2, 2]])  # frames of the right size stay as they are
    assert all(torch.equal(views, clips[index][0]) for (views, _), index in zip(items, (3, 0, 2), strict=True))
    with pytest.raises(IndexError, match="sample 5 of a data set of 5"):
        clips[5]


def test_the_same_in_worker_processes(folder: Path) -> None:
    clips = SequentialClips(folder, ClipSampling(4, 2), (16, 16), channels=1, views=(2, 1))
    loader = DataLoader(clips, batch_size=2, sampler=[0, 1, 2], num_workers=1, multiprocessing_context="forkserver")
    views, labels = zip(*loader, strict=True)
    assert torch.equal(torch.cat(views), torch.stack([clips[index][0] for index in range(3)]))
    assert torch.cat(labels).tolist() == [0, 1, 0]


def test_segments_are_tested_as_in_video_mae() -> None:
    """VideoMAE's SSVideoClsDataset: int(tick * x) and int(tick / 2 + tick * x), sorted and dealt out in turn."""
    with Video(video(41)) as clip:
        windows = clip_windows(clip, ClipSampling(8, mode="segments", repeats=2))
        tick = 41 / 8
        together = sorted([int(tick / 2 + tick * x) for x in range(8)] + [int(tick * x) for x in range(8)])
        assert windows.tolist() == [together[0::2], together[1::2]]
        middle = clip_windows(clip, ClipSampling(8, mode="segments"))
        assert middle.tolist() == [[int(tick / 2 + tick * x) for x in range(8)]]


def test_clips_by_time_end_with_the_video() -> None:
    with Video(video(50)) as clip:  # 25 frames per second
        windows = clip_windows(clip, ClipSampling(4, 2, fps=10, repeats=2))  # a frame every 0.2 s
        assert windows[0].tolist() == [0, 5, 10, 15]
        assert windows[1].tolist() in ([34, 39, 44, 49], [35, 40, 45, 49])
        assert np.diff(windows[1]).min() >= 4


def test_where_crops_lie() -> None:
    assert crop_places((24, 32), (24, 24), 3) == [(0, 0), (0, 4), (0, 8)]
    assert crop_places((40, 30), (24, 24), 3) == [(0, 3), (8, 3), (16, 3)]
    assert crop_places((40, 30), (24, 24), 1) == [(8, 3)]
    assert resized_size(240, 320, (224, 224), None) == (224, 298)
    assert resized_size(320, 240, (224, 224), None) == (298, 224)
    assert resized_size(100, 301, (16, 48), None) == (16, 48)
    assert resized_size(99, 301, (16, 48), None) == (16, 48)
    assert resized_size(301, 100, (16, 48), None) == (144, 48)
    assert resized_size(320, 240, (224, 224), 256) == (341, 256)
    assert resized_size(100, 100, (16, 64), None) == (64, 64)
    assert resized_size(16, 64, (16, 64), 80) == (16, 64)
    with pytest.raises(SampleError, match="too thin"):
        resized_size(4, 401, (4, 4), None)


def test_a_bad_video_is_an_error_with_its_name(folder: Path) -> None:
    with pytest.raises(SampleError, match=r"004 in shard-000000\.tar: .*; repair or remove the sample"):
        SequentialClips(folder, ClipSampling(4, 2), SIZE)[4]


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"views are \(0, 1\)"):
        SequentialClips("nowhere", ClipSampling(), (8, 8), views=(0, 1))
    with pytest.raises(ValueError, match="do not fit into a short side of 20 pixels"):
        SequentialClips("nowhere", ClipSampling(), (16, 24), short_side=20)
    with pytest.raises(ValueError, match="views of 2 channels"):
        SequentialClips("nowhere", ClipSampling(), (8, 8), channels=2)
