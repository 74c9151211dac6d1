"""Several views of a video, and how they count as one: clips at several times by crops at several places.

In: the suite's choices, stored clips, scores of views. Out: the model's input, one score per sample. It exists so that
all protocols cut, normalise and average views in the same way.

Legend: n or B samples, V views of each, K classes, C channels, T frames, H/W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from data_pipes.bounds import bounded
from data_pipes.transforms.clip_sampling import ClipSampling
from pretrain.models.normalise import Normalise
from pretrain.objectives.clip_target import normalise_clips
from pretrain.weights.backbone import Backbone

Frames = Literal["all", "single"]
"""What is shown of a clip: all its frames, or one of them in place of all."""
Prepare = Callable[[Tensor], Tensor]
"""Stored images [B, C, H, W], or views [B, V, C, T, H, W] -> the model's input, one row per view."""


@dataclass(frozen=True)
class Views:
    """Views of a video: their number is clips * crops."""

    clips: int = bounded(1, least=1)
    """at evenly spread times, from the start of the video to its end; 1: in the middle"""
    crops: int = bounded(1, least=1)
    """of each clip: left to right, or top to bottom in an upright video; 1: in the centre"""

    def __post_init__(self) -> None:
        if min(self.clips, self.crops) < 1:
            raise ValueError(f"clips={self.clips}, crops={self.crops}: expected at least one of each")


@dataclass(frozen=True)
class TaskView:
    """What a task sees of a test video."""

    frames: Frames
    """all of a clip, or a single one in place of all"""
    views: Views
    """how many clips and crops"""


@dataclass(frozen=True)
class VideoConfig:
    """The views that a suite takes of videos; encoders of images do not read it."""

    views: Views = field(default_factory=Views)
    """of a test video; published: 5 x 3 (VideoMAE) and 8 x 3 (V-JEPA 2) on Kinetics, 2 x 3 on Something-Something"""
    train_views: Views = field(default_factory=Views)
    """of a training video whose features are computed once"""
    short_side: int | None = bounded(None, least=1)
    """of the resized frames, in pixels; null = the smallest that the crop fits into"""
    sampling: ClipSampling | None = None
    """frames, stride and mode of a clip; null = those of the run (`data.video`), or every fourth frame"""


def make_prepare(backbone: Backbone, frames: Frames) -> Prepare:
    """What turns stored pixels into the backbone's input.

    Args:
        backbone: what is evaluated.
        frames: `single` shows the clip's middle frame in place of every other, so that nothing moves: what a model
            gains from motion is the difference to `all`.

    Raises:
        ValueError: `single` with an encoder of images.
    """
    normalise = Normalise(backbone.mean, backbone.std)
    if backbone.interface.num_frames is None:
        if frames == "single":
            raise ValueError("frames=single is for encoders of clips; this one takes images: set it to all")
        return normalise

    def prepare(views: Tensor) -> Tensor:
        clips = views.flatten(0, 1)
        return normalise_clips(normalise, freeze(clips) if frames == "single" else clips)

    return prepare


def freeze(clips: Tensor) -> Tensor:
    """Clips [B, C, T, H, W] in which nothing moves: a view of the same shape whose every frame is frame T // 2."""
    middle = clips.shape[2] // 2
    return clips[:, :, middle : middle + 1].expand_as(clips)


def vote(logits: Tensor, views: int) -> Tensor:
    """One score per sample: the mean softmax of its views. A single view keeps its logits, which rank the same way.

    Args:
        logits: [B * V, ..., K]; the views of a sample are adjacent rows.
        views: V.

    Returns:
        [B, ..., K].
    """
    if views == 1:
        return logits
    scores: Tensor = logits.softmax(dim=-1).unflatten(0, (-1, views)).mean(dim=1)
    return scores


def view_short_side(image_size: tuple[int, int]) -> int:
    """Short side, in pixels, of a picture before the usual view is cut from it: 256 for 224 and its like for others,
    and the input's own for small inputs, whose borders count.

    Both borders are equally wide: libraries differ in which one gets the odd pixel, so a square picture of an export
    would be cut one pixel beside the place where evaluation cuts it (of 160 pixels, say, from 183).
    """
    side = max(image_size)
    return side if side <= 64 else side + 2 * round(side * (256 / 224 - 1) / 2)


def view_ratio(image_size: tuple[int, int]) -> float:
    """Short side / crop of the usual evaluation view, see `view_short_side`."""
    return view_short_side(image_size) / max(image_size)
