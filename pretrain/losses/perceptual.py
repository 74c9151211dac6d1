"""LPIPS (arXiv 1801.03924): distance between two pictures in the features of VGG-16 or AlexNet.

Enters: pictures in [-1, 1]. Leaves: one distance per sample. The weights belong to others and are not part of any
checkpoint: the network's come from torchvision's own download or a path, the five weightings of its layers from a path
or from torchmetrics, which ships them. Every file's SHA-256 is checked.

Why torchmetrics does not compute the distance: its network with the layers' weightings is a private class, whose
numbers have changed between versions; importing it loads over a thousand modules, transformers and matplotlib among
them where they are installed; it downloads VGG-16 or draws its 138 million weights at random, and reads no file; under
autocast it weighs and sums in bfloat16; and an extra, `eval`, would be needed to train. It would spare about 25 lines,
those of `LPIPS.forward` and `_unit_features`. A test compares both.
Legend: B batch, C channels, H/W pixels.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor, nn

from pretrain.losses.config import PerceptualConfig
from pretrain.losses.reconstruction import at_least_float32

FEATURE_EPS = 1e-8
"""Added to the squared norm of a pixel's features."""
INPUT_SHIFT = (-0.030, -0.088, -0.188)
"""Subtracted from red, green and blue in [-1, 1]: ImageNet's mean on that scale."""
INPUT_SCALE = (0.458, 0.448, 0.450)
"""By which red, green and blue are then divided: ImageNet's standard deviation on that scale."""

_SLICES = {"vgg": (4, 9, 16, 23, 30), "alex": (2, 5, 8, 10, 12)}
"""Where the five slices of torchvision's `features` end, in layers."""
_CHANNELS = {"vgg": (64, 128, 256, 512, 512), "alex": (64, 192, 384, 256, 256)}
"""Channels that come out of each slice."""
_BACKBONE_SHA256 = {"vgg": "397923af", "alex": "7be5be79"}
"""First digits of the SHA-256 of the files that torchvision publishes."""
_LINEAR_SHA256 = {"vgg": "a78928a0af1e5f0f", "alex": "df73285e35b22355"}
"""First digits of the SHA-256 of LPIPS 0.1's files, which torchmetrics ships."""


class PerceptualWeightsError(ValueError):
    """Weights of LPIPS that cannot be had, or are not the expected ones; the message says what to do."""


class LPIPS(nn.Module):
    """The distance. Frozen: without dropout, always in evaluation mode, passing gradients to its first input alone."""

    shift: Tensor
    """float32 [3, 1, 1]: `INPUT_SHIFT`."""
    scale: Tensor
    """float32 [3, 1, 1]: `INPUT_SCALE`."""

    def __init__(self, network: str) -> None:
        """Makes the network, whose weights have no values until a state dict is loaded.

        Args:
            network: "vgg" or "alex".
        """
        super().__init__()
        import torchvision

        build = torchvision.models.vgg16 if network == "vgg" else torchvision.models.alexnet
        with torch.device("meta"):  # neither time nor random numbers for weights that are replaced
            features = build(weights=None).features
        self.ends = _SLICES[network]
        self.features = features[: self.ends[-1]].to_empty(device="cpu")
        for layer in self.features:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False  # the outputs of the slices are kept
        self.linear = nn.ParameterList(torch.empty(channels) for channels in _CHANNELS[network])
        self.register_buffer("shift", torch.tensor(INPUT_SHIFT)[:, None, None])
        self.register_buffer("scale", torch.tensor(INPUT_SCALE)[:, None, None])
        self.requires_grad_(False)
        self.eval()

    def forward(self, pictures: Tensor, targets: Tensor) -> Tensor:
        """The distance of each picture from its target (arXiv 1801.03924, equation 1).

        Args:
            pictures: float [B, 3, H, W] in [-1, 1]; gradients reach them alone.
            targets: float [B, 3, H, W] in [-1, 1].

        Returns:
            At least float32 [B], also under autocast.
        """
        with torch.no_grad():
            expected = self._unit_features(targets)
        distances = [
            ((one - other).square() * weight[:, None, None]).sum(dim=1).mean(dim=(1, 2))
            for one, other, weight in zip(self._unit_features(pictures), expected, self.linear, strict=True)
        ]
        return torch.stack(distances).sum(dim=0)

    def train(self, mode: bool = True) -> LPIPS:
        """Stays in evaluation mode, whatever holds it."""
        return super().train(False)

    def _unit_features(self, pictures: Tensor) -> list[Tensor]:
        """The slices' features, each pixel's of length 1: [B, channels, h, w] each, at least float32."""
        x, kept = (pictures - self.shift) / self.scale, []
        for number, layer in enumerate(self.features, 1):
            x = layer(x)
            if number in self.ends:
                features = at_least_float32(x)
                # The epsilon stands below the root, whose slope at zero is infinite: features of 0 are common.
                kept.append(features / (features.square().sum(dim=1, keepdim=True) + FEATURE_EPS).sqrt())
        return kept


def load_lpips(config: PerceptualConfig) -> LPIPS:
    """LPIPS with its weights, on the CPU.

    Raises:
        PerceptualWeightsError: a file is missing, is another one than expected, or cannot be downloaded.
    """
    with torch.device("cpu"):
        model = LPIPS(config.network)
    backbone = _backbone_state(config)
    names = [name for name in model.state_dict() if name.startswith("features.")]
    linear = _linear_state(config)
    missing = [name for name in names if name not in backbone]
    missing += [f"lin{layer}" for layer in range(len(model.linear)) if layer not in linear]
    if missing:
        raise PerceptualWeightsError(
            f"The LPIPS weights for {config.network!r} lack {', '.join(missing[:4])}; expected torchvision's names "
            "(features.0.weight, ...) and LPIPS 0.1's (lin0.model.1.weight, ...). Give the files of that network."
        )
    wanted = {name: backbone[name] for name in names}
    wanted |= {f"linear.{layer}": linear[layer].flatten() for layer in range(len(model.linear))}
    try:
        model.load_state_dict(wanted | {"shift": model.shift, "scale": model.scale})
    except RuntimeError as error:
        raise PerceptualWeightsError(f"The LPIPS weights do not fit {config.network!r}: {error}") from error
    return model


def _backbone_state(config: PerceptualConfig) -> dict[str, Tensor]:
    if config.backbone_path is not None:
        expected = config.backbone_sha256 or _BACKBONE_SHA256[config.network]
        return _read(Path(config.backbone_path), expected, "perceptual.backbone_path")
    import torchvision

    known = torchvision.models.VGG16_Weights if config.network == "vgg" else torchvision.models.AlexNet_Weights
    weights = known.IMAGENET1K_V1
    try:
        state: dict[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True)
    except (URLError, OSError, RuntimeError) as error:
        raise PerceptualWeightsError(
            f"The weights of LPIPS' network could not be had from {weights.url} ({error}). Fetch that file where there "
            "is a network and set perceptual.backbone_path to it, or set perceptual.weight to 0."
        ) from error
    return state


def _linear_state(config: PerceptualConfig) -> dict[int, Tensor]:
    expected = config.linear_sha256 or _LINEAR_SHA256[config.network]
    path = None if config.linear_path is None else Path(config.linear_path)
    if path is None:
        package = importlib.util.find_spec("torchmetrics")
        if package is None or package.origin is None:
            raise PerceptualWeightsError(
                "LPIPS' weightings of layers are not there: install torchmetrics, which ships them, or set "
                "perceptual.linear_path to the file of LPIPS 0.1 for this network."
            )
        path = Path(package.origin).parent / "functional" / "image" / "lpips_models" / f"{config.network}.pth"
    state = _read(path, expected, "perceptual.linear_path")
    return {int(name[3]): tensor for name, tensor in state.items() if name.startswith("lin") and name[3:4].isdigit()}


def _read(path: Path, sha256: str, setting: str) -> dict[str, Tensor]:
    """The tensors of a file whose SHA-256 begins with `sha256`; nothing but tensors is ever unpickled."""
    if not path.is_file():
        raise PerceptualWeightsError(f"There is no file {path}, which {setting} names; fetch it or change the setting.")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(sha256.lower()):
        raise PerceptualWeightsError(
            f"{path} has the SHA-256 {found}; expected {sha256}. Fetch it again, or, where another file is meant, set "
            f"{setting.replace('_path', '_sha256')} to its sum."
        )
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state
