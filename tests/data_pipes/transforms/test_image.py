"""The transforms against torchvision's, to the bit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode, RandomResizedCrop, v2
from torchvision.transforms.v2 import functional as reference

from data_pipes.decode import jpeg
from data_pipes.decode.picture import decode_image
from data_pipes.errors import DecodeError, SampleError
from data_pipes.order.hashing import hash_uniform
from data_pipes.transforms.image import EvalTransform, TrainTransform, _nearest, resize
from tests.data_pipes.decode.picture_files import as_numpy, encode


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
def test_eval_equals_torchvision_and_cuts_as_transformers(height: int, width: int) -> None:
    """torchvision's own centre crop is one pixel further where the room beside it is 3 modulo 4, as for 401 x 257."""
    image = noise(3, height, width)
    resized = v2.Resize(64, InterpolationMode.BICUBIC, antialias=True)(image)
    top, left = (int((side - 56) / 2.0) for side in resized.shape[1:])
    assert torch.equal(EvalTransform((56, 56))(image), resized[:, top : top + 56, left : left + 56])
    agree = (max(resized.shape[1:]) - 56) % 4 != 3
    assert torch.equal(EvalTransform((56, 56))(image), v2.CenterCrop(56)(resized)) == agree


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


def waves(height: int, width: int) -> np.ndarray:
    """[H, W, 3] smooth."""
    rows, columns = np.indices((height, width))
    return np.stack([127 + 60 * np.sin(rows / p) + 60 * np.cos(columns / (p + 9)) for p in (23, 31, 41)], 2).astype(
        "u1"
    )


COLOUR = waves(90, 120)
STORED = {
    "jpeg": encode(COLOUR),
    "progressive": encode(COLOUR, progressive=True),
    "grey jpeg": encode(COLOUR, mode="L"),
    "cmyk": encode(COLOUR, mode="CMYK"),
    "png": encode(COLOUR, "PNG"),
    "16 bits": encode(COLOUR[..., 0].astype(np.uint16) * 200, "PNG"),
    "array": as_numpy(COLOUR),
}


def outcome(load: Callable[[], torch.Tensor]) -> torch.Tensor | str:
    """The picture, or the cause of the error."""
    try:
        return load()
    except DecodeError as error:
        return error.cause


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("channels", [None, 1, 3, 4])
@pytest.mark.parametrize("scaled", [False, True])
def test_load_equals_decoding_first(name: str, channels: int | None, scaled: bool) -> None:
    """To the bit; also with scaled decoding, as no part shrinks to its half."""
    transform = TrainTransform((48, 64), scaled_decode=scaled)
    for row in hash_uniform(3, np.arange(6), 0, transform.num_uniforms):
        loaded = outcome(lambda row=row: transform.load(STORED[name], row, channels=channels))
        expected = outcome(lambda row=row: transform(decode_image(STORED[name], channels), row))
        assert loaded == expected if isinstance(expected, str) else torch.equal(loaded, expected)


def test_load_decodes_at_the_size_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    decode_into = jpeg._decode_into
    monkeypatch.setattr(
        jpeg, "_decode_into", lambda pixels, *rest: sizes.append(pixels.shape[:2]) or decode_into(pixels, *rest)
    )
    data, row = encode(waves(400, 600)), np.full(23, 0.5)
    box = TrainTransform((64, 64)).crop_box(400, 600, row)
    assert 256 <= min(box[2:]) < 512  # of which a quarter is enough
    TrainTransform((64, 64), scaled_decode=False).load(data, row, channels=3)
    TrainTransform((64, 64)).load(data, row, channels=3)
    assert sizes == [(400, 600), (100, 150)]


@pytest.mark.parametrize(("size", "shrinks"), [((20, 20), {8}), ((40, 60), {2, 4, 8}), ((100, 130), {1, 2})])
def test_scaled_decoding_is_close(size: tuple[int, int], shrinks: set[int]) -> None:
    """To the whole picture's part whose edges are those of the scaled part."""
    data = encode(waves(424, 568), quality=95, subsampling=0)
    whole, transform, found = decode_image(data, 3), TrainTransform(size, flip=0.0), set()
    for row in hash_uniform(4, np.arange(40), 0, transform.num_uniforms):
        top, left, height, width = transform.crop_box(424, 568, row)
        shrink = transform._shrink(height, width)
        rows, columns = (
            slice(edges.start * shrink, edges.stop * shrink)
            for edges in (_nearest(top, height, shrink), _nearest(left, width, shrink))
        )
        assert abs(rows.start - top) <= shrink / 2
        assert abs(columns.stop - left - width) <= shrink / 2
        difference = transform.load(data, row, channels=3).float() - resize(whole[:, rows, columns], size).float()
        assert difference.abs().mean() < 1
        found.add(shrink)
    assert found == shrinks


def test_scaled_parts_are_shifted_to_no_side() -> None:
    for shrink in (1, 2, 4, 8):
        starts = [_nearest(first, 100, shrink).start * shrink - first for first in range(64)]
        assert sum(starts) == 0


def test_a_scaled_part_is_never_enlarged() -> None:
    transform = TrainTransform((10, 20))
    for height in range(1, 200):
        for width in (1, 39, 40, 41, 80, 81, 161, 400):
            shrink = transform._shrink(height, width)
            for first in range(2 * shrink):
                rows, columns = _nearest(first, height, shrink), _nearest(first, width, shrink)
                assert shrink == 1 or rows.stop - rows.start >= 10
                assert shrink == 1 or columns.stop - columns.start >= 20
    assert [transform._shrink(10 * n + 1, 20 * n + 1) for n in (1, 2, 4, 8, 16)] == [1, 2, 4, 8, 8]


def test_load_distrusts_its_bytes() -> None:
    row, data = np.full(23, 0.5), encode(COLOUR)
    with pytest.raises(DecodeError, match="more than max_pixels") as caught:
        TrainTransform((8, 8)).load(data, row, channels=3, max_pixels=90 * 120 - 1)
    assert caught.value.cause == "pixels"
    for broken in (data[: len(data) // 2], data[:50], b"", b"\xff\xd8\xff\xe0"):
        with pytest.raises(DecodeError) as caught:
            TrainTransform((8, 8)).load(broken, row, channels=3)
        assert caught.value.cause == "decode"
