"""The labelled images of an evaluation: a training and a test set with the same classes, in the evaluation view.

In: a backbone (its input size, channels, and its run's data folders) and the suite's choices. Out: two map-style
datasets in the order of their manifests. It exists to find a missing, unlabelled or differently labelled dataset before
any work starts.
"""

from __future__ import annotations

from dataclasses import dataclass

from data_pipes.config import DataConfig
from data_pipes.image import EvalTransform
from data_pipes.manifest import Manifest
from data_pipes.sequential import SequentialImages
from pretrain.evaluation.backbone import Backbone


@dataclass(frozen=True)
class EvaluationData:
    """Two datasets that share their classes."""

    train: SequentialImages
    test: SequentialImages
    num_classes: int
    train_fingerprint: str
    test_fingerprint: str
    resize_ratio: float


def open_evaluation_data(
    backbone: Backbone, *, train: str | None, test: str | None, resize_ratio: float | None
) -> EvaluationData:
    """Opens the datasets for one backbone.

    Args:
        backbone: gives image size and channels, and its run's `data.train` and `data.val` where those here are None.
        train, test: dataset folders.
        resize_ratio: short side of the resized image / longer side of the centre crop; None is `view_ratio`. Images
            that already have the input's size stay as they are.

    Raises:
        ValueError: a folder that is not given, is no dataset or has no classes; two that differ in their classes or
            hold the same images.
    """
    run = backbone.config
    folders = {
        "train": train or (run.data.train if run is not None else None),
        "test": test or (run.data.val if run is not None else None),
    }
    for side, folder in folders.items():
        if not folder:
            raise ValueError(f"no {side} images: {backbone.source} names none, set {side}=FOLDER (a packed dataset)")
    manifests = {side: Manifest.load(str(folder)) for side, folder in folders.items()}
    for side, manifest in manifests.items():
        if not manifest.classes:
            raise ValueError(
                f"the {side} images in {folders[side]} have no labels: accuracies need a dataset packed from class "
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
            f"{folders['train']} and {folders['test']} hold the same images: a figure on images that were trained on "
            "says nothing, set test=FOLDER to other images"
        )
    config = backbone.model.config
    ratio = view_ratio(config.image_size) if resize_ratio is None else resize_ratio
    transform = EvalTransform(config.image_size, round(max(config.image_size) * ratio))
    loading = DataConfig() if run is None else run.data
    opened = {
        side: SequentialImages(
            manifest,
            transform,
            channels=config.in_channels,
            bit_depth=loading.bit_depth,
            max_pixels=loading.max_pixels,
            label_key=loading.label_key,
            storage=loading.storage,
        )
        for side, manifest in manifests.items()
    }
    return EvaluationData(
        train=opened["train"],
        test=opened["test"],
        num_classes=len(manifests["train"].classes),
        train_fingerprint=manifests["train"].fingerprint,
        test_fingerprint=manifests["test"].fingerprint,
        resize_ratio=ratio,
    )


def view_ratio(image_size: tuple[int, int]) -> float:
    """Short side / crop of the usual evaluation view: 256/224, and 1 for small inputs, whose borders count."""
    return 1.0 if max(image_size) <= 64 else 256 / 224


def _some(classes: tuple[str, ...]) -> str:
    return ", ".join(classes[:3]) + (", ..." if len(classes) > 3 else "")
