"""A data set in the order of its manifest, each sample once: what evaluation reads.

Enters: a data set's folder. Leaves: (image, label) by index, for torch's DataLoader with any sampler. Why it exists:
evaluation needs every sample exactly once and the same each time; a bad sample is an error there, as a replaced one
would change the figure silently.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from data_pipes.decode.limits import DEFAULT_MAX_PIXELS
from data_pipes.errors import SampleError
from data_pipes.shards.collection import Place
from data_pipes.shards.manifest import Manifest
from data_pipes.shards.members import IMAGE_EXTENSIONS, label_of
from data_pipes.shards.reader import RawSample, ShardReader
from data_pipes.shards.wanted import WantedMembers, checked_member
from data_pipes.store.storage import Storage
from data_pipes.store.transport import StorageConfig
from data_pipes.transforms.image import EvalTransform
from data_pipes.transforms.pictures import picture_of
from data_pipes.transforms.recipe import DTYPES


class Sequential(Dataset[tuple[Tensor, int]], ABC):
    """By index in the manifest's order, the tensor of a sample and its label (-1 where there is none). Cheap to pickle,
    safe for threads.
    """

    def __init__(
        self,
        source: Manifest | str | os.PathLike[str],
        extensions: Sequence[str],
        *,
        label_key: str | None,
        image_member: str | None,
        storage: StorageConfig | None,
    ) -> None:
        """Opens a data set.

        Args:
            source: a data set's folder or URL, or its manifest.
            extensions: the members that are read beside the label.
            label_key: the key of labels in `json` members, see `DataConfig`; None: these members are not read.
            image_member: which member is the picture or video, see `DataConfig`, where the data set has it: sets of
                evaluation need not be named as those of training.
            storage: how shards in a store are requested; None: the default settings.

        Raises:
            ValueError: there is no such data set, or its manifest is damaged.
        """
        self.manifest = source if isinstance(source, Manifest) else Manifest.load(source, Storage(storage))
        self.label_key = label_key
        self._ends = np.cumsum([shard.num_samples for shard in self.manifest.shards])
        self.member = checked_member(image_member)
        if self.member is not None:
            first = ShardReader(self.manifest, (), Storage(storage)).extensions(0)
            self.member = self.member if any(name in WantedMembers([self.member]) for name in first) else None
        pictures = extensions if self.member is None else (self.member,)
        members = (*pictures, "cls", *(() if label_key is None else ("json",)))
        self._reader = ShardReader(self.manifest, members, Storage(storage))

    @abstractmethod
    def decoded(self, raw: RawSample) -> Tensor:
        """The tensor of a sample.

        Raises:
            SampleError: the sample cannot be used.
        """

    def __len__(self) -> int:
        return self.manifest.num_samples

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One sample's tensor and label.

        Raises:
            SampleError: the sample cannot be used; the message names it.
            ShardError: the shard is not the one that was indexed; the message names it.
        """
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        """Several samples at once, as DataLoader asks for them: from a store they come in one round trip.

        Raises:
            SampleError: see `__getitem__`.
            ShardError: see `__getitem__`.
        """
        places = [self._place(index) for index in indices]
        raws = self._reader.read_many([Place(shard, sample) for shard, sample in places])
        return [self._usable(shard, raw) for (shard, _), raw in zip(places, raws, strict=True)]

    def key(self, index: int) -> str:
        """The key of a sample."""
        return self._reader.key(*self._place(index))

    def _usable(self, shard: int, raw: RawSample) -> tuple[Tensor, int]:
        """The tensor and the label of a sample; its errors name the sample."""
        try:
            label = label_of(raw, self.manifest.classes, self.label_key or "")
            return self.decoded(raw), label
        except SampleError as error:
            raise SampleError(
                error.cause, f"{raw.key} in {self.manifest.shards[shard].url}: {error}; repair or remove the sample"
            ) from error

    def _place(self, index: int) -> tuple[int, int]:
        """The shard that holds the sample of this index, and the sample's number in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a data set of {len(self)}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - (int(self._ends[shard - 1]) if shard else 0)


class SequentialImages(Sequential):
    """By index, a picture (uint8 or uint16 [C, *size]) and its label."""

    def __init__(
        self,
        source: Manifest | str | os.PathLike[str],
        transform: EvalTransform,
        *,
        channels: int = 3,
        bit_depth: int = 8,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        label_key: str | None = None,
        image_member: str | None = None,
        storage: StorageConfig | None = None,
    ) -> None:
        """Opens a data set of pictures.

        Args:
            source: see `Sequential`.
            transform: makes all pictures the same size.
            channels: C; see `decode_image`.
            bit_depth: of the pictures returned, 8 or 16.
            max_pixels: see `decode_image`.
            label_key: see `Sequential`.
            image_member: see `Sequential`.
            storage: see `Sequential`.

        Raises:
            ValueError: the bit depth is another one, or there is no such data set.
        """
        if bit_depth not in DTYPES:
            raise ValueError(f"bit_depth is {bit_depth}; expected 8 or 16")
        super().__init__(
            source, tuple(IMAGE_EXTENSIONS), label_key=label_key, image_member=image_member, storage=storage
        )
        self.transform, self.channels, self.max_pixels = transform, channels, max_pixels
        self._dtype = DTYPES[bit_depth]

    def decoded(self, raw: RawSample) -> Tensor:
        return self.transform(picture_of(raw, self.channels, self._dtype, self.max_pixels, self.member)).contiguous()
