"""The pictures of a shard in groups that are encoded together, read and decoded while the group before is encoded.

Enters: a data set's manifest and the options. Leaves: samples in the order of their shard, with their pictures or with
why there is none.
Legend: C channels, H/W pixels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipes.errors import SampleError
from data_pipes.shards.collection import Place
from data_pipes.shards.manifest import Manifest
from data_pipes.shards.members import IMAGE_EXTENSIONS
from data_pipes.shards.reader import RawSample, ShardReader
from data_pipes.store.storage import Storage
from data_pipes.store.transport import StorageConfig
from data_pipes.transforms.pictures import picture_of
from pretrain.latents.options import EncodeOptions

_WINDOW_BATCHES = 4
"""Pictures of any size: among so many batches those of equal size are encoded together."""


@dataclass(frozen=True)
class LoadedSample:
    """A sample whose picture was read, or why it was not."""

    raw: RawSample
    """its key and members"""
    picture: Tensor | None
    """[C, H, W], as it is encoded; None: it could not be read"""
    error: SampleError | None = None
    """why not"""


class PictureReader:
    """Reads and decodes the samples of one data set in threads."""

    def __init__(
        self,
        manifest: Manifest,
        options: EncodeOptions,
        channels: int,
        *,
        workers: int = 2,
        storage: StorageConfig | None = None,
    ) -> None:
        """Starts the threads.

        Args:
            manifest: of the pictures.
            options: the view, the bit depth, and which members are read too.
            channels: C.
            workers: number of threads, at least 1.
            storage: how shards are read; None: the defaults.
        """
        self.manifest, self.options, self.channels = manifest, options, channels
        self._transform = options.transform()
        self._reader = ShardReader(manifest, (*IMAGE_EXTENSIONS, *options.carried), Storage(storage))
        self._pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="decode")

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(cancel_futures=True)
        self._reader.close()

    def windows(self, shard: int) -> Iterator[list[LoadedSample]]:
        """The samples of a shard in order, in groups that are encoded together; the next group is read meanwhile."""
        num_samples = self.manifest.shards[shard].num_samples
        length = self.options.batch_size * (_WINDOW_BATCHES if self.options.size is None else 1)
        ahead: deque[list[Future[LoadedSample]]] = deque()
        try:
            for first in range(0, num_samples, length):
                numbers = range(first, min(first + length, num_samples))
                ahead.append([self._pool.submit(self._load, shard, number) for number in numbers])
                if len(ahead) > 1:
                    yield [future.result() for future in ahead.popleft()]
            while ahead:
                yield [future.result() for future in ahead.popleft()]
        finally:
            for futures in ahead:
                for future in futures:
                    future.cancel()

    def _load(self, shard: int, number: int) -> LoadedSample:
        """Reads and decodes one sample, in a thread."""
        raw = next(self._reader.read_many([Place(shard, number)]))
        stored = torch.uint8 if self.options.bit_depth == 8 else torch.uint16
        try:
            picture = picture_of(raw, self.channels, stored, self.options.max_pixels)
            return LoadedSample(raw, (picture if self._transform is None else self._transform(picture)).contiguous())
        except SampleError as error:
            return LoadedSample(raw, None, error)
