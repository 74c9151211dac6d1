"""Clips against a slow reference: everything decoded with PyAV, frames picked, torchvision's crop and resize."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as reference

from data_pipes.decode.video import Video
from data_pipes.order.hashing import hash_uniform
from data_pipes.transforms.clip_sampling import ClipSampling
from data_pipes.transforms.clips import ClipTransform, multi_scale_box
from data_pipes.transforms.image import TrainTransform
from tests.data_pipes.tiny_videos import decode_all, encode, pictures, video


def uniforms_of(transform: ClipTransform, number: int) -> list[float]:
    return hash_uniform(7, [number], 0, transform.num_uniforms)[0].tolist()


def slow_clips(data: bytes, transform: ClipTransform, uniforms: list[float], windows: Any) -> torch.Tensor:
    frames = torch.from_numpy(decode_all(data)).permute(0, 3, 1, 2).contiguous()
    mode = InterpolationMode(transform.interpolation)
    clips = []
    for number in range(transform.sampling.repeats):
        first = transform.sampling.num_uniforms + number * TrainTransform.num_uniforms
        own = uniforms[first : first + TrainTransform.num_uniforms]
        box = transform.crop_box(*frames.shape[2:], own)
        window = windows[number % len(windows)]
        clip = torch.stack([reference.resized_crop(frames[i], *box, list(transform.size), mode) for i in window])
        clips.append(reference.horizontal_flip(clip) if own[-1] < transform.flip else clip)
    return torch.stack(clips).permute(0, 2, 1, 3, 4)


@pytest.mark.parametrize(
    "transform",
    [
        ClipTransform((32, 40), sampling=ClipSampling(8, 4)),
        ClipTransform((32, 32), sampling=ClipSampling(4, 2, repeats=3), interpolation="bicubic", flip=1.0),
        ClipTransform((24, 24), sampling=ClipSampling(4, 3, repeats=4, shared_window=True), crop="multi_scale"),
        ClipTransform((24, 24), sampling=ClipSampling(5, mode="segments", repeats=2)),
        ClipTransform((24, 24), sampling=ClipSampling(4, 2, fps=10.0)),
    ],
    ids=["dense", "repeats", "shared window", "segments", "fps"],
)
def test_clips_are_those_of_the_slow_way(transform: ClipTransform) -> None:
    data = video(40)
    for number in range(4):
        uniforms = uniforms_of(transform, number)
        clips = transform.load(data, uniforms)
        assert clips.shape == transform.shape
        assert clips.dtype == torch.uint8
        with Video(data) as opened:
            windows = transform.sampling.indices(opened, uniforms[: transform.sampling.num_uniforms])
        assert torch.equal(clips, slow_clips(data, transform, uniforms, windows))
        assert torch.equal(clips, transform.load(data, uniforms))


def test_dense_windows_begin_everywhere() -> None:
    sampling = ClipSampling(8, 4)  # spans 29 of 40 frames: it may begin at frames 0 to 11
    with Video(video(40)) as opened:
        starts = [int(sampling.indices(opened, [u])[0, 0]) for u in np.arange(0, 1, 1 / 240)]
        assert np.bincount(starts).tolist() == [20] * 12
        last = sampling.indices(opened, [np.nextafter(1, 0)])[0]
        assert last.tolist() == list(range(11, 40, 4))


def test_repeats_have_their_own_windows_or_share_one() -> None:
    with Video(video(40)) as opened:
        own = ClipSampling(4, 4, repeats=2).indices(opened, [0.0, 0.99])
        assert own.tolist() == [[0, 4, 8, 12], [27, 31, 35, 39]]
        assert ClipSampling(4, 4, repeats=2, shared_window=True).indices(opened, [0.5]).shape == (1, 4)
    shared = ClipTransform((24, 24), sampling=ClipSampling(4, 4, repeats=2, shared_window=True), flip=0.5)
    uniforms = [0.5] + [0.3] * 22 + [0.0] + [0.3] * 22 + [0.9]  # the same part, flipped in the first
    clips = shared.load(video(40), uniforms)
    assert torch.equal(clips[0].flip(-1), clips[1])


def test_segments_take_one_frame_of_each_part() -> None:
    sampling = ClipSampling(8, mode="segments")
    with Video(video(40)) as opened:
        assert sampling.indices(opened, [0.0] * 8)[0].tolist() == list(range(0, 40, 5))
        assert sampling.indices(opened, [0.999] * 8)[0].tolist() == list(range(4, 40, 5))


def test_rate_of_the_clip_not_of_the_video() -> None:
    for rate in (25, 50):
        data = encode(pictures(40), None, rate=rate)
        with Video(data) as opened:
            indices = ClipSampling(4, 2, fps=25.0).indices(opened, [0.0])[0]
            assert indices.tolist() == [0, 2 * rate // 25, 4 * rate // 25, 6 * rate // 25]
    with Video(encode(pictures(40), None, "matroska", rate=30)) as opened:  # its clock rounds to 1 ms
        assert ClipSampling(16, 1, fps=30.0).indices(opened, [0.0])[0].tolist() == list(range(16))
    times = [0, 40, 80, 400, 440, 1000, 1040, 1080]
    with Video(encode(pictures(8), times, b_frames=0)) as opened:
        assert ClipSampling(6, 5, fps=25.0).indices(opened, [0.0])[0].tolist() == [0, 2, 3, 4, 4, 5]


def test_short_videos() -> None:
    data = video(5)
    with Video(data) as opened:
        assert ClipSampling(4, 2).indices(opened, [0.9])[0].tolist() == [0, 2, 4, 4]
        assert ClipSampling(4, 2, short="loop").indices(opened, [0.9])[0].tolist() == [0, 2, 4, 1]
        assert ClipSampling(4, 2, fps=25.0).indices(opened, [0.9])[0].tolist() == [0, 2, 4, 4]
        assert ClipSampling(8, mode="segments").indices(opened, [0.5] * 8)[0].tolist() == [0, 0, 1, 2, 2, 3, 4, 4]
    transform = ClipTransform((24, 24), sampling=ClipSampling(4, 2, short="loop"))
    uniforms = uniforms_of(transform, 0)
    assert torch.equal(transform.load(data, uniforms), slow_clips(data, transform, uniforms, [[0, 2, 4, 1]]))
    with Video(video(1)) as opened:
        assert ClipSampling(3, 2).indices(opened, [0.5])[0].tolist() == [0, 0, 0]


def test_multi_scale_boxes() -> None:
    rng = np.random.default_rng(0)
    sides = (240, 210, 180, 158)
    boxes = {multi_scale_box(240, 320, rng.random(2)) for _ in range(5000)}
    pairs = {(h, w) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1}
    assert {(h, w) for _, _, h, w in boxes} == pairs
    assert len(boxes) == sum(13 if h < 240 else 5 for h, _ in pairs)  # at full height there is no up and down
    for top, left, height, width in boxes:
        assert 0 <= top <= 240 - height
        assert 0 <= left <= 320 - width


def test_grey_clips() -> None:
    transform = ClipTransform((24, 24), sampling=ClipSampling(4, 2), channels=1)
    assert transform.shape == (1, 1, 4, 24, 24)
    assert transform.load(video(40), uniforms_of(transform, 0)).shape == transform.shape


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClipSampling(0), "num_frames is 0"),
        (lambda: ClipSampling(mode="sparse"), "expected 'dense' or 'segments'"),  # type: ignore[arg-type]
        (lambda: ClipSampling(mode="segments", fps=8.0), "fps is 8.0"),
        (lambda: ClipSampling(short="stop"), "expected 'last' or 'loop'"),  # type: ignore[arg-type]
        (lambda: ClipTransform((0, 8)), "expected two positive numbers"),
        (lambda: ClipTransform((8, 8), scale=(0.0, 1.0)), "crop_scale"),
        (lambda: ClipTransform((8, 8), crop="centre"), "'random' or 'multi_scale'"),  # type: ignore[arg-type]
        (lambda: ClipTransform((8, 8), interpolation="nearest"), "'bilinear' or 'bicubic'"),  # type: ignore[arg-type]
        (lambda: ClipTransform((8, 8), channels=4), "clips of 4 channels"),
    ],
)
def test_configurations_that_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
