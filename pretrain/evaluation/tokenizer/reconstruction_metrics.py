"""How far reconstructions are from their pictures, under named protocols: PSNR, SSIM, LPIPS, rFID.

In: pictures and reconstructions as uint8, rounded as they would be stored, of the same centre crop. Out: a figure per
protocol. It exists because such figures compare only when range, rounding, crop and network are the same; here each
protocol fixes them, and what is left open goes into the record.

Legend: B batch, C channels, H/W pixels.
"""

from __future__ import annotations

import hashlib
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.error import URLError

import torch
from torch import Tensor, nn

from pretrain.losses.config import SMALLEST_SIDE, PerceptualConfig
from pretrain.losses.perceptual import load_lpips
from pretrain.losses.reconstruction import psnr

SSIM_WINDOW = 11
"""Side of SSIM's window in pixels."""
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
"""Inception's weights as torch-fidelity publishes them."""
INCEPTION_SHA256 = "6726825d"
"""First digits of the SHA-256 of that file, which torch-fidelity converted from the original's TensorFlow graph."""


@dataclass(frozen=True)
class PSNRConfig:
    """Settings of `psnr_uint8`: 10 log10(255^2 / mean squared error) of each picture's rounded values; their mean."""


@dataclass(frozen=True)
class SSIMConfig:
    """Settings of `ssim_uint8`: gaussian window of 11 pixels, sigma 1.5, data range 255, mean over all windows and
    channels of a picture; the mean of the pictures. As torchmetrics 1.x, windows at the border count too, over the
    reflected picture; scikit-image and the original leave them out, so their figures differ in the third digit."""


@dataclass(frozen=True)
class LPIPSConfig:
    """Settings of `lpips`: version 0.1 on rounded values in [-1, 1], per picture; their mean."""

    network: Literal["vgg", "alex"] = "alex"
    """AlexNet is usual as a metric; the metric's name carries it"""
    backbone_path: str | None = None
    """torchvision's weights of the network; null: its cache or download"""
    backbone_sha256: str | None = None
    """SHA-256 of that file or its first digits; null: that of torchvision's published file"""
    linear_path: str | None = None
    """weightings of the layers of LPIPS 0.1; null: those that torchmetrics ships"""
    linear_sha256: str | None = None
    """SHA-256 of that file or its first digits; null: that of the published file"""


@dataclass(frozen=True)
class RFIDConfig:
    """Settings of `rfid_inception`: Frechet distance of Inception's pool3 features (2048) between reconstructions and
    the same crops of their pictures, computed by torchmetrics."""

    inception_path: str | None = None
    """torch-fidelity's file weights-inception-2015-12-05-6726825d.pth; null: torch hub's cache or download"""
    inception_sha256: str = INCEPTION_SHA256
    """SHA-256 of that file or its first digits"""


class ReconstructionMeter(ABC):
    """Measures reconstructions batch by batch on one process; `finish` joins the processes."""

    @abstractmethod
    def update(self, pictures: Tensor, reconstructions: Tensor, latents: Tensor) -> None:
        """Takes a batch, all of it on the device.

        Args:
            pictures: uint8 [B, C, H, W].
            reconstructions: the same of what came back.
            latents: float32 [B, L, h, w], from which they came back.
        """

    @abstractmethod
    def finish(self, gather: Callable[[Any], list[Any]]) -> dict[str, float]:
        """The metrics over all processes' pictures. All processes call this.

        Args:
            gather: gives every process's object, in the order of the processes, on the main process.

        Returns:
            Name -> figure; only the main process's answer counts.
        """

    @property
    def details(self) -> dict[str, object]:
        """What else belongs into the result's record; valid after `finish`."""
        return {}


class MeanOverPictures(ReconstructionMeter):
    """The mean of one number per picture."""

    def __init__(
        self, name: str, measure: Callable[[Tensor, Tensor], Tensor], details: dict[str, object] | None = None
    ) -> None:
        """Nothing is measured yet.

        Args:
            name: of the metric.
            measure: reconstructions and pictures, uint8 [B, C, H, W] both, to [B].
            details: for the result's record.
        """
        self.name, self.measure = name, measure
        self._details = details or {}
        self._values: list[Tensor] = []

    def update(self, pictures: Tensor, reconstructions: Tensor, latents: Tensor) -> None:
        self._values.append(self.measure(reconstructions, pictures).double().cpu())

    def finish(self, gather: Callable[[Any], list[Any]]) -> dict[str, float]:
        own = torch.cat(self._values) if self._values else torch.empty(0, dtype=torch.float64)
        return {self.name: float(torch.cat(gather(own)).mean())}

    @property
    def details(self) -> dict[str, object]:
        return self._details


class FrechetMeter(ReconstructionMeter):
    """torchmetrics' FrechetInceptionDistance, on uint8."""

    def __init__(self, extractor: nn.Module, show: Callable[[Tensor], Tensor], device: torch.device) -> None:
        """Nothing is measured yet.

        Args:
            extractor: uint8 [B, 3, H, W] to features [B, D].
            show: pictures [B, C, H, W] as red, green and blue [B, 3, H, W].
            device: where features are added up.
        """
        from torchmetrics.image.fid import FrechetInceptionDistance

        # Joined by hand: a process without a picture cannot compute.
        self._distance = FrechetInceptionDistance(feature=extractor, sync_on_compute=False).to(device)
        self._show = show

    def update(self, pictures: Tensor, reconstructions: Tensor, latents: Tensor) -> None:
        self._distance.update(self._show(pictures), real=True)
        self._distance.update(self._show(reconstructions), real=False)

    def finish(self, gather: Callable[[Any], list[Any]]) -> dict[str, float]:
        states = gather({name: getattr(self._distance, name).cpu() for name in self._distance._defaults})
        for name in self._distance._defaults:
            total = torch.stack([state[name] for state in states]).sum(dim=0)
            setattr(self._distance, name, total.to(self._distance.device))
        if int(self._distance.real_features_num_samples) < 2:
            raise ValueError("rFID of fewer than 2 pictures is undefined; evaluate more")
        return {"rfid": float(self._distance.compute())}

    @property
    def details(self) -> dict[str, object]:
        return {"note": "comparable only between sets of the same pictures and the same number of them"}


def make_psnr() -> MeanOverPictures:
    """The meter of `psnr_uint8`."""
    return MeanOverPictures("psnr", psnr, {"unit": "dB"})


def make_ssim(size: tuple[int, int]) -> MeanOverPictures:
    """The meter of `ssim_uint8`.

    Args:
        size: (height, width) of the pictures.

    Raises:
        ValueError: the pictures are smaller than the window, or torchmetrics is not installed.
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise ValueError("SSIM needs torchmetrics; install the extra `eval`") from error
    if min(size) < SSIM_WINDOW:
        raise ValueError(f"SSIM has a window of {SSIM_WINDOW} pixels and the pictures are {list(size)}; leave it out")

    def ssim(reconstructions: Tensor, pictures: Tensor) -> Tensor:
        values = structural_similarity_index_measure(
            reconstructions.float(), pictures.float(), data_range=255.0, reduction="none"
        )
        assert isinstance(values, Tensor)
        return values

    return MeanOverPictures("ssim", ssim)


def make_lpips(
    config: LPIPSConfig, size: tuple[int, int], show: Callable[[Tensor], Tensor], device: torch.device
) -> MeanOverPictures:
    """The meter of `lpips`.

    Args:
        config: of the task.
        size: (height, width) of the pictures.
        show: pictures [B, C, H, W] as red, green and blue [B, 3, H, W].
        device: where the network runs.

    Raises:
        ValueError: the pictures are too small.
        PerceptualWeightsError: the network's weights cannot be had.
    """
    smallest = SMALLEST_SIDE[config.network]
    if min(size) < smallest:
        raise ValueError(
            f"LPIPS with {config.network} needs sides of at least {smallest} pixels and the pictures are {list(size)}; "
            "leave it out"
        )
    given = {name: getattr(config, name) for name in LPIPSConfig.__dataclass_fields__}
    network = load_lpips(PerceptualConfig(**given)).to(device)

    def lpips(reconstructions: Tensor, pictures: Tensor) -> Tensor:
        distances: Tensor = network(*(show(images).float() / 127.5 - 1.0 for images in (reconstructions, pictures)))
        return distances

    return MeanOverPictures(f"lpips_{config.network}", lpips, {"network": config.network, "version": "0.1"})


def load_inception(config: RFIDConfig) -> nn.Module:
    """torch-fidelity's Inception, from uint8 [B, 3, H, W] to float32 [B, 2048], as torchmetrics uses it.

    Raises:
        ValueError: the file is missing, is another one, or cannot be downloaded; or a package is not installed.
    """
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3
    except ImportError as error:
        raise ValueError("rFID needs torchmetrics and torch-fidelity; install the extra `eval`") from error
    path = Path(config.inception_path) if config.inception_path is not None else _downloaded_inception()
    if not path.is_file():
        raise ValueError(f"there is no file {path}, which inception_path names; fetch {INCEPTION_URL} or change it")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(config.inception_sha256.lower()):
        raise ValueError(
            f"{path} has the SHA-256 {found}; expected {config.inception_sha256}. Fetch {INCEPTION_URL} again, or, "
            "where another file is meant, set inception_sha256 to its sum"
        )
    # torch-fidelity unpickles what it is given without a check: it is given a copy that holds tensors alone.
    state = torch.load(path, map_location="cpu", weights_only=True)
    with tempfile.NamedTemporaryFile(suffix=".pth") as copy:
        torch.save(state, copy.name)
        network: nn.Module = NoTrainInceptionV3("inception-v3-compat", ["2048"], copy.name)
    return network


def _downloaded_inception() -> Path:
    """Where torch hub keeps Inception's file, which is fetched where it is not there.

    Raises:
        ValueError: it cannot be fetched.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_URL.rpartition("/")[2]
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(INCEPTION_URL, str(path), INCEPTION_SHA256, progress=False)
    except (URLError, OSError, RuntimeError) as error:
        raise ValueError(
            f"Inception's weights could not be had from {INCEPTION_URL} ({error}). Fetch that file where there is a "
            "network and set settings.inception_path of the rFID task to it, or leave the task out"
        ) from error
    return path
