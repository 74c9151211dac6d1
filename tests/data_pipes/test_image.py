"""The transforms against torchvision's, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode, RandomResizedCrop, v2
from torchvision.transforms.v2 import functional as reference

from data_pipes.decode import SampleError
from data_pipes.image import EvalTransform, TrainTransform, resize
from data_pipes.order import hash_uniform


def noise(channels: int, height: int, width: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    """[C, H, W] over [H, W, C] memory, as decoded pictures are."""
    generator = torch.Generator().manual_seed(height * 1000 + width)
    high = 256 if dtype == torch.uint8 else 65536
    return torch.randint(0, high, (height, width, channels), generator=generator).to(dtype).permute(2, 0, 1)


@pytest.mark.parametrize("channels", [1, 3, 4, 6])
@pytest.mark.parametrize(("height", "width"), [(37, 91), (120, 64), (16, 16), (301, 200)])
def test_train_equals_torchvision(channels: int, height: int, width: int) -> None:
    image = noise(channels, height, width)
    transform = TrainTransform((24, 32))
    for row in hash_uniform(0, np.arange(8), 0, transform.num_uniforms):
        box = transform.crop_box(height, width, row)
        expected = reference.resized_crop(image, *box, [24, 32], InterpolationMode.BICUBIC, antialias=True)
        if row[22] < 0.5:
            expected = reference.horizontal_flip(expected)
        assert torch.equal(transform(image, row), expected)


def torchvision_box(
    monkeypatch: pytest.MonkeyPatch, row: np.ndarray, image: torch.Tensor, transform: TrainTransform
) -> tuple[int, int, int, int]:
    """RandomResizedCrop.get_params, fed with our uniform numbers."""
    pairs = iter([value for attempt in range(10) for value in (row[attempt], row[10 + attempt])])
    corners = iter(row[20:22])
    monkeypatch.setattr(
        torch.Tensor, "uniform_", lambda self, low, high: torch.tensor([low + next(pairs) * (high - low)])
    )
    monkeypatch.setattr(torch, "randint", lambda low, high, size: torch.tensor([int(next(corners) * high)]))
    box = RandomResizedCrop.get_params(image, list(transform.scale), list(transform.ratio))
    monkeypatch.undo()
    return tuple(box)


@pytest.mark.parametrize(("height", "width"), [(37, 91), (300, 20), (20, 300), (64, 64)])
def test_crops_equal_torchvision(monkeypatch: pytest.MonkeyPatch, height: int, width: int) -> None:
    image, transform = noise(3, height, width), TrainTransform((8, 8))
    for row in hash_uniform(1, np.arange(60), 0, transform.num_uniforms):
        assert transform.crop_box(height, width, row) == torchvision_box(monkeypatch, row, image, transform)


def test_crops_cover_what_they_should() -> None:
    transform = TrainTransform((8, 8), scale=(0.2, 1.0))
    boxes = np.array([transform.crop_box(100, 140, row) for row in hash_uniform(2, np.arange(3000), 0, 23)])
    top, left, height, width = boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height).max() == 100
    assert (left + width).max() == 140
    area = height * width / 14000
    assert area.min() > 0.19
    assert 0.4 < area.mean() < 0.6
    assert abs(np.log(width / height).mean()) < 0.05


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 500), (500, 1), (2, 3)])
def test_tiny_pictures(height: int, width: int) -> None:
    for row in hash_uniform(0, np.arange(10), 0, 23):
        assert TrainTransform((16, 16))(noise(3, height, width), row).shape == (3, 16, 16)


@pytest.mark.parametrize(("height", "width"), [(300, 400), (401, 257), (100, 90), (256, 256)])
def test_eval_equals_torchvision(height: int, width: int) -> None:
    expected = v2.Compose([v2.Resize(64, InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(56)])
    image = noise(3, height, width)
    assert torch.equal(EvalTransform((56, 56))(image), expected(image))


def test_eval_sizes() -> None:
    image = noise(3, 56, 56)
    assert EvalTransform((56, 56))(image) is image  # as small data sets are stored: CIFAR is not enlarged and cut
    assert EvalTransform((30, 50), short_side=60)(image).shape == (3, 30, 50)
    with pytest.raises(ValueError, match="does not fit into a short side of 40 pixels"):
        EvalTransform((30, 50), short_side=40)
    with pytest.raises(SampleError, match="too thin"):
        EvalTransform((56, 56))(noise(1, 2, 300))


def test_16_bits() -> None:
    image = noise(1, 50, 40, torch.uint16)
    row = hash_uniform(0, [1], 0, 23)[0]
    out = TrainTransform((20, 20), flip=1.0)(image, row)
    assert out.dtype == torch.uint16
    top, left, height, width = TrainTransform((20, 20)).crop_box(50, 40, row)
    part = image[:, top : top + height, left : left + width].float()
    expected = reference.resize(part, [20, 20], InterpolationMode.BICUBIC, antialias=True).clamp(0, 65535).flip(-1)
    assert torch.equal(out.float(), expected.round())
    spikes = torch.zeros(1, 8, 8, dtype=torch.uint16)
    spikes[0, ::4] = 65535
    assert resize(spikes, (16, 16)).float().max() == 65535  # overshoot is cut, not wrapped


def test_flip_probability() -> None:
    image, rows = noise(3, 30, 30), hash_uniform(0, np.arange(400), 0, 23)

    def flipped(probability: float) -> int:
        plain, mirrored = TrainTransform((8, 8), flip=0.0), TrainTransform((8, 8), flip=probability)
        return sum(not torch.equal(plain(image, row), mirrored(image, row)) for row in rows)

    assert flipped(0.0) == 0
    assert flipped(1.0) == 400
    assert 160 < flipped(0.5) < 240


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"scale": (0.5, 1.5)}, "crop_scale"),
        ({"scale": (0.0, 1.0)}, "crop_scale"),
        ({"ratio": (2.0, 1.0)}, "crop_ratio"),
        ({"flip": 1.5}, "flip"),
        ({"size": (0, 8)}, "image size"),
    ],
)
def test_wrong_parameters(fields: dict[str, tuple[float, float]], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        TrainTransform(**{"size": (8, 8), **fields})
