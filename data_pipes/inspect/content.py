"""Whether the content of a sample is what training can use: its picture or video, its label, its caption.

Enters: samples, or the index of a shard. Leaves: what is wrong with them. Why it exists: `tessera data verify` has to
find what a run would, before the run: also that there is nothing to look at.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from data_pipes.decode.limits import DEFAULT_MAX_PIXELS
from data_pipes.decode.picture import decode_pixels
from data_pipes.decode.pil import PNG_MAGIC, is_needed_chunk
from data_pipes.decode.video import VIDEO_EXTENSIONS, Video
from data_pipes.decode.video_container import is_container
from data_pipes.errors import DecodeError, SampleError
from data_pipes.shards.index_file import ShardIndex
from data_pipes.shards.members import (
    CAPTION_EXTENSIONS,
    IMAGE_EXTENSIONS,
    LABEL_EXTENSIONS,
    caption_of,
    encoded_picture,
    encoded_video,
    label_of,
)
from data_pipes.shards.reader import RawSample
from data_pipes.shards.wanted import WantedMembers

NO_MEDIA = "no_image"
"""The cause of a sample without picture and video."""
Found = tuple[str | None, str, str]
"""Key, cause and error of a flaw."""
Decoded = Literal["picture", "video"]


@dataclass(frozen=True)
class Check:
    """What is checked beyond the headers."""

    decode: bool = False
    """Whether every picture and video is decoded, and every label and caption read."""
    label_key: str = "label"
    """The key of labels in `json` members."""
    max_pixels: int = DEFAULT_MAX_PIXELS
    """Pixels of a picture or frame (height * width), at most."""
    member: str | None = None
    """Which member is the picture or video, see `DataConfig.image_member`; None: what has a known ending."""

    @property
    def media(self) -> WantedMembers:
        """The members of which each sample has to have one: pictures, videos, or the tensors of `tessera encode`."""
        known = (*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS, "safetensors", "*.safetensors")
        return WantedMembers(known if self.member is None else (self.member,))

    @property
    def read(self) -> tuple[str, ...]:
        """The members that are read where samples are decoded."""
        media = (*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS) if self.member is None else (self.member,)
        return *media, *LABEL_EXTENSIONS, *CAPTION_EXTENSIONS


def samples_without_media(index: ShardIndex, check: Check) -> Iterator[Found]:
    """Gives a flaw for each sample that training could not use, as nothing in it is a picture or a video."""
    media = check.media
    is_media = np.array([extension in media for extension in index.extensions], bool)
    starts = index.first_member[:-1].astype(np.int64)
    has_media = np.logical_or.reduceat(is_media[index.member_extension.astype(np.int64)], starts)
    for sample in np.flatnonzero(~has_media).tolist():
        named = "picture or video" if check.member is None else f"member {check.member}"
        yield index.key(sample), NO_MEDIA, f"no {named} among the members {list(index.members(sample))}"


def _check_picture(data: bytes, max_pixels: int) -> None:
    """Decodes a picture; of a PNG also every checksum of what its pixels need is compared, which decoding does not do
    once they are complete.

    Raises:
        DecodeError: see `decode_pixels`; "checksum" for a damaged PNG that still decodes.
    """
    decode_pixels(data, None, max_pixels)
    if not data.startswith(PNG_MAGIC):
        return
    start, part = len(PNG_MAGIC), b""
    while part != b"IEND":
        length = int.from_bytes(data[start : start + 4], "big")
        part, checksum = data[start + 4 : start + 8 + length], data[start + 8 + length : start + 12 + length]
        is_wrong = zlib.crc32(part) != int.from_bytes(checksum, "big") and is_needed_chunk(part[:4])
        if len(checksum) < 4 or is_wrong:
            found = f"the part {part[:4]!r} at byte {start:,} is cut or has a wrong checksum"
            raise DecodeError("checksum", f"damaged PNG that still decodes: {found}")
        start += 12 + length


def _check_video(data: bytes, max_pixels: int) -> None:
    """Decodes all frames of a video.

    Raises:
        SampleError: see `Video`.
        ImportError: PyAV is not installed.
    """
    with Video(data, max_pixels=max_pixels) as video:
        for _ in video.each_frame(np.arange(video.num_frames), lambda frame: None):
            pass


def sample_flaws(raw: RawSample, classes: Sequence[str], check: Check) -> Iterator[Found | Decoded]:
    """Gives each flaw of a sample, and what was decoded of it."""
    seen: set[tuple[str, str]] = set()
    for decoded, part in _parts(raw, classes, check):
        try:
            part()
            if decoded is not None:
                yield decoded
        except SampleError as error:
            if (error.cause, str(error)) not in seen:  # broken JSON is met as label and as caption
                seen.add((error.cause, str(error)))
                yield raw.key, error.cause, str(error)


def _parts(
    raw: RawSample, classes: Sequence[str], check: Check
) -> Iterator[tuple[Decoded | None, Callable[[], object]]]:
    """What is checked of a sample: what it decodes, and the check."""
    yield None, partial(label_of, raw, classes, check.label_key)
    yield None, partial(caption_of, raw)
    named = check.member is not None and any(name in check.media for name in raw.members)
    if named:
        data = encoded_picture(raw, check.member)
        is_video = is_container(data)
        yield (
            "video" if is_video else "picture",
            partial(_check_video if is_video else _check_picture, data, check.max_pixels),
        )
    elif check.member is None and any(extension in raw.members for extension in IMAGE_EXTENSIONS):
        yield "picture", partial(_check_picture, encoded_picture(raw), check.max_pixels)
    if check.member is None and any(extension in raw.members for extension in VIDEO_EXTENSIONS):
        yield "video", partial(_check_video, encoded_video(raw), check.max_pixels)
