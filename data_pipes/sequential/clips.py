"""Videos in the order of their manifest, each once, as the fixed views that are averaged over: what evaluation reads.

Enters: a data set's folder. Leaves: (views, label) by index, for torch's DataLoader with any sampler. Why it exists: a
video is tested on several clips at fixed times and several crops at fixed places ("5x3 views"), all from one decode; a
bad sample is an error, as in `SequentialImages`.
Legend: V views = clips * crops, T frames of a clip, C channels, H/W pixels.
"""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from data_pipes.decode.limits import DEFAULT_MAX_PIXELS
from data_pipes.decode.video import VIDEO_EXTENSIONS, Video
from data_pipes.errors import SampleError
from data_pipes.order.hashing import Int64s
from data_pipes.sequential.pictures import Sequential
from data_pipes.shards.manifest import Manifest
from data_pipes.shards.members import encoded_video
from data_pipes.shards.reader import RawSample
from data_pipes.store.transport import StorageConfig
from data_pipes.transforms.clip_sampling import ClipSampling
from data_pipes.transforms.image import MAX_ASPECT, centre_start, size_of_short_side

_BELOW_ONE = 1 - 2**-53
"""The largest uniform number below 1: the end of a video."""


class SequentialClips(Sequential):
    """By index, the views of a video (uint8 [V, C, T, *size]) and its label.

    The views of the first clip come first, its crops from left to right (or from top to bottom).
    """

    def __init__(
        self,
        source: Manifest | str | os.PathLike[str],
        sampling: ClipSampling,
        size: tuple[int, int],
        *,
        channels: int = 3,
        views: tuple[int, int] = (1, 1),
        short_side: int | None = None,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        label_key: str | None = None,
        image_member: str | None = None,
        storage: StorageConfig | None = None,
    ) -> None:
        """Opens a data set of videos.

        Args:
            source: see `Sequential`.
            sampling: frames, stride and mode of a clip; `views` replaces its repeats.
            size: height and width of the views, in pixels.
            channels: 3 (RGB) or 1 (luma).
            views: the number of clips, and of crops of each clip.
            short_side: of the resized frames, in pixels; None: the smallest that `size` fits into.
            max_pixels: of a frame (height * width), at most.
            label_key: see `Sequential`.
            image_member: see `Sequential`.
            storage: see `Sequential`.

        Raises:
            ValueError: the views cannot be made so, or there is no such data set.
        """
        if min(views) < 1 or min(size) < 1:
            raise ValueError(
                f"views are {tuple(views)} and size {tuple(size)}; expected 1 or more clips, crops and pixels"
            )
        if short_side is not None and short_side < max(size):
            raise ValueError(
                f"views of {tuple(size)} do not fit into a short side of {short_side} pixels; expected at least "
                f"{max(size)}"
            )
        if channels not in (1, 3):
            raise ValueError(f"views of {channels} channels; expected 3 (RGB) or 1 (luma)")
        super().__init__(source, VIDEO_EXTENSIONS, label_key=label_key, image_member=image_member, storage=storage)
        self.sampling = replace(sampling, repeats=views[0], shared_window=False)
        self.size, self.views, self.short_side = (size[0], size[1]), (views[0], views[1]), short_side
        self.channels, self.max_pixels = channels, max_pixels

    def decoded(self, raw: RawSample) -> Tensor:
        with Video(encoded_video(raw, self.member), max_pixels=self.max_pixels) as video:
            return self._views_of(video)

    def _views_of(self, video: Video) -> Tensor:
        """The views of an open video, uint8 [V, C, T, *size]; all frames of all clips are decoded and resized once."""
        clips, crops = self.views
        windows = clip_windows(video, self.sampling)
        wanted, places = np.unique(windows, return_inverse=True)
        frames = torch.from_numpy(video.frames(wanted, self.channels)).permute(0, 3, 1, 2)  # [all, C, H, W]
        views = torch.empty((clips, crops, self.channels, windows.shape[1], *self.size), dtype=torch.uint8)
        for crop, part in enumerate(cut_crops(frames, self.size, self.short_side, crops)):
            for clip, rows in enumerate(places.reshape(windows.shape)):
                views[clip, crop] = part[torch.from_numpy(rows)].transpose(0, 1)
        return views.flatten(0, 1)


def cut_crops(frames: Tensor, size: tuple[int, int], short_side: int | None, crops: int) -> list[Tensor]:
    """The crops of decoded frames, which are resized once, bilinearly with antialias.

    Args:
        frames: uint8 [T, C, H, W].
        size: height and width of the crops, in pixels.
        short_side: see `resized_size`.
        crops: how many.

    Returns:
        Per crop, uint8 [T, C, *size].

    Raises:
        SampleError: "aspect" for frames that are too thin.
    """
    resized = resized_size(frames.shape[2], frames.shape[3], size, short_side)
    if tuple(frames.shape[2:]) != resized:
        frames = functional.interpolate(frames, resized, mode="bilinear", antialias=True)
    places = crop_places(resized, size, crops)
    return [frames[:, :, top : top + size[0], left : left + size[1]] for top, left in places]


def clip_windows(video: Video, sampling: ClipSampling) -> Int64s:
    """The frames of clips at evenly spread times; a single clip lies in the middle.

    In the mode "dense", the first clip starts with the video and the last one ends with it. In the mode "segments",
    clip k of n takes the frame at k/n of every segment, as VideoMAE tests on Something-Something.

    Args:
        video: the open video.
        sampling: frames, stride and mode of a clip, and `repeats`, the number of clips.

    Returns:
        The numbers of the frames, int64 [repeats, T].
    """
    count, dense = sampling.repeats, sampling.mode == "dense"
    last = count - 1 if dense else count
    times = [0.5] if count == 1 else [min(number / last, _BELOW_ONE) for number in range(count)]
    return sampling.indices(video, np.repeat(times, 1 if dense else sampling.num_frames))


def resized_size(height: int, width: int, size: tuple[int, int], short_side: int | None) -> tuple[int, int]:
    """The size that frames are resized to before views are cut from them; frames of the size of a view stay.

    The side that has to be computed is rounded down, as transformers and torchvision do.

    Args:
        height: of the frames, in pixels.
        width: of the frames, in pixels.
        size: height and width of the views, in pixels.
        short_side: of the resized frames, in pixels; None: the smallest that `size` fits into.

    Returns:
        Height and width, in pixels.

    Raises:
        SampleError: "aspect" for frames that are too thin.
    """
    if (height, width) == size:
        return size
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise SampleError("aspect", f"frames of {height} x {width} pixels are too thin to resize their short side")
    if short_side is None:
        if size[0] * width >= size[1] * height:  # the height decides
            return size[0], size[0] * width // height
        return size[1] * height // width, size[1]
    return size_of_short_side(height, width, short_side)


def crop_places(resized: tuple[int, int], size: tuple[int, int], crops: int) -> list[tuple[int, int]]:
    """Where views are cut: spread from one end of the frames to the other, along the side that leaves more room; a
    single view is cut from the centre. Places are rounded down, as in transformers and in VideoMAE's own code.

    Args:
        resized: height and width of the frames, in pixels.
        size: height and width of the views, in pixels.
        crops: how many views.

    Returns:
        Top and left of each view, in pixels.
    """
    rooms = resized[0] - size[0], resized[1] - size[1]
    top, left = (centre_start(full, crop) for full, crop in zip(resized, size, strict=True))
    if crops == 1:
        return [(top, left)]
    spread = [max(rooms) * number // (crops - 1) for number in range(crops)]
    return [(place, left) if rooms[0] > rooms[1] else (top, place) for place in spread]
