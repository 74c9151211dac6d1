"""The built-in videos: what moves is what the label says, and one frame does not say it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from data_pipes.decode.video import Video, probe
from data_pipes.pack.builtin import load_builtin
from data_pipes.pack.builtin_motion import MotionOptions, MotionSource
from data_pipes.pack.listing import list_source
from data_pipes.pack.motion import CLASSES, Motion, Pose
from data_pipes.pack.pack import pack
from data_pipes.pack.plan import PackOptions
from data_pipes.shards.manifest import Manifest

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("skimage", "sklearn", "av"))), reason="needs the extras demo and video"
)
SIZE = 48


@pytest.fixture(scope="module")
def source() -> MotionSource:
    return MotionSource(MotionOptions(videos=64, val_videos=16, size=SIZE, frames=9))


def grey(frames: list[Image.Image]) -> NDArray[np.float64]:
    return np.stack([np.asarray(frame.convert("L"), np.float64) for frame in frames])


def flow(frames: NDArray[np.float64], name: str) -> float:
    """How well one kind of motion explains frame 4 from frame 3: least squares against its flow field, by the change of
    brightness; Horn and Schunck's constraint, one unknown.
    """
    y, x = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    kind, _, direction = name.partition("_")
    if kind == "zoom":
        u, v = (x, y) if direction == "in" else (-x, -y)
    elif kind == "rotate":
        u, v = (-y, x) if direction == "cw" else (y, -x)
    else:
        sign = -1 if kind == "pan" else 1  # the view goes left: the content goes right
        right, down = ("right" in direction) - ("left" in direction), ("down" in direction) - ("up" in direction)
        u, v = np.full_like(x, sign * right), np.full_like(y, sign * down)
    change = frames[4] - frames[3]
    down_slope, right_slope = np.gradient((frames[3] + frames[4]) / 2)
    expected = -(u * right_slope + v * down_slope)
    return float((change * expected).sum() / (np.linalg.norm(change) * np.linalg.norm(expected)))


def test_the_content_moves_as_the_label_says(source: MotionSource) -> None:
    camera = [name for name in CLASSES if not name.startswith("digits")]
    digits = [name for name in CLASSES if name.startswith("digits")]
    right = 0
    for number in range(64):
        name, frames = CLASSES[number % 16], grey(source.draw(number))
        rivals = camera if name in camera else digits
        right += name == max(rivals, key=lambda rival: flow(frames, rival))
    assert right >= 56


def test_only_digits_move_over_a_still_photograph(source: MotionSource) -> None:
    for number in range(32):
        frames = grey(source.draw(number))
        still = (np.ptp(frames, axis=0) < 1).mean()
        assert still > 0.1 if CLASSES[number % 16].startswith("digits") else still < 0.05, CLASSES[number % 16]


def test_every_class_is_the_reversal_of_another(source: MotionSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same draws: so a frame from some moment cannot tell the two apart."""
    monkeypatch.setattr(
        "data_pipes.pack.builtin_motion.hash_uniform", lambda seed, numbers, *rest: _numbers(numbers[0] // 16)
    )
    pairs = (("left", "right"), ("up", "down"), ("in", "out"), ("cw", "ccw"))
    opposite = {a: b for pair in pairs for a, b in (pair, pair[::-1])}
    videos = {
        name: np.stack([np.asarray(frame, int) for frame in source.draw(16 + label)])
        for label, name in enumerate(CLASSES)
    }
    for name, frames in videos.items():
        kind, *directions = name.split("_")
        twin = "_".join([kind, *(opposite[each] for each in directions)])
        assert np.abs(frames - videos[twin][::-1]).max() <= 1, (name, twin)
        assert np.abs(frames - videos[twin]).mean() > 1


def _numbers(seed: int) -> NDArray[np.float64]:
    return np.random.default_rng(seed).random((1, 512))


def test_a_pose_moves_in_the_directions_of_the_view() -> None:
    pose = Pose((50.0, 40.0), np.pi / 2, 2.0)  # the content turned clockwise: its right is the view's down
    assert np.allclose(pose.moved(Motion((4.0, 0.0)), 1.0).centre, (50.0, 42.0))
    assert np.allclose(pose.moved(Motion((0.0, 4.0)), 0.5).centre, (49.0, 40.0))
    assert pose.moved(Motion(zoom=np.log(3)), -1.0).scale == pytest.approx(2 / 3)
    picture = Image.new("L", (100, 80))
    picture.putpixel((50, 30), 255)  # above the centre of the plane: right of the view's centre
    shown = np.asarray(Pose((50.5, 40.5), np.pi / 2, 1.0).view(picture, 31))
    assert divmod(int(shown.argmax()), 31) == (15, 25)


def test_packing_is_repeatable_balanced_and_split(tmp_path: Path) -> None:
    text = "builtin:motion,videos=32,val_videos=16,size=32,frames=6"
    first = pack(text, tmp_path / "a", workers=2)
    pack(text, tmp_path / "b")
    for name in ("train", "val"):
        manifest = Manifest.load(tmp_path / "a" / name)
        assert manifest.fingerprint == Manifest.load(tmp_path / "b" / name).fingerprint
        shards = [(tmp_path / out / name / "shard-000000.tar").read_bytes() for out in "ab"]
        assert shards[0] == shards[1]
        assert manifest.classes == tuple(sorted(CLASSES, key=list(first.splits["train"].classes).index))
    assert {name: manifest.num_samples for name, manifest in first.splits.items()} == {"train": 32, "val": 16}
    source = load_builtin("motion,videos=32,val_videos=16,size=32,frames=6")
    labels = [entry.label for entry in list_source(source).entries]
    assert np.bincount(labels).tolist() == [2] * 16
    info = probe(source.read(next(iter(source.files())).name))
    assert (info.num_frames, info.height, info.width, info.codec) == (6, 32, 32, "h264")
    with pytest.raises(ValueError, match="brings its own validation set, are given; choose one"):
        pack(text, tmp_path / "c", options=PackOptions(val_fraction=0.1))


def test_the_files_show_what_was_drawn(source: MotionSource) -> None:
    for number in (0, 5, 12):
        name = [file.name for file in source.files()][number]
        with Video(source.read(name)) as video:
            shown = video.frames(range(9)).astype(float)
        drawn = np.stack([np.asarray(frame, float) for frame in source.draw(number)])
        assert np.abs(shown - drawn).mean() < 6


def test_another_seed_and_another_split_give_other_videos(source: MotionSource) -> None:
    other = MotionSource(MotionOptions(videos=64, size=SIZE, frames=9, seed=1))
    pictures = [np.asarray(each.draw(0)[4]) for each in (source, other, source.validation())]
    assert not np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])
    train, val = (source._photographs, source.validation()._photographs)
    assert not {picture.tobytes() for picture in train} & {picture.tobytes() for picture in val}
    digits = [{digit.tobytes() for digit in each._digits} for each in (source, source.validation())]
    assert not digits[0] & digits[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("motion,size=33", "size=33; expected an even number"),
        ("motion,frames=1", "of 1 frames"),
        ("motion,videos=0", "0 videos"),
        ("motion,colour=3", "found 'colour=3'; expected name=number with videos, val_videos"),
        ("motion,seed=-1", "found 'seed=-1'"),
        ("digits,size=9", "builtin:digits has no options; found 'size=9'"),
    ],
)
def test_options_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_builtin(text)
