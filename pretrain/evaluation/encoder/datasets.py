"""The labelled images or videos of an evaluation: a training and a test set with the same classes, in fixed views.

In: a backbone (its input size, channels, and its run's data folders) and the suite's choices. Out: two map-style
datasets in the order of their manifests. It exists to find a missing, unlabelled or differently labelled dataset before
any work starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from data_pipes.config import DataConfig
from data_pipes.sequential.clips import SequentialClips
from data_pipes.sequential.pictures import SequentialImages
from data_pipes.shards.collection import Place
from data_pipes.shards.manifest import Manifest
from data_pipes.shards.members import label_of
from data_pipes.shards.reader import ShardReader
from data_pipes.store.storage import Storage
from data_pipes.store.transport import StorageConfig
from data_pipes.transforms.image import EvalTransform
from pretrain.evaluation.encoder.views import VideoConfig, view_ratio
from pretrain.weights.backbone import Backbone


@dataclass(frozen=True)
class EvaluationData:
    """Two datasets that share their classes."""

    train: SequentialImages | SequentialClips
    """the training set, in the order of its manifest"""
    test: SequentialImages | SequentialClips
    """the test set, in the order of its manifest"""
    train_folder: str
    """folder or URL of the training set"""
    num_classes: int
    """of both"""
    train_fingerprint: str
    """of the training set's manifest"""
    test_fingerprint: str
    """of the test set's manifest"""
    view: Mapping[str, object]
    """how samples are cut and resized, for the record of a result"""


def open_evaluation_data(
    backbone: Backbone,
    *,
    train: str | None,
    test: str | None,
    resize_ratio: float | None,
    video: VideoConfig | None = None,
) -> EvaluationData:
    """Opens the datasets for one backbone.

    Args:
        backbone: gives image size, frames and channels, and its run's `data.train` and `data.val`.
        train: folder of the training set; None: the run's.
        test: folder of the test set; None: the run's.
        resize_ratio: short side of the resized image / longer side of the centre crop; None is `view_ratio`. Images
            that already have the input's size stay as they are. Videos have `video.short_side` instead.
        video: the views of videos, for an encoder of clips; None is one view in the middle.

    Raises:
        ValueError: a folder that is not given, is no dataset or has no classes; two that differ in their classes or
            hold the same samples; clips that the encoder does not take.
    """
    run = backbone.config
    folders = {
        "train": train or (run.data.train if run is not None else None),
        "test": test or (run.data.val if run is not None else None),
    }
    for side, folder in folders.items():
        if not folder:
            raise ValueError(f"no {side} data: {backbone.source} names none, set {side}=FOLDER (a packed dataset)")
    storage = Storage(loading_config(backbone).storage)
    manifests = {side: Manifest.load(str(folder), storage) for side, folder in folders.items()}
    for side, manifest in manifests.items():
        if not manifest.classes:
            raise ValueError(
                f"the {side} samples in {folders[side]} have no labels: accuracies need a dataset packed from class "
                "folders"
            )
    if manifests["train"].classes != manifests["test"].classes:
        raise ValueError(
            f"{folders['train']} has {len(manifests['train'].classes)} classes ({_some(manifests['train'].classes)}), "
            f"{folders['test']} has {len(manifests['test'].classes)} ({_some(manifests['test'].classes)}): "
            "pack both from the same classes, in the same order"
        )
    if manifests["train"].fingerprint == manifests["test"].fingerprint:
        raise ValueError(
            f"{folders['train']} and {folders['test']} hold the same samples: a figure on samples that were trained on "
            "says nothing, set test=FOLDER to others"
        )
    opened, view = _open_views(backbone, manifests, resize_ratio, video or VideoConfig())
    return EvaluationData(
        train=opened["train"],
        test=opened["test"],
        train_folder=str(folders["train"]),
        num_classes=len(manifests["train"].classes),
        train_fingerprint=manifests["train"].fingerprint,
        test_fingerprint=manifests["test"].fingerprint,
        view=view,
    )


def _open_views(
    backbone: Backbone, manifests: Mapping[str, Manifest], resize_ratio: float | None, video: VideoConfig
) -> tuple[Mapping[str, SequentialImages | SequentialClips], dict[str, object]]:
    """The datasets by side ("train", "test"), and what their views are, for the record of a result."""
    config, sampling = backbone.interface, video.sampling or backbone.sampling
    loading = loading_config(backbone)
    if config.num_frames is None:
        ratio = view_ratio(config.image_size) if resize_ratio is None else resize_ratio
        transform = EvalTransform(config.image_size, round(max(config.image_size) * ratio))
        images = {
            side: SequentialImages(
                manifest,
                transform,
                channels=config.in_channels,
                bit_depth=loading.bit_depth,
                max_pixels=loading.max_pixels,
                label_key=loading.label_key,
                image_member=loading.image_member,
                storage=loading.storage,
            )
            for side, manifest in manifests.items()
        }
        return images, {"image_size": list(config.image_size), "resize_ratio": ratio}
    assert sampling is not None
    if sampling.num_frames != config.num_frames:
        raise ValueError(
            f"video.sampling.num_frames is {sampling.num_frames}, the encoder takes clips of {config.num_frames} frames"
        )
    views = {"train": video.train_views, "test": video.views}
    clips = {
        side: SequentialClips(
            manifest,
            sampling,
            config.image_size,
            channels=config.in_channels,
            views=(views[side].clips, views[side].crops),
            short_side=video.short_side,
            max_pixels=loading.max_pixels,
            label_key=loading.label_key,
            image_member=loading.image_member,
            storage=loading.storage,
        )
        for side, manifest in manifests.items()
    }
    described = {f"{side}_views": asdict(chosen) for side, chosen in views.items()}
    frames = {name: getattr(sampling, name) for name in ("num_frames", "stride", "mode", "fps", "short")}
    return clips, {"image_size": list(config.image_size), "short_side": video.short_side, **frames, **described}


def loading_config(backbone: Backbone) -> DataConfig:
    """How the backbone's run reads data; the defaults where there is no run."""
    return DataConfig() if backbone.config is None else backbone.config.data


def read_labels(dataset: SequentialImages | SequentialClips, storage: StorageConfig) -> Tensor:
    """The labels of all samples, without decoding any.

    Args:
        dataset: gives the manifest and how labels are found.
        storage: how shards are read.

    Returns:
        int64 [n], in the order of the manifest.

    Raises:
        ValueError: a sample has no label.
    """
    manifest, key = dataset.manifest, dataset.label_key
    reader = ShardReader(manifest, ("cls", *(() if key is None else ("json",))), Storage(storage))
    counts = [shard.num_samples for shard in manifest.shards]
    places = [Place(shard, sample) for shard, count in enumerate(counts) for sample in range(count)]
    parts = (places[first : first + 256] for first in range(0, len(places), 256))  # a store gets one part at a time
    raws = (raw for part in parts for raw in reader.read_many(part))
    labels = torch.tensor([label_of(raw, manifest.classes, key or "") for raw in raws])
    unlabelled = (labels < 0).nonzero().flatten()
    if len(unlabelled):
        raise ValueError(
            f"{len(unlabelled)} of {len(labels)} evaluation samples have no label (the first is sample "
            f"{int(unlabelled[0])}): accuracies need a labelled dataset, packed from class folders"
        )
    return labels


def _some(classes: tuple[str, ...]) -> str:
    """The first three classes, for a message."""
    return ", ".join(classes[:3]) + (", ..." if len(classes) > 3 else "")
