"""From a global sample position to a transformed picture, its label and its key.

Enters: requests (positions and where their samples lie). Leaves: batches of one tensor, with the bad samples met on the
way. Why it exists: here, and only here, is decided what a position yields, so that ranks, threads and processes cannot
differ. Legend: B samples of a batch, C channels, H/W pixels.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_pipes.decode import DEFAULT_MAX_PIXELS, SampleError, decode_image
from data_pipes.hashing import Int64s, hash_uniform
from data_pipes.image import TrainTransform
from data_pipes.manifest import Manifest
from data_pipes.order import Order
from data_pipes.quarantine import BadDataError, BadSample
from data_pipes.reader import RawSample, ShardReader
from data_pipes.shard_index import ShardError

IMAGE_EXTENSIONS = (
    "jpg jpeg png webp npy tif tiff bmp gif ppm pgm pbm pnm jp2 avif tga qoi".split()  # noqa: SIM905
)
"""Members that are pictures, in the order of preference where a sample has several."""
_MAX_SUBSTITUTES = 16
_AUGMENTATION = 0
_DTYPES = {8: torch.uint8, 16: torch.uint16}


@dataclass(frozen=True)
class Batch:
    """A micro-batch."""

    images: Tensor
    # [B, C, H, W] uint8 or uint16, contiguous
    labels: Tensor
    # [B] int64, -1 where there is none
    positions: Tensor
    # [B] int64, global sample positions
    keys: list[str]
    # [B]; of the substitute where a sample was bad

    def to(self, device: torch.device) -> Batch:
        """The same on a device; from page-locked memory without waiting for the copy."""
        images, labels, positions = (
            tensor.to(device, non_blocking=True) for tensor in (self.images, self.labels, self.positions)
        )
        return Batch(images, labels, positions, self.keys)

    def pin_memory(self) -> Batch:
        """The same in page-locked memory, from which copies to a CUDA device overlap with work."""
        return Batch(self.images.pin_memory(), self.labels.pin_memory(), self.positions.pin_memory(), self.keys)


class Request(NamedTuple):
    """What a worker is asked for. The places come along, so that workers plan an epoch only to replace a bad sample."""

    positions: Int64s  # [B]
    shards: Int64s  # [B]
    samples: Int64s  # [B]


@dataclass
class Timings:
    """CPU work of a batch's worker, in seconds of wall time."""

    read_s: float = 0.0
    decode_s: float = 0.0
    transform_s: float = 0.0

    def add(self, other: Timings) -> None:
        self.read_s += other.read_s
        self.decode_s += other.decode_s
        self.transform_s += other.transform_s


@dataclass(frozen=True)
class Loaded:
    """What a worker answers: a batch, or the error that the trainer shall see."""

    batch: Batch | None
    bad: tuple[BadSample, ...] = ()
    timings: Timings = field(default_factory=Timings)
    error: BadDataError | ShardError | None = None

    def pin_memory(self) -> Loaded:
        pinned = None if self.batch is None else self.batch.pin_memory()
        return Loaded(pinned, self.bad, self.timings, self.error)


class ImageDataset:
    """Pictures in the order of training, endless. Safe for threads; cheap to pickle."""

    def __init__(
        self,
        manifest: Manifest,
        order: Order,
        transform: TrainTransform,
        *,
        channels: int = 3,
        bit_depth: int = 8,
        max_pixels: int = DEFAULT_MAX_PIXELS,
    ) -> None:
        """channels: of the batches. bit_depth: 8 or 16; in a data set of 16 bits, 8-bit pictures are widened."""
        if bit_depth not in _DTYPES:
            raise ValueError(f"data.bit_depth is {bit_depth}; expected 8 or 16")
        self.manifest, self.order, self.transform = manifest, order, transform
        self.channels, self.dtype, self.max_pixels = channels, _DTYPES[bit_depth], max_pixels
        self._reader = ShardReader(manifest, (*IMAGE_EXTENSIONS, "cls"))

    def request(self, positions: Int64s) -> Request:
        """The request for positions [B]."""
        located = self.order.locate(positions)
        return Request(positions, located.shard, located.sample)

    def item(self, position: int) -> tuple[Tensor, int, str]:
        """(image [C, H, W], label, key) at one position. Raises BadDataError and ShardError as `load` reports them."""
        loaded = self.load(self.request(np.array([position], np.int64)))
        if loaded.batch is None:
            assert loaded.error is not None
            raise loaded.error
        return loaded.batch.images[0], int(loaded.batch.labels[0]), loaded.batch.keys[0]

    def load(self, request: Request) -> Loaded:
        """Reads, decodes and transforms one batch. Bad samples are replaced and listed."""
        size = len(request.positions)
        images = torch.empty((size, self.channels, *self.transform.size), dtype=self.dtype)
        labels, keys = torch.empty(size, dtype=torch.int64), []
        bad: list[BadSample] = []
        timings = Timings()
        uniforms = hash_uniform(
            self.order.config.seed, request.positions, _AUGMENTATION, self.transform.num_uniforms
        ).tolist()
        for i, position in enumerate(request.positions.tolist()):
            place = int(request.shards[i]), int(request.samples[i])
            try:
                images[i], labels[i], key = self._usable(position, place, uniforms[i], bad, timings)
            except (ShardError, BadDataError) as error:
                return Loaded(None, tuple(bad), timings, error)
            keys.append(key)
        return Loaded(Batch(images, labels, torch.from_numpy(request.positions), keys), tuple(bad), timings)

    def _usable(
        self,
        position: int,
        place: tuple[int, int],
        uniforms: Sequence[float],
        bad: list[BadSample],
        timings: Timings,
    ) -> tuple[Tensor, int, str]:
        """The sample at `place`, or the first usable substitute; failures are added to `bad`."""
        own = len(bad)
        for attempt in range(_MAX_SUBSTITUTES + 1):
            shard, sample = self.order.substitute(position, attempt) if attempt else place
            try:
                return self._load_one(shard, sample, uniforms, timings)
            except SampleError as error:
                url, key = self.manifest.shards[shard].url, self._reader.key(shard, sample)
                bad.append(BadSample(url, key, error.cause, str(error), position, attempt > 0))
            except ShardError:
                raise
            except Exception as error:
                url, key = self.manifest.shards[shard].url, self._reader.key(shard, sample)
                error.add_note(f"while loading {key} of {url}, position {position}")
                raise
        first = bad[own]
        raise BadDataError(
            f"the sample at position {position} and {_MAX_SUBSTITUTES} substitutes are all bad. The first: {first.key} "
            f"in {first.shard}: {first.error}. Check the data set, data.max_pixels and the model's channels"
        )

    def _load_one(
        self, shard: int, sample: int, uniforms: Sequence[float], timings: Timings
    ) -> tuple[Tensor, int, str]:
        started = time.perf_counter()
        raw = self._reader.read(shard, sample)
        read = time.perf_counter()
        label = label_of(raw, len(self.manifest.classes))
        picture = picture_of(raw, self.channels, self.dtype, self.max_pixels)
        decoded = time.perf_counter()
        image = self.transform(picture, uniforms)
        timings.add(Timings(read - started, decoded - read, time.perf_counter() - decoded))
        return image, label, raw.key


def picture_of(raw: RawSample, channels: int | None, dtype: torch.dtype, max_pixels: int) -> Tensor:
    """The decoded picture [C, H, W] of a sample. Raises SampleError: "no_image", "bit_depth" and as decode_image."""
    for extension in IMAGE_EXTENSIONS:
        if extension in raw.members:
            image = decode_image(raw.members[extension], channels, max_pixels)
            break
    else:
        raise SampleError("no_image", f"no picture among the members {list(raw.found)}")
    if image.dtype == dtype:
        return image
    if dtype == torch.uint8:
        raise SampleError("bit_depth", "16-bit picture in a data set of 8 bits; set data.bit_depth=16")
    return (image.to(torch.int32) * 257).to(dtype)


def label_of(raw: RawSample, num_classes: int) -> int:
    """The class in the member `cls`, -1 without one. Raises SampleError "label" when it is no integer in ASCII digits
    or not below `num_classes` (0: unknown).
    """
    if "cls" not in raw.members:
        return -1
    text = raw.members["cls"].strip()
    if not text.isdigit() or len(text) > 9 or (num_classes and int(text) >= num_classes):
        expected = f"0 to {num_classes - 1}" if num_classes else "an integer in ASCII digits"
        raise SampleError("label", f"the label (.cls) is {text[:40]!r}; expected {expected}")
    return int(text)
