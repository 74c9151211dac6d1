"""Strips show every sample of every picture, enlarged but not changed, and say what the oracle view is; films move."""

import base64
import io
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from data_pipes.batch import Batch
from pretrain.models.video_config import VideoMAEConfig, VideoViTConfig
from pretrain.objectives.mae_config import MAESTConfig
from pretrain.objectives.mae_st import mae_st_objective
from pretrain.report.embedded import EMBEDDED_FILM_WIDTHS, FRAME_MS, MAX_EMBEDDED_WIDTH, film_uri, picture_uri
from pretrain.report.picture_strips import (
    LABEL_PIXELS,
    LABELS,
    PADDING_PIXELS,
    picture_strip,
    save_films,
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


def films(num_samples: int, num_frames: int, size: int = 16) -> dict[str, Tensor]:
    """Every frame of one grey of its own, which a GIF keeps as it is; the views differ."""
    greys = 10 * torch.arange(num_frames)[:, None, None, None] + torch.arange(4)[:, None, None, None, None, None]
    shape = (4, num_samples, num_frames, 3, size, size)
    return dict(zip(LABELS, greys.expand(shape).to(torch.uint8), strict=True))


@pytest.mark.parametrize("num_frames", [1, 2, 9])
def test_a_film_has_all_frames_of_all_samples_in_order(tmp_path: Path, num_frames: int) -> None:
    shown = films(3, num_frames)
    path = save_films(shown, tmp_path / "films" / "step-00000010.gif")
    with Image.open(path) as opened:
        assert (opened.format, opened.n_frames) == ("GIF", num_frames)
        assert opened.size == picture_strip({name: film[:, 0] for name, film in shown.items()}).size
        assert opened.info["loop"] == 0  # endless
        for time in range(num_frames):
            opened.seek(time)
            assert opened.info["duration"] == FRAME_MS
            frame = opened.convert("RGB")
            for row in range(4):
                top = row * (LABEL_PIXELS + 96 + 2 * PADDING_PIXELS) + LABEL_PIXELS + PADDING_PIXELS
                for sample in range(3):
                    left = PADDING_PIXELS + sample * (96 + PADDING_PIXELS)
                    assert frame.getpixel((left + 48, top + 48)) == (10 * time + row,) * 3
    assert [child.name for child in path.parent.iterdir()] == [path.name]


def test_a_film_that_stands_still_takes_its_time(tmp_path: Path) -> None:
    path = save_films({"input": torch.zeros(1, 5, 1, 8, 8, dtype=torch.uint8)}, tmp_path / "still.gif")
    with Image.open(path) as opened:
        assert _durations(opened) == [5 * FRAME_MS]


def _durations(opened: Image.Image) -> list[int]:
    found = []
    for index in range(getattr(opened, "n_frames", 1)):
        opened.seek(index)
        opened.load()
        found.append(int(opened.info.get("duration", 0)))
    return found


def test_many_samples_of_a_film_are_cut(tmp_path: Path) -> None:
    path = save_films(films(9, 2), tmp_path / "many.gif", max_samples=7)
    with Image.open(path) as opened:
        assert opened.width == 7 * (96 + PADDING_PIXELS) + PADDING_PIXELS


@pytest.mark.parametrize(
    ("shown", "message"),
    [
        ({}, "expected films .* found none"),
        ({"input": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)}, r"found input \[1, 3, 8, 8\]"),
        (
            {name: torch.zeros(1, frames, 3, 8, 8, dtype=torch.uint8) for name, frames in (("a", 2), ("b", 3))},
            r"of one length T, found a \[1, 2, 3, 8, 8\], b \[1, 3, 3, 8, 8\]",
        ),
        ({"input": torch.zeros(1, 2, 3, 8, 8)}, r"'input'.*float32 \[1, 3, 8, 8\]"),
    ],
)
def test_what_is_no_film_is_named(tmp_path: Path, shown: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        save_films(shown, tmp_path / "film.gif")
    assert not list(tmp_path.iterdir())


def test_films_for_pages_are_of_modest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_films(films(3, 4), tmp_path / "film.gif")
    uri = film_uri(path)
    assert base64.b64decode(uri.removeprefix("data:image/gif;base64,")) == path.read_bytes()
    noise = torch.randint(0, 256, (4, 4, 3, 96, 96), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    large = save_films({"input": noise}, tmp_path / "large.gif")
    most = large.stat().st_size // 3
    monkeypatch.setattr("pretrain.report.embedded.MAX_EMBEDDED_FILM_BYTES", most)
    content = base64.b64decode(film_uri(large).removeprefix("data:image/webp;base64,"))
    assert len(content) <= most
    with Image.open(io.BytesIO(content)) as opened:
        assert (opened.format, getattr(opened, "n_frames", 1)) == ("WEBP", 4)
        assert opened.width in EMBEDDED_FILM_WIDTHS
        assert _durations(opened)[1:] == [FRAME_MS] * 3
    monkeypatch.setattr("pretrain.report.embedded.MAX_EMBEDDED_FILM_BYTES", 100)
    assert film_uri(large) == ""


def test_a_torn_or_absent_film_is_left_out(tmp_path: Path) -> None:
    path = save_films(films(2, 4), tmp_path / "film.gif")
    path.write_bytes(path.read_bytes()[:40])
    assert film_uri(path) == ""
    assert film_uri(tmp_path / "absent.gif") == ""


def test_the_films_of_an_objective_are_its_predicted_frames(tmp_path: Path) -> None:
    encoder = VideoViTConfig(8, (16, 16), 2, (8, 8), 3, 24, 1, 2, family="mae_st")
    model = VideoMAEConfig(encoder, 16, 1, 2, predicted_frames=4)
    objective = mae_st_objective(MAESTConfig(model=model, repeats=1, mask_ratio=0.5), seed=0)
    clips = torch.randint(0, 256, (2, 1, 3, 8, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    batch = Batch(images=clips, labels=torch.zeros(2), positions=torch.arange(2), keys=["a", "b"])
    path = save_films(objective.films(batch), tmp_path / "film.gif")
    with Image.open(path) as opened:
        assert getattr(opened, "n_frames", 1) == 4  # MAE-ST predicts half of the frames
