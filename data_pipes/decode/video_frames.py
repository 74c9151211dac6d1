"""Which frames a video has, and which packets have to be decoded for some of them.

Enters: the packets of a video stream in the order of the file. Leaves: a `FrameTable`: for each frame, in order of
presentation, its time, its packet and the keyframe that decoding begins at. Why it exists: headers are often wrong
about the number of frames, and seeking by time is inexact in half of the containers; a list of packets is neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipes.order.hashing import Int64s


class PacketLike(Protocol):
    """What is asked of PyAV's packets."""

    @property
    def pts(self) -> int | None:
        """The time of presentation, in the stream's unit."""

    @property
    def is_keyframe(self) -> bool:
        """Whether decoding may begin here."""


class PacketRange(NamedTuple):
    """Packets to decode one after the other, and the frames that are wanted of them."""

    first: int
    """Its place in the file."""
    last: int
    """Its place in the file; it belongs to the range."""
    slots: dict[int, int]
    """By label (see `FrameTable`), the place of a wanted frame among all wanted ones."""


@dataclass(frozen=True, eq=False)
class FrameTable:
    """The frames of a video, [N], in order of presentation."""

    label: Int64s
    """By which a frame is known when it leaves the decoder: its time of presentation, or (see `counted`) its number."""
    position: Int64s
    """Of its packet in the file."""
    start: Int64s
    """Position of the keyframe to begin decoding at."""
    counted: bool
    """Times of presentation are missing or repeat: frames are numbered as they leave the decoder."""
    times_s: NDArray[np.float64]
    """Seconds from the first frame."""
    last_s: float
    """Seconds for which the last frame is shown."""
    longest_gop: int
    """Packets from one keyframe to the next, at most."""

    def packet_ranges(self, wanted: Int64s) -> list[PacketRange]:
        """What to decode for frames. Ranges that touch become one.

        Args:
            wanted: indices of frames, ascending, each once.
        """
        ranges: list[PacketRange] = []
        for slot, index in enumerate(wanted.tolist()):
            start, position, label = int(self.start[index]), int(self.position[index]), int(self.label[index])
            if ranges and ranges[-1].first <= start <= ranges[-1].last + 1:
                first, last, slots = ranges.pop()
                ranges.append(PacketRange(first, max(last, position), {**slots, label: slot}))
            else:
                ranges.append(PacketRange(start, position, {label: slot}))
        return ranges


def list_frames(
    packets: Sequence[PacketLike], shown: Sequence[bool], tick_s: float | None, frame_s: float, reorders: bool
) -> FrameTable:
    """The frames that packets give.

    Args:
        packets: of the video stream, in the order of the file.
        shown: [packets], False where a packet gives no frame to see.
        tick_s: unit of the packets' times, in seconds; None: they are not the times of presentation.
        frame_s: nominal time of a frame, in seconds, for files without times.
        reorders: whether the codec shows frames in another order than it stores them.
    """
    keys = np.array([n for n, packet in enumerate(packets) if packet.is_keyframe] or [0], np.int64)
    position = np.array([n for n in range(keys[0], len(packets)) if shown[n]], np.int64)
    times = [packets[n].pts for n in position]
    if reorders and times and times[0] is not None:
        # A cut open group: what was shown before its keyframe has times below zero, which Matroska cannot store, and no
        # decoder gives it.
        num_cut = len(list(takewhile(lambda time: time is None, times[1:])))
        position, times = np.delete(position, slice(1, 1 + num_cut)), times[:1] + times[1 + num_cut :]
    key_times = [packets[n].pts for n in keys]
    counted = tick_s is None or None in times or None in key_times or len(set(times)) < len(times)
    if tick_s is None or counted:
        label = np.arange(len(position), dtype=np.int64)
        # to count from another keyframe than the first one, no frame may be shown before the keyframe that it follows
        start = np.full(len(position), keys[0]) if reorders else keys[np.searchsorted(keys, position, "right") - 1]
        times_s, last_s = np.asarray(label * frame_s, np.float64), frame_s
    else:
        label, key_pts = np.array(times, np.int64), np.array(key_times, np.int64)
        order = np.argsort(label)
        order = order[label[order] >= key_pts[0]]
        label, position = label[order], position[order]
        # the frames that an open group shows before its keyframe need the group before
        before = np.minimum(np.searchsorted(key_pts, label, "right"), np.searchsorted(keys, position, "right"))
        start = keys[before - 1]
        times_s = np.asarray((label - label[:1]) * tick_s, np.float64)
        last_s = float(np.median(np.diff(times_s))) if len(label) > 1 else frame_s
    gop = int(np.diff(np.append(keys, len(packets))).max())
    return FrameTable(label, position, start, counted, times_s, last_s, gop)
