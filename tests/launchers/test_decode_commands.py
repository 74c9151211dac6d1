"""`tessera decode` and `tessera reconstruct`: pictures against the model called by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import skimage.metrics
import torch
from PIL import Image

from launchers.cli import main
from pretrain.weights.tokenizer import LoadedTokenizer, load_tokenizer
from tests.pretrain.tiny_tokenizer import photo, png, train_tokenizer, write_photos

SIZES = ((20, 24), (33, 19))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder, [3, 4], SIZES)
    return folder


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    return train_tokenizer(photos, tmp_path_factory.mktemp("run"), "run").run_dir


@pytest.fixture(scope="module")
def tokenizer(run_dir: Path) -> LoadedTokenizer:
    return load_tokenizer(run_dir)


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory, photos: Path, run_dir: Path) -> Path:
    out = tmp_path_factory.mktemp("latents") / "out"
    assert command("encode", photos, out, run_dir, "--any-size", "--mirrored") == 0
    return out


def command(name: str, source: Path, out: Path, model: Path, *more: str) -> int:
    return main([name, str(source), str(out), "--model", str(model), "--device", "cpu", *more])


def by_hand(tokenizer: LoadedTokenizer, pixels: np.ndarray) -> np.ndarray:
    """The reconstruction of uint8 [H, W, 3], in float64 around the model."""
    mean, std = np.asarray(tokenizer.mean), np.asarray(tokenizer.std)
    normalised = torch.from_numpy((pixels / 255 - mean) / std).permute(2, 0, 1).float()[None]
    with torch.no_grad():
        decoded = tokenizer.model.decode(tokenizer.model.encode(normalised), (pixels.shape[0], pixels.shape[1]))
    values = decoded[0].permute(1, 2, 0).double().numpy() * std + mean
    return np.rint(np.clip(values * 255, 0, 255)).astype(np.uint8)


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    """Up to values that lie between two grey levels, which another batch may round the other way."""
    assert found.shape == expected.shape
    difference = np.abs(found.astype(int) - expected.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


def test_latents_become_the_reconstructions_of_their_pictures(
    latents: Path, run_dir: Path, tokenizer: LoadedTokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("decode", latents, tmp_path / "out", run_dir, "--json", "--batch-size", "2") == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["num_pictures"], summary["encoded_by_this_model"]) == (7, True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{n:06d}.png" for n in range(7)]
    for number in range(7):
        pixels = photo(number, *SIZES[number % 2])
        assert_close(read(tmp_path / "out" / f"{number:06d}.png"), by_hand(tokenizer, pixels))


def test_mirrored_latents_and_a_limit(latents: Path, run_dir: Path, tokenizer: LoadedTokenizer, tmp_path: Path) -> None:
    assert command("decode", latents, tmp_path / "out", run_dir, "--mirrored", "--limit", "2") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["000000.png", "000001.png"]
    assert_close(read(tmp_path / "out" / "000001.png"), by_hand(tokenizer, photo(1, *SIZES[1])[:, ::-1].copy()))


def test_another_models_latents_are_pointed_out(
    latents: Path, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("decode", latents, tmp_path / "out", run_dir, "--no-ema", "--json") == 0
    said = capsys.readouterr()
    assert "another model encoded these latents" in said.err
    assert json.loads(said.out)["encoded_by_this_model"] is False


def test_a_file_of_scaled_latents(run_dir: Path, tokenizer: LoadedTokenizer, tmp_path: Path) -> None:
    """As a diffusion model gives them: a batch, multiplied with the scaling factor."""
    drawn = torch.randn(2, 8, 3, 5, generator=torch.Generator().manual_seed(0))
    samples = tmp_path / "samples.safetensors"
    safetensors.torch.save_file({"batch": drawn * 0.25, "one": drawn[1].clone() * 0.25}, samples)
    assert command("decode", samples, tmp_path / "out", run_dir, "--scaling-factor", "0.25") == 0
    folder = tmp_path / "out" / "samples"
    assert sorted(path.name for path in folder.iterdir()) == ["batch-00000.png", "batch-00001.png", "one.png"]
    with torch.no_grad():
        decoded = tokenizer.model.decode(drawn)[1].permute(1, 2, 0).double().numpy()
    values = np.rint(np.clip((decoded * tokenizer.std + tokenizer.mean) * 255, 0, 255)).astype(np.uint8)
    assert_close(read(folder / "one.png"), values)
    assert_close(read(folder / "batch-00001.png"), values)


def test_names_never_lead_out_of_the_folder(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of tensors in a file that somebody sent; such names in tars are refused when they are indexed."""
    for name in ("../../escaped", "a/../../../escaped"):
        safetensors.torch.save_file({name: torch.zeros(8, 2, 2)}, tmp_path / "sent.safetensors")
        assert command("decode", tmp_path / "sent.safetensors", tmp_path / "out", run_dir) == 2
        assert "cannot be the name of a file" in capsys.readouterr().err
    assert not list(tmp_path.rglob("escaped*"))


def test_what_cannot_be_decoded(
    latents: Path, photos: Path, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(source: Path, words: str, *more: str, out: Path = tmp_path / "out") -> None:
        assert command("decode", source, out, run_dir, *more) == 2
        assert words in capsys.readouterr().err

    fails(photos, "it describes no latents")
    fails(latents, "leave out --scaling-factor", "--scaling-factor", "2")
    (tmp_path / "text.safetensors").write_text("no tensors")
    fails(tmp_path / "text.safetensors", "no safetensors file")
    safetensors.torch.save_file({"a": torch.zeros(7, 2, 2)}, tmp_path / "other.safetensors")
    fails(tmp_path / "other.safetensors", "has 7 channels, the tokenizer's have 8")
    safetensors.torch.save_file({"a": torch.zeros(8, 2)}, tmp_path / "flat.safetensors")
    fails(tmp_path / "flat.safetensors", "expected floats [channels, height, width]")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "000000.png").write_bytes(b"mine")
    fails(latents, "exists (or two pictures have this name)", out=tmp_path / "full")
    assert (tmp_path / "full" / "000000.png").read_bytes() == b"mine"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.png").write_bytes(png(photo(0, 21, 30)))
    (folder / "sub" / "b.png").write_bytes(png(photo(1, 40, 70)))
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_reconstructions_stand_beside_their_pictures(
    files: Path, run_dir: Path, tokenizer: LoadedTokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("reconstruct", files, tmp_path / "out", run_dir, "--json") == 0
    said = capsys.readouterr()
    summary = json.loads(said.out)
    scores = []
    for name, pixels in (("a.png", photo(0, 21, 30)), ("sub/b.png", photo(1, 40, 70))):
        shown = read(tmp_path / "out" / f"{name}.png")
        width = pixels.shape[1]
        assert np.array_equal(shown[:, :width], pixels)
        reconstruction = shown[:, width : 2 * width]
        assert_close(reconstruction, by_hand(tokenizer, pixels))
        difference = np.clip(reconstruction.astype(int) - pixels.astype(int) + 128, 0, 255)
        assert np.array_equal(shown[:, 2 * width :], difference)
        scores.append(skimage.metrics.peak_signal_noise_ratio(pixels, reconstruction))
    assert [entry["psnr"] for entry in summary["pictures"]] == pytest.approx(scores, abs=1e-3)
    assert [entry["size"] for entry in summary["pictures"]] == [[21, 30], [40, 70]]
    assert summary["psnr"] == pytest.approx(np.mean(scores), abs=1e-3)
    assert f"{np.mean(scores):.2f} dB" in said.err


def test_large_pictures_go_through_tiles(files: Path, run_dir: Path, tmp_path: Path) -> None:
    assert command("reconstruct", files, tmp_path / "whole", run_dir) == 0
    assert command("reconstruct", files, tmp_path / "tiled", run_dir, "--tile", "32") == 0
    small, large = "a.png.png", "sub/b.png.png"
    assert np.array_equal(read(tmp_path / "whole" / small), read(tmp_path / "tiled" / small))
    whole, tiled = read(tmp_path / "whole" / large), read(tmp_path / "tiled" / large)
    assert whole.shape == tiled.shape
    assert not np.array_equal(whole, tiled)
    # The difference is that of the attention's context; a tile in the wrong place would be a difference of the content.
    one, other = (shown[:, 70:140].astype(float) for shown in (whole, tiled))
    assert np.abs(one - other).mean() < 0.25 * one.std()


def test_a_crop_and_what_is_no_picture(
    files: Path, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("reconstruct", files / "a.png", tmp_path / "out", run_dir, "--size", "16x20") == 0
    assert read(tmp_path / "out" / "a.png.png").shape == (16, 60, 3)
    (files / "broken.png").write_bytes(b"not a picture")
    assert command("reconstruct", files / "broken.png", tmp_path / "out", run_dir) == 2
    assert "broken.png" in capsys.readouterr().err
    assert command("reconstruct", files / "absent.png", tmp_path / "out", run_dir) == 2
    assert "no such picture or folder" in capsys.readouterr().err
    (files / "empty").mkdir()
    assert command("reconstruct", files / "empty", tmp_path / "out", run_dir) == 2
    assert "no picture in" in capsys.readouterr().err
