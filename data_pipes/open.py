"""From the `data` part of a run to the objects that read it.

Enters: a `DataConfig`. Leaves: the collection of shards, the recipe of a sample, the order, the data set, and the
loader of unindexed shards. It stands apart from the configuration so that reading a YAML imports nothing that reads
data.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipes.cache.cache import ChunkCache
from data_pipes.config import DataConfig
from data_pipes.decode.limits import DEFAULT_MAX_PIXELS
from data_pipes.decode.tiff import import_tifffile
from data_pipes.loading.dataset import Extras, SampleDataset
from data_pipes.loading.unindexed_loader import SampleMaker, UnindexedLoader
from data_pipes.loading.unindexed_stream import SampleStream, expand_urls
from data_pipes.order.mixture import MixtureOrder, SourceCounts
from data_pipes.order.order import Order
from data_pipes.shards.collection import Collection
from data_pipes.shards.load_index import load_index
from data_pipes.shards.manifest import Manifest
from data_pipes.shards.members import no_media
from data_pipes.shards.wanted import WantedMembers, checked_member
from data_pipes.store.storage import Storage
from data_pipes.transforms.clip_sampling import ClipSampling
from data_pipes.transforms.clips import ClipTransform
from data_pipes.transforms.image import TrainTransform
from data_pipes.transforms.recipe import ClipRecipe, ImageRecipe, Recipe

if TYPE_CHECKING:
    from data_pipes.batch import BatchPlan


def open_collection(config: DataConfig) -> Collection:
    """The manifests of the training data.

    Raises:
        ValueError: none is named, two ways to name them are mixed, or a manifest cannot be used.
    """
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
    """What a sample becomes.

    Args:
        config: the crops, the frames of a clip and the limits.
        image_size: (height, width) in pixels.
        channels: of the model.
    Raises:
        ValueError: settings contradict each other.
    """
    if config.max_pixels > 2 * DEFAULT_MAX_PIXELS:
        raise ValueError(f"data.max_pixels is {config.max_pixels:,}; PIL reads at most {2 * DEFAULT_MAX_PIXELS:,}")
    member = checked_member(config.image_member)
    if config.video is not None:
        return ClipRecipe(_clip_transform(config, config.video, image_size, channels), config.max_pixels, member)
    if config.crop != "random" or config.interpolation == "bilinear":
        raise ValueError(
            f"data.crop is {config.crop} and data.interpolation {config.interpolation}, and the data are pictures: "
            "expected random and bicubic; these settings are for clips, see data.video"
        )
    transform = TrainTransform(image_size, config.crop_scale, config.crop_ratio, config.flip, config.scaled_decode)
    return ImageRecipe(transform, channels, config.bit_depth, config.max_pixels, member)


def _clip_transform(
    config: DataConfig, sampling: ClipSampling, image_size: tuple[int, int], channels: int
) -> ClipTransform:
    fields = {field.name: field.default for field in dataclasses.fields(config)}
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
    """The order over a collection.

    Args:
        config: of the order and the mixture.
        collection: the data sets.
        global_batch: samples per step, over all ranks; in a new run it decides the number of streams.
        state: of the checkpoint that is resumed; None: a new run.
    Raises:
        ValueError: the state does not fit the data.
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
    """The training data set.

    Args:
        config: of the run.
        image_size: (height, width) in pixels.
        channels: of the model.
        global_batch: samples per step, over all ranks.
        state: of the checkpoint that is resumed, as Order.state wrote it; None: a new run.
        collection: where it is open already; None: it is opened here.
    Raises:
        ValueError: the configuration or the data cannot be used.
    """
    recipe = open_recipe(config, image_size, channels)
    collection = collection or open_collection(config)
    dataset = SampleDataset(
        collection,
        open_order(config, collection, global_batch, state),
        recipe,
        extras=Extras(config.label_key, config.captions, config.metadata),
        storage=Storage(config.storage),
        cache=None if config.cache.dir is None or not collection.is_remote else ChunkCache(config.cache),
    )
    _check_some_sample_fits(dataset, config)
    _check_tiff_can_be_read(dataset)
    return dataset


def _check_some_sample_fits(dataset: SampleDataset, config: DataConfig) -> None:
    """Looks for the first shard of each source in which a sample has what the run reads; usually that is the first one.

    Raises:
        ValueError: no sample of a source has a picture, or a video; the message names the members that are there.
    """
    wanted, storage = WantedMembers(dataset.recipe.extensions), Storage(config.storage)
    try:
        for manifest in dataset.collection.manifests:
            found: dict[str, None] = {}
            for shard in range(len(manifest.shards)):
                extensions = load_index(manifest, shard, storage).extensions
                if any(extension in wanted for extension in extensions):
                    break
                found.update(dict.fromkeys(extensions))
            else:
                what = "picture" if config.video is None else "video"
                raise ValueError(no_media(str(manifest.root), what, list(found), config.image_member))
    finally:
        storage.close()


def _check_tiff_can_be_read(dataset: SampleDataset) -> None:
    """Looks into the first shard of each source for TIFFs, where what reads them is not installed.

    A first TIFF further on ends the run when it is met: a missing package is no fault of the sample, and on another
    machine it would not be replaced.

    Raises:
        ValueError: there are TIFFs; the message says what to install.
    """
    try:
        if all(map(importlib.util.find_spec, ("tifffile", "imagecodecs"))):  # imports nothing
            return
        shard = 0
        for manifest in dataset.collection.manifests:
            if {"tif", "tiff"} & {*dataset.recipe.extensions} & {*dataset.reader.extensions(shard)}:
                import_tifffile()
            shard += len(manifest.shards)
    except ImportError as error:
        raise ValueError(f"{dataset.collection.shard_url(shard)}: has TIFFs; {error}") from error


def open_unindexed(
    config: DataConfig,
    plan: BatchPlan,
    image_size: tuple[int, int],
    channels: int,
    state: Mapping[str, Any] | None = None,
    quarantine_dir: Path | None = None,
) -> UnindexedLoader:
    """The loader for `config.unindexed`.

    Args:
        config: of the run.
        plan: this rank's share of each step.
        image_size: (height, width) in pixels.
        channels: of the model.
        state: of the checkpoint that is resumed; None: a new run.
        quarantine_dir: gets the lists of bad samples; None: they are only counted.
    Raises:
        ValueError: the configuration or the state cannot be used.
    """
    assert config.unindexed is not None
    if config.worker_kind != "thread" and config.workers:
        raise ValueError("data.worker_kind is 'process', which data.unindexed does not offer; set it to thread")
    recipe, storage = open_recipe(config, image_size, channels), Storage(config.storage)
    extras = Extras(config.label_key, config.captions, config.metadata)
    urls = expand_urls(config.unindexed.urls, storage)
    extensions = (*recipe.extensions, *extras.extensions)
    stream = SampleStream(
        urls,
        extensions,
        storage,
        config.unindexed,
        seed=config.order.seed,
        rank=plan.rank,
        world_size=plan.world_size,
    )
    loader = UnindexedLoader(
        stream,
        SampleMaker(recipe, recipe.num_uniforms, extras),
        plan,
        workers=config.workers,
        prefetch=config.prefetch,
        max_bad_fraction=config.max_bad_fraction,
        quarantine_dir=quarantine_dir,
    )
    if state is not None:
        loader.check_state(state)
    return loader
