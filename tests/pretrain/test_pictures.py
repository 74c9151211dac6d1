"""Strips show every sample of every picture, enlarged but not changed, and say what the oracle view is."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from pretrain.pictures import (
    LABEL_PIXELS,
    LABELS,
    MAX_EMBEDDED_WIDTH,
    PADDING_PIXELS,
    picture_strip,
    picture_uri,
    save_pictures,
)


def pictures(num_samples: int, channels: int, size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (num_samples, channels, size, size)
    return {name: torch.randint(0, 256, shape, generator=generator).to(torch.uint8) for name in LABELS}


@pytest.mark.parametrize("channels", [1, 3])
def test_tiles_hold_the_pixels(tmp_path: Path, channels: int) -> None:
    shown = pictures(3, channels, 32)
    path = save_pictures(shown, tmp_path / "pictures" / "step-00000010.png")
    with Image.open(path) as opened:
        strip = torch.frombuffer(bytearray(opened.convert("RGB").tobytes()), dtype=torch.uint8)
        strip = strip.view(opened.height, opened.width, 3)
    row_pixels = 96 + 2 * PADDING_PIXELS  # 32 pixels are enlarged three times
    for row, images in enumerate(shown.values()):
        top = row * (LABEL_PIXELS + row_pixels) + LABEL_PIXELS + PADDING_PIXELS
        for sample in range(3):
            left = PADDING_PIXELS + sample * (96 + PADDING_PIXELS)
            tile = strip[top + 1 : top + 96 : 3, left + 1 : left + 96 : 3]
            assert torch.equal(tile, images[sample].permute(1, 2, 0).expand(32, 32, 3))
    assert [child.name for child in path.parent.iterdir()] == [path.name]


def test_labels_tell_the_oracle_view_and_are_drawn() -> None:
    assert "the model does not know" in LABELS["oracle_denormalised"]
    strip = picture_strip({"oracle_denormalised": torch.full((1, 1, 96, 96), 255, dtype=torch.uint8)})
    label = strip.crop((0, 0, strip.width, LABEL_PIXELS)).convert("L")
    darkest, _ = label.getextrema()
    assert darkest == 0
    assert label.crop((strip.width - 4, 0, strip.width, LABEL_PIXELS)).getextrema() == (255, 255), (
        "the label is cut off"
    )


def test_many_samples_and_many_channels_are_cut_and_said() -> None:
    many = pictures(20, 5, 16)["input"]
    strip = picture_strip({"input": many}, max_samples=4)
    three = picture_strip({"input": many[:4, :3]})
    assert strip.size == three.size
    below_label = (0, LABEL_PIXELS, strip.width, strip.height)
    assert strip.crop(below_label).tobytes() == three.crop(below_label).tobytes()
    assert strip.tobytes() != three.tobytes()  # the label says "channels 0-2 of 5"


def test_wrong_tensors_are_named() -> None:
    with pytest.raises(ValueError, match="no pictures"):
        picture_strip({})
    with pytest.raises(ValueError, match=r"'input'.*float32 \[1, 3, 8, 8\]"):
        picture_strip({"input": torch.zeros(1, 3, 8, 8)})
    with pytest.raises(ValueError, match=r"found torch.uint8 \[3, 8, 8\]"):
        picture_strip({"input": torch.zeros(3, 8, 8, dtype=torch.uint8)})


def test_pictures_for_pages_are_of_modest_size(tmp_path: Path) -> None:
    small = save_pictures(pictures(1, 1, 8), tmp_path / "small.png")
    assert picture_uri(small).startswith("data:image/png;base64,")
    large = save_pictures(pictures(8, 3, 224), tmp_path / "large.png")
    uri = picture_uri(large)
    assert uri.startswith("data:image/jpeg;base64,")
    assert len(uri) < large.stat().st_size / 3
    with Image.open(large) as opened:
        assert opened.width > MAX_EMBEDDED_WIDTH
    torn = tmp_path / "torn.png"
    torn.write_bytes(large.read_bytes()[:5000])
    assert picture_uri(torn) == ""
    assert picture_uri(tmp_path / "absent.png") == ""
