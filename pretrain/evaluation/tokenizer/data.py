"""The pictures that a tokenizer is evaluated on: a test set, and for the latents' probe a labelled training set.

In: a tokenizer (its channels, size, and its run's data folders) and the suite's choices. Out: map-style data sets in
the order of their manifests, all seen through one centre crop. It exists to find a missing or unlabelled data set
before any work starts.
"""

from __future__ import annotations

from dataclasses import dataclass

from data_pipes.config import DataConfig
from data_pipes.sequential.pictures import SequentialImages
from data_pipes.shards.manifest import Manifest
from data_pipes.store.storage import Storage
from data_pipes.transforms.image import EvalTransform
from pretrain.weights.tokenizer import LoadedTokenizer


@dataclass(frozen=True)
class TokenizerView:
    """The test pictures as the tokenizer sees them."""

    test: SequentialImages
    """the pictures, in the order of their manifest"""
    transform: EvalTransform
    """resize and centre crop"""
    short_side: int
    """in pixels, of the resized picture before the crop"""
    loading: DataConfig
    """how the tokenizer's run reads pictures"""
    train_folder: str | None
    """of the labelled training set for a probe; None: none is known"""

    def described(self) -> dict[str, object]:
        """How pictures were cut and resized, for the record of a result."""
        return {
            "image_size": list(self.transform.size),
            "short_side": self.short_side,
            "resize": "bicubic, antialias; a picture of the crop's size is left alone",
            "crop": "centre, the same for pictures and reconstructions",
            "rounding": "both uint8, clipped to 0..255",
        }


def open_view(
    tokenizer: LoadedTokenizer,
    *,
    test: str | None,
    train: str | None,
    size: tuple[int, int] | None,
    short_side: int | None,
) -> TokenizerView:
    """Opens the test set of a tokenizer.

    Args:
        tokenizer: gives the channels, and where the rest is None its run's `data.val`, `data.train` and image size.
        test: folder of the test set; None: the run's.
        train: folder of the labelled training set for a probe; None: the run's. It is not opened here.
        size: (height, width) of the centre crop in pixels; None: the run's.
        short_side: of the resized picture before the crop, in pixels; None: the crop's longer side.

    Raises:
        ValueError: no test set, no size, or a crop that does not fit.
    """
    run = tokenizer.config
    folder = test or (run.data.val if run is not None else None)
    if not folder:
        raise ValueError(f"no test pictures: {tokenizer.source} names none, set test=FOLDER (a packed data set)")
    size = size or tokenizer.image_size
    if size is None:
        raise ValueError(f"{tokenizer.source} does not say which size it was trained on: set size=[256,256]")
    side = max(size) if short_side is None else short_side
    loading = DataConfig() if run is None else run.data
    transform = EvalTransform((size[0], size[1]), side)
    opened = _open(folder, transform, tokenizer.model.config.in_channels, loading)
    trained_on = None if run is None or run.data.train is None else str(run.data.train)
    return TokenizerView(opened, transform, side, loading, train or trained_on)


def labelled_train(view: TokenizerView) -> SequentialImages:
    """Opens the probe's training set, in the same view as the test set.

    Raises:
        ValueError: there is none, it has other classes than the test set, or it is the test set.
    """
    if not view.train_folder:
        raise ValueError("no training pictures for the latents' probe: set train=FOLDER (a packed data set)")
    train = _open(view.train_folder, view.transform, view.test.channels, view.loading)
    classes = train.manifest.classes
    if not classes or classes != view.test.manifest.classes:
        raise ValueError(
            f"{view.train_folder} has {len(classes)} classes and the test pictures have "
            f"{len(view.test.manifest.classes)}; a probe of the latents needs the same classes in both: pack both from "
            "the same class folders, or leave the task out with skip"
        )
    if train.manifest.fingerprint == view.test.manifest.fingerprint:
        raise ValueError(f"{view.train_folder} and the test pictures are the same: set test=FOLDER to other pictures")
    return train


def _open(folder: str, transform: EvalTransform, channels: int, loading: DataConfig) -> SequentialImages:
    """The pictures of a data set, read as the tokenizer's run reads its own."""
    return SequentialImages(
        Manifest.load(folder, Storage(loading.storage)),
        transform,
        channels=channels,
        bit_depth=loading.bit_depth,
        max_pixels=loading.max_pixels,
        label_key=loading.label_key,
        image_member=loading.image_member,
        storage=loading.storage,
    )
