"""Where the training data comes from and how it is loaded: the `data` part of a run's configuration.

Enters: `DataConfig`. Leaves: the collection of data sets, and the `SampleDataset` that workers read. Why it exists:
everything that can be wrong with data and configuration is found here, before a device is touched.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from data_pipes.cache.folder import CacheConfig
from data_pipes.decode.limits import DEFAULT_MAX_PIXELS
from data_pipes.loading.unindexed_stream import UnindexedConfig
from data_pipes.order.mixture_config import MixtureConfig
from data_pipes.order.order import OrderConfig
from data_pipes.store.transport import StorageConfig
from data_pipes.transforms.clips import ClipSampling


@dataclass(frozen=True)
class DataConfig:
    """Where the samples come from and how they are loaded. Size and channels belong to the model."""

    train: str | None = None
    # folder or URL of the training data set: the one with manifest.json
    mixture: MixtureConfig | None = None
    # several data sets with weights, instead of `train`
    unindexed: UnindexedConfig | None = None
    # compressed shards or others that cannot be indexed, instead of `train`; resume is approximate
    val: str | None = None
    # folder or URL of the validation data set; None: no validation
    workers: int = 0
    # per rank; 0: the training thread loads, when it needs a batch
    worker_kind: Literal["thread", "process"] = "thread"
    # threads cost less CPU; processes help where many workers would queue for Python's lock
    prefetch: int = 2
    # micro-batches loaded ahead, per worker
    max_bad_fraction: float = 0.01
    # of the samples consumed by a rank in this run; more bad samples stop the run
    order: OrderConfig = field(default_factory=OrderConfig)
    # see OrderConfig
    storage: StorageConfig = field(default_factory=StorageConfig)
    # requests to object stores
    cache: CacheConfig = field(default_factory=CacheConfig)
    # of chunks from object stores
    crop_scale: tuple[float, float] = (0.2, 1.0)
    # area of the random crop, as a fraction of the picture
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    # width / height of the random crop
    crop: Literal["random", "multi_scale"] = "random"
    # random: by crop_scale and crop_ratio; multi_scale: VideoMAE's, of clips only, see ClipTransform
    interpolation: Literal["bilinear", "bicubic"] | None = None
    # of resizing, antialiased; null: bicubic for pictures (which have no other), bilinear for clips
    flip: float = 0.5
    # probability of a left-right flip; 0: never
    scaled_decode: bool = True
    # JPEG crops that will shrink to a half or less are decoded at 1/2, 1/4 or 1/8; see TrainTransform.load
    max_pixels: int = DEFAULT_MAX_PIXELS
    # height * width of a picture, read from its header; larger ones count as bad
    bit_depth: int = 8
    # bits per channel of the batches, 8 or 16
    video: ClipSampling | None = None
    # which frames make a clip, for data sets of videos; None: pictures
    label_key: str | None = None
    # name of the label (a number or a class name) in the json member, where a sample has no cls; None: cls alone
    captions: bool = False
    # batches carry the captions (members txt, caption; json's "caption")
    metadata: bool = False
    # batches carry the json members
