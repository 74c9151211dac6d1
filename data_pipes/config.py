"""Where the training data comes from and how it is loaded: the `data` part of a run's configuration.

Enters: `DataConfig`. Leaves: the collection of data sets, and the `SampleDataset` that workers read. Why it exists:
everything that can be wrong with data and configuration is found here, before a device is touched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from data_pipes.cache import CacheConfig, ChunkCache
from data_pipes.clips import ClipSampling, ClipTransform
from data_pipes.collection import Collection
from data_pipes.dataset import Extras, SampleDataset
from data_pipes.decode import DEFAULT_MAX_PIXELS
from data_pipes.image import TrainTransform
from data_pipes.manifest import Manifest
from data_pipes.mixture import MixtureConfig, MixtureOrder, SourceCounts
from data_pipes.order import Order, OrderConfig
from data_pipes.recipe import ClipRecipe, ImageRecipe, Recipe
from data_pipes.storage import Storage, StorageConfig
from data_pipes.unindexed import UnindexedConfig


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


def open_collection(config: DataConfig) -> Collection:
    """The manifests of the training data. Raises ValueError where none is named, or two ways to name them are mixed."""
    named = [name for name in ("mixture", "unindexed") if getattr(config, name) is not None]
    if config.mixture is not None and not config.mixture.sources:
        raise ValueError("data.mixture.sources is empty; list data sets, each with its `path` and `weight`")
    if config.train not in (None, "", "???"):
        named.insert(0, "train")
    if not named:
        raise ValueError("data.train is missing: name the folder of a data set, made with `tessera pack SRC OUT`")
    if len(named) > 1:
        raise ValueError(f"{' and '.join(f'data.{name}' for name in named)} are both given; name the data in one way")
    storage = Storage(config.storage)
    try:
        if config.mixture is None:
            assert config.train is not None
            return Collection((Manifest.load(config.train, storage),), ("train",))
        sources = config.mixture.sources
        manifests = tuple(Manifest.load(source.path, storage) for source in sources)
        return Collection(manifests, tuple(config.mixture.names()))
    finally:
        storage.close()


def open_recipe(config: DataConfig, image_size: tuple[int, int], channels: int) -> Recipe:
    """What a sample becomes. image_size: (height, width) in pixels."""
    if config.max_pixels > 2 * DEFAULT_MAX_PIXELS:
        raise ValueError(f"data.max_pixels is {config.max_pixels:,}; PIL reads at most {2 * DEFAULT_MAX_PIXELS:,}")
    if config.video is not None:
        return ClipRecipe(_clip_transform(config, config.video, image_size, channels), config.max_pixels)
    if config.crop != "random" or config.interpolation == "bilinear":
        raise ValueError(
            f"data.crop is {config.crop} and data.interpolation {config.interpolation}, and the data are pictures: "
            "expected random and bicubic; these settings are for clips, see data.video"
        )
    transform = TrainTransform(image_size, config.crop_scale, config.crop_ratio, config.flip, config.scaled_decode)
    return ImageRecipe(transform, channels, config.bit_depth, config.max_pixels)


def _clip_transform(
    config: DataConfig, sampling: ClipSampling, image_size: tuple[int, int], channels: int
) -> ClipTransform:
    fields = {field.name: field.default for field in dataclasses.fields(DataConfig)}
    unused = [name for name in ("crop_scale", "crop_ratio") if tuple(getattr(config, name)) != fields[name]]
    if config.crop == "multi_scale" and unused:
        raise ValueError(
            f"data.{unused[0]} is {getattr(config, unused[0])}, and data.crop is multi_scale, whose sizes are fixed; "
            f"leave data.{unused[0]} out, or set data.crop=random"
        )
    return ClipTransform(
        image_size,
        config.crop_scale,
        config.crop_ratio,
        config.flip,
        sampling,
        config.crop,
        config.interpolation or "bilinear",
        channels,
    )


def open_order(
    config: DataConfig, collection: Collection, global_batch: int, state: Mapping[str, Any] | None
) -> Order | MixtureOrder:
    """The order over the collection. state: of the checkpoint that is resumed; None: a new run, in which `global_batch`
    decides the number of streams. Raises ValueError when the state does not fit the data.
    """
    counts = [
        SourceCounts(
            [shard.num_samples for shard in manifest.shards],
            [shard.size_bytes for shard in manifest.shards],
            manifest.fingerprint,
        )
        for manifest in collection.manifests
    ]
    if config.mixture is not None:
        if state is None:
            return MixtureOrder.create(config.mixture, counts, config.order, global_batch)
        return MixtureOrder.from_state(state, config.mixture, counts, config.order)
    if state is None:
        decided = config.order.with_streams(collection.num_samples, global_batch)
        return Order(counts[0].samples_per_shard, counts[0].bytes_per_shard, decided, counts[0].fingerprint)
    return Order.from_state(
        state, counts[0].samples_per_shard, counts[0].bytes_per_shard, config.order, counts[0].fingerprint
    )


def open_dataset(
    config: DataConfig,
    *,
    image_size: tuple[int, int],
    channels: int,
    global_batch: int,
    state: Mapping[str, Any] | None = None,
    collection: Collection | None = None,
) -> SampleDataset:
    """The training data set. state: as Order.state wrote it, see `open_order`. collection: where it is open already.
    Raises ValueError.
    """
    recipe = open_recipe(config, image_size, channels)
    collection = collection or open_collection(config)
    return SampleDataset(
        collection,
        open_order(config, collection, global_batch, state),
        recipe,
        extras=Extras(config.label_key, config.captions, config.metadata),
        storage=Storage(config.storage),
        cache=None if config.cache.dir is None or not collection.is_remote else ChunkCache(config.cache),
    )
