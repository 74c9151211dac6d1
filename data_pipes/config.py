"""Where the training data comes from and how it is loaded: the `data` part of a run's configuration.

Enters: the part of a YAML. Leaves: a `DataConfig`, which data_pipes.open turns into what reads the data. Why it exists:
each part of the data path keeps its own configuration; here they are put together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from data_pipes.bounds import bounded
from data_pipes.cache.folder import CacheConfig
from data_pipes.decode.limits import DEFAULT_MAX_PIXELS
from data_pipes.loading.unindexed_stream import UnindexedConfig
from data_pipes.order.mixture_config import MixtureConfig
from data_pipes.order.order import OrderConfig
from data_pipes.store.transport import StorageConfig
from data_pipes.transforms.clip_sampling import ClipSampling


@dataclass(frozen=True)
class DataConfig:
    """Where the samples come from and how they are loaded. Size and channels belong to the model."""

    train: str | None = None
    """Folder or URL of the training data set: the one with manifest.json. null: see `mixture` and `unindexed`."""
    mixture: MixtureConfig | None = None
    """Several data sets with weights, instead of `train`; null: one data set."""
    unindexed: UnindexedConfig | None = None
    """Compressed shards or others that cannot be indexed, instead of `train`; resume is approximate. null: none."""
    val: str | None = None
    """Folder or URL of the validation data set; null: no validation."""
    workers: int = bounded(0, least=0)
    """Workers per rank; 0: the training thread loads, when it needs a batch."""
    worker_kind: Literal["thread", "process"] = "thread"
    """Threads cost less CPU; processes help where many workers would queue for Python's lock."""
    prefetch: int = bounded(2, least=1)
    """Micro-batches loaded ahead, per worker."""
    max_bad_fraction: float = bounded(0.01, least=0, most=1)
    """Of the samples consumed by a rank in this run; more bad samples stop the run."""
    order: OrderConfig = field(default_factory=OrderConfig)
    """In which order the samples come."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """Requests to object stores."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """Of chunks from object stores, on a local disk."""
    crop_scale: tuple[float, float] = bounded((0.2, 1.0), above=0, most=1)
    """Area of the random crop, as a fraction of the picture: least and most."""
    crop_ratio: tuple[float, float] = bounded((3 / 4, 4 / 3), above=0)
    """Width / height of the random crop: least and most."""
    crop: Literal["random", "multi_scale"] = "random"
    """random: by crop_scale and crop_ratio; multi_scale: VideoMAE's, of clips only, see ClipTransform."""
    interpolation: Literal["bilinear", "bicubic"] | None = None
    """Of resizing, antialiased; null: bicubic for pictures (which have no other), bilinear for clips."""
    flip: float = bounded(0.5, least=0, most=1)
    """Probability of a left-right flip; 0: never."""
    scaled_decode: bool = True
    """JPEG crops that will shrink to a half or less are decoded at 1/2, 1/4 or 1/8; see TrainTransform.load."""
    max_pixels: int = bounded(DEFAULT_MAX_PIXELS, least=1)
    """Height * width of a picture, read from its header; larger ones count as bad."""
    bit_depth: int = bounded(8, least=8, most=16)
    """Bits per channel of the batches, 8 or 16."""
    video: ClipSampling | None = None
    """Which frames make a clip, for data sets of videos; null: pictures."""
    image_member: str | None = None
    """Which member of a sample is its picture or video: what stands behind the first dot of its name, such as left.jpg,
    or a pattern, such as *.jpg for files with dots in their names; null: the first with a known ending."""
    label_key: str | None = None
    """Name of the label (a number or a class name) in the json member, where a sample has no cls; null: cls alone."""
    captions: bool = False
    """Whether batches carry the captions (members txt, caption; json's "caption")."""
    metadata: bool = False
    """Whether batches carry the json members."""
