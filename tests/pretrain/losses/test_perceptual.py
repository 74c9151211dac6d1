"""LPIPS with random weights against torchmetrics' own, its gradients, and what happens when weights are not there."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pretrain.losses import perceptual
from pretrain.losses.config import PerceptualConfig
from pretrain.losses.perceptual import LPIPS, PerceptualWeightsError, load_lpips

CHANNELS = {"vgg": (64, 128, 256, 512, 512), "alex": (64, 192, 384, 256, 256)}


def random_backbone(network: str) -> dict[str, Tensor]:
    """Under torchvision's names; scaled so that signals neither die nor explode."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, tensor in LPIPS(network).state_dict().items():
        if name.startswith("features."):
            fan_in = tensor[0].numel() if tensor.ndim == 4 else 100
            state[name] = torch.randn(tensor.shape, generator=generator) * (2.0 / fan_in) ** 0.5
    return state


def random_linear(network: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        f"lin{layer}.model.1.weight": torch.rand(1, channels, 1, 1, generator=generator)
        for layer, channels in enumerate(CHANNELS[network])
    }


def save(folder: Path, network: str) -> PerceptualConfig:
    """Random weights as files, and the configuration that names them."""
    backbone, linear = folder / f"{network}.pth", folder / f"{network}-lin.safetensors"
    torch.save(random_backbone(network), backbone)
    save_file(random_linear(network), linear)
    return PerceptualConfig(
        weight=1.0,
        network=network,
        backbone_path=str(backbone),
        backbone_sha256=hashlib.sha256(backbone.read_bytes()).hexdigest(),
        linear_path=str(linear),
        linear_sha256=hashlib.sha256(linear.read_bytes()).hexdigest()[:12].upper(),
    )


@pytest.fixture(scope="module", params=["vgg", "alex"])
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PerceptualConfig:
    return save(tmp_path_factory.mktemp("lpips"), request.param)


def test_distances_are_those_of_torchmetrics(config: PerceptualConfig) -> None:
    lpips = pytest.importorskip("torchmetrics.functional.image.lpips")
    with torch.device("meta"):  # drawing VGG's weights takes half a minute
        theirs = lpips._LPIPS(pretrained=False, net=config.network, pnet_rand=True)
    theirs.to_empty(device="cpu")
    theirs.scaling_layer = lpips.ScalingLayer()
    theirs.load_state_dict(random_linear(config.network), strict=False)
    features = {name.removeprefix("features."): tensor for name, tensor in random_backbone(config.network).items()}
    for slice_ in (theirs.net.slice1, theirs.net.slice2, theirs.net.slice3, theirs.net.slice4, theirs.net.slice5):
        wanted = {name: features[name] for name in slice_.state_dict()}
        slice_.load_state_dict(wanted)
    one, other = torch.rand(2, 3, 3, 64, 80) * 2.0 - 1.0
    expected = theirs(one, other).flatten()
    assert expected.min() > 0
    torch.testing.assert_close(load_lpips(config)(one, other), expected, rtol=1e-5, atol=1e-6)


def test_gradients_reach_the_picture_and_nothing_else(config: PerceptualConfig) -> None:
    """Defect 1: a distance without a gradient."""
    model = load_lpips(config)
    picture, target = (torch.rand(1, 3, 64, 64).requires_grad_() for _ in range(2))
    model(picture, target).sum().backward()
    assert picture.grad.abs().max() > 0
    assert target.grad is None
    assert not any(parameter.requires_grad for parameter in model.parameters())
    small = torch.rand(1, 3, 64, 64)
    step = 1e-3 * picture.grad / picture.grad.abs().max()
    with torch.no_grad():
        assert model(picture - step, target) < model(picture, target)
    flat = torch.zeros(1, 3, 64, 64, requires_grad=True)  # features of zero have no direction
    model(flat, small).sum().backward()
    assert flat.grad.isfinite().all()


def test_a_parents_train_changes_nothing(config: PerceptualConfig) -> None:
    """Defect 4: dropout on the layers' weightings."""
    parent = nn.ModuleDict({"lpips": load_lpips(config)})
    one, other = torch.rand(2, 1, 3, 64, 64)
    expected = parent["lpips"](one, other)
    parent.train()
    assert not any(module.training for module in parent["lpips"].modules())
    assert not any(isinstance(module, nn.Dropout) for module in parent["lpips"].modules())
    assert torch.equal(parent["lpips"](one, other), expected)


def test_autocast_keeps_the_distance_in_float32(config: PerceptualConfig) -> None:
    model, (one, other) = load_lpips(config), torch.rand(2, 1, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        distance = model(one, other)
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance, model(one, other), rtol=0.03, atol=0)


def test_wrong_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = save(tmp_path, "alex")
    paths = {"backbone_path": good.backbone_path, "linear_path": good.linear_path}

    def config(**fields: object) -> PerceptualConfig:
        return PerceptualConfig(**{"weight": 1.0, "network": "alex", **paths, **fields})

    with pytest.raises(PerceptualWeightsError, match=r"no file .*gone\.pth, which perceptual\.backbone_path names"):
        load_lpips(config(backbone_path=str(tmp_path / "gone.pth")))
    with pytest.raises(PerceptualWeightsError, match=r"expected 7be5be79.*perceptual\.backbone_sha256"):
        load_lpips(config())
    with pytest.raises(PerceptualWeightsError, match=r"expected df73285e.*perceptual\.linear_sha256"):
        load_lpips(config(backbone_sha256=good.backbone_sha256))
    vgg = save(tmp_path, "vgg")
    both = {"backbone_sha256": good.backbone_sha256, "linear_sha256": vgg.linear_sha256}
    with pytest.raises(PerceptualWeightsError, match="do not fit 'alex'"):
        load_lpips(config(linear_path=vgg.linear_path, **both))
    empty = tmp_path / "empty.safetensors"
    save_file({"lin0.model.1.weight": torch.rand(1, 64, 1, 1)}, empty)
    both["linear_sha256"] = hashlib.sha256(empty.read_bytes()).hexdigest()
    with pytest.raises(PerceptualWeightsError, match="lack lin1, lin2, lin3, lin4"):
        load_lpips(config(linear_path=str(empty), **both))


def test_the_shipped_weightings_are_found_and_a_missing_network_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchmetrics")
    import torchvision

    def refuse(self: object, **_: object) -> None:
        raise OSError("no route to host")

    for network in ("vgg", "alex"):
        linear = perceptual._linear_state(PerceptualConfig(network=network))
        assert {layer: tensor.shape[1] for layer, tensor in linear.items()} == dict(enumerate(CHANNELS[network]))
    monkeypatch.setattr(torchvision.models.AlexNet_Weights, "get_state_dict", refuse)
    message = r"could not be had from https.*alexnet.*no route to host.*perceptual\.backbone_path"
    with pytest.raises(PerceptualWeightsError, match=message):
        load_lpips(PerceptualConfig(weight=1.0, network="alex"))
    monkeypatch.setattr(perceptual.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(PerceptualWeightsError, match="install torchmetrics"):
        perceptual._linear_state(PerceptualConfig())
