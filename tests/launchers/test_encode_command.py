"""`tessera encode`: latents against the model called by hand, kills, processes, and what stock webdataset reads."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import webdataset
from PIL import Image
from torch import Tensor

from data_pipes.shards.manifest import Manifest
from data_pipes.transforms.image import EvalTransform
from launchers.cli import main
from pretrain.latents import encode_dataset, encode_shard
from pretrain.models.tokenizers.dc_ae import DCAE
from pretrain.weights.tokenizer import load_tokenizer
from tests.data_pipes.tiny_shards import write_shards
from tests.pretrain.tiny_tokenizer import photo, train_tokenizer, write_photos
from tests.process_server import ProcessServer

SIZES = ((20, 24), (16, 16), (33, 19))
MEAN, STD = (0.4, 0.5, 0.6), (0.5, 0.4, 0.3)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """17 labelled photographs of three sizes in 4 shards."""
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder, [5, 4, 5, 3], SIZES)
    return folder


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    return train_tokenizer(photos, tmp_path_factory.mktemp("run"), "run").run_dir


def encode(photos: Path, out: Path, run_dir: Path, *more: str) -> int:
    return main(["encode", str(photos), str(out), "--model", str(run_dir), "--device", "cpu", *more])


def samples_of(folder: Path) -> list[dict[str, Any]]:
    """Members by extension, and the key as `__key__`, read with the standard library alone."""
    samples: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("shard-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                content = tar.extractfile(member)
                assert content is not None
                samples.setdefault(key, {"__key__": key})[extension] = content.read()
    return list(samples.values())


def tree(folder: Path) -> dict[str, str]:
    """Every file's digest."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@functools.cache
def model_of(run_dir: Path) -> DCAE:
    model = load_tokenizer(run_dir).model
    assert isinstance(model, DCAE)
    return model


def by_hand(run_dir: Path, number: int, size: tuple[int, int] | None, mirror: bool = False) -> Tensor:
    """The latent of one photograph, with nothing but the model and the pixels."""
    picture = torch.from_numpy(photo(number, *SIZES[number % 3])).permute(2, 0, 1)
    if size is not None:
        picture = EvalTransform(size, max(size))(picture)
    if mirror:
        picture = picture.flip(-1)
    pixels = (picture.double() / 255 - torch.tensor(MEAN).double()[:, None, None]) / torch.tensor(STD)[:, None, None]
    with torch.no_grad():
        latent: Tensor = model_of(run_dir).encode(pixels.float()[None])[0]
    return latent


def test_latents_are_the_models_and_members_are_carried_over(
    photos: Path, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert encode(photos, tmp_path / "out", run_dir, "--mirrored", "--batch-size", "2", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    samples = samples_of(tmp_path / "out")
    assert [sample["__key__"] for sample in samples] == [f"{number:06d}" for number in range(17)]
    for number, sample in enumerate(samples):
        assert {name for name in sample if not name.startswith("__")} == {"latent.safetensors", "cls", "txt", "json"}
        assert (sample["cls"], sample["txt"]) == (b"%d" % (number % 3), f"photograph {number}".encode())
        tensors = safetensors.torch.load(sample["latent.safetensors"])
        assert tensors.keys() == {"latent", "mirrored"}
        assert tensors["latent"].shape == (8, 4, 4)
        assert torch.allclose(tensors["latent"], by_hand(run_dir, number, (16, 16)), atol=1e-4)
        assert torch.allclose(tensors["mirrored"], by_hand(run_dir, number, (16, 16), mirror=True), atol=1e-4)
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.num_samples == summary["num_samples"] == 17
    assert manifest.classes == ("a", "b", "c")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        ["manifest.json", *(f"shard-{n:06d}.tar{end}" for n in range(4) for end in ("", ".idx"))]
    )


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_pipeline_of_stock_webdataset_reads_it(photos: Path, run_dir: Path, tmp_path: Path) -> None:
    """webdataset leaves its files open, hence the filters."""
    assert encode(photos, tmp_path / "out", run_dir) == 0
    urls = str(tmp_path / "out" / "shard-{000000..000003}.tar")
    pairs = list(webdataset.WebDataset(urls, shardshuffle=False).decode().to_tuple("latent.safetensors", "cls"))
    latents = [safetensors.torch.load(data)["latent"] for data, _ in pairs]
    assert torch.stack(latents).shape == (17, 8, 4, 4)
    assert [label for _, label in pairs] == [number % 3 for number in range(17)]


def test_statistics_are_those_of_all_latent_pixels(photos: Path, run_dir: Path, tmp_path: Path) -> None:
    assert encode(photos, tmp_path / "out", run_dir, "--any-size") == 0
    description = encode_dataset.read_description(Manifest.load(tmp_path / "out"))
    latents = [safetensors.torch.load(s["latent.safetensors"])["latent"] for s in samples_of(tmp_path / "out")]
    assert {tuple(latent.shape) for latent in latents} == {(8, 5, 6), (8, 4, 4), (8, 9, 5)}
    pixels = np.concatenate([latent.numpy().reshape(8, -1) for latent in latents], axis=1).astype(np.float64)
    statistics = description["statistics"]
    assert statistics["num_latent_pixels"] == pixels.shape[1]
    assert np.allclose(statistics["mean"], pixels.mean(axis=1), rtol=1e-9)
    assert np.allclose(statistics["std"], pixels.std(axis=1), rtol=1e-9)
    assert np.isclose(statistics["scaling_factor"], 1 / np.sqrt((pixels**2).mean()), rtol=1e-9)
    assert description["model"]["digest"] == load_tokenizer(run_dir).digest
    assert (description["factor"], description["channels"], description["view"]) == (4, 8, "as stored")
    for number, latent in enumerate(latents):
        assert torch.allclose(latent, by_hand(run_dir, number, None), atol=1e-4)


def test_the_size_that_was_encoded_is_kept(photos: Path, run_dir: Path, tmp_path: Path) -> None:
    """Pictures are padded to multiples of 4; who decodes must know where to cut."""
    assert encode(photos, tmp_path / "out", run_dir, "--any-size") == 0
    for number, sample in enumerate(samples_of(tmp_path / "out")):
        data = sample["latent.safetensors"]
        head = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        assert head["__metadata__"] == {"image_size": "{}x{}".format(*SIZES[number % 3])}


@pytest.mark.parametrize(("dtype", "stored"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_precision_storage(photos: Path, run_dir: Path, tmp_path: Path, dtype: str, stored: torch.dtype) -> None:
    assert encode(photos, tmp_path / "out", run_dir, "--dtype", dtype, "--size", "16x24") == 0
    latent = safetensors.torch.load(samples_of(tmp_path / "out")[3]["latent.safetensors"])["latent"]
    assert latent.dtype == stored
    assert torch.allclose(latent.float(), by_hand(run_dir, 3, (16, 24)), atol=1e-5, rtol=2**-8)


def test_tiles_are_used_for_large_pictures_alone(photos: Path, run_dir: Path, tmp_path: Path) -> None:
    assert encode(photos, tmp_path / "whole", run_dir, "--any-size") == 0
    assert encode(photos, tmp_path / "tiled", run_dir, "--any-size", "--tile", "32") == 0
    for number, (whole, tiled) in enumerate(
        zip(samples_of(tmp_path / "whole"), samples_of(tmp_path / "tiled"), strict=True)
    ):
        one, other = (safetensors.torch.load(s["latent.safetensors"])["latent"] for s in (whole, tiled))
        assert one.shape == other.shape
        assert torch.equal(one, other) == (max(SIZES[number % 3]) <= 32)


class Killed(BaseException):
    """Stands for the end of the process."""


def test_a_killed_job_ends_with_the_same_bytes(
    photos: Path, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--mirrored", "--dtype", "bf16", "--batch-size", "3")
    assert encode(photos, tmp_path / "whole", run_dir, *options) == 0
    real, calls = encode_shard.write_atomically, 0

    def dies(path: Path, data: bytes) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:  # two notes are written; the third shard is there, its note is not
            raise Killed
        real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(encode_shard, "write_atomically", dies)
        with pytest.raises(Killed):
            encode(photos, tmp_path / "out", run_dir, *options)
    assert not (tmp_path / "out" / "manifest.json").exists()
    torn = tmp_path / "out" / "shard-000000.tar"
    torn.write_bytes(torn.read_bytes()[:-1])  # and one shard lost its end
    (tmp_path / "out" / ".shard-000003.tar.77.tmp").write_bytes(b"half")

    def dies_late(path: Path, data: bytes) -> None:
        raise Killed  # shards and index are written; the manifest does not say yet what they are

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(encode_dataset, "write_atomically", dies_late)
        with pytest.raises(Killed):
            encode(photos, tmp_path / "out", run_dir, *options)
    assert encode(photos, tmp_path / "out", run_dir, *options, "--json") == 0
    assert json.loads(capsys.readouterr().out)["num_resumed_shards"] == 4
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    before = tree(tmp_path / "out")
    assert encode(photos, tmp_path / "out", run_dir, *options, "--json") == 0  # finished: nothing to do
    assert json.loads(capsys.readouterr().out)["num_resumed_shards"] == 4
    assert tree(tmp_path / "out") == before


def test_finished_shards_are_not_encoded_again(
    photos: Path, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encoded: list[int] = []
    real = encode_shard.ShardEncoder.encode

    def counting(self: Any, shard: int, *rest: Any) -> Any:
        encoded.append(shard)
        if len(encoded) == 3:
            raise Killed
        return real(self, shard, *rest)

    monkeypatch.setattr(encode_shard.ShardEncoder, "encode", counting)
    with pytest.raises(Killed):
        encode(photos, tmp_path / "out", run_dir)
    assert encode(photos, tmp_path / "out", run_dir, "--json") == 0
    assert encoded == [0, 1, 2, 2, 3]
    assert json.loads(capsys.readouterr().out)["num_resumed_shards"] == 2


@pytest.mark.distributed
def test_two_processes_write_the_same_bytes(
    photos: Path, run_dir: Path, tmp_path: Path, process_server: ProcessServer
) -> None:
    assert encode(photos, tmp_path / "alone", run_dir, "--batch-size", "2") == 0
    arguments = ["encode", str(photos), str(tmp_path / "out"), "--model", str(run_dir), "--device", "cpu"]
    said = process_server.run_ranks(2, "launchers.cli:main", [*arguments, "--batch-size", "2", "--json"])
    assert json.loads(said)["num_samples"] == 17
    assert tree(tmp_path / "out") == tree(tmp_path / "alone")


def test_other_options_do_not_continue_a_job(
    photos: Path, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert encode(photos, tmp_path / "out", run_dir) == 0
    assert encode(photos, tmp_path / "out", run_dir, "--dtype", "fp16") == 2
    assert "dtype was 'fp32', is 'fp16'" in capsys.readouterr().err
    assert encode(photos, tmp_path / "out", run_dir, "--no-ema") == 2
    assert "model_digest was" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep me")
    assert encode(photos, tmp_path / "mine", run_dir) == 2
    assert "was not begun by `tessera encode`" in capsys.readouterr().err


def test_bad_pictures_stop_the_job_or_are_listed(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {1: {"png": b"no picture", "cls": b"0"}, 3: {"png": b"nor this", "cls": b"0"}, 4: {"cls": b"1"}}
    write_shards(tmp_path / "data", [3, 2], bad, [str(label) for label in range(7)])
    assert encode(tmp_path / "data", tmp_path / "out", run_dir) == 2
    assert "000001 in shard-000000.tar" in (said := capsys.readouterr().err)
    assert "--skip-unreadable" in said
    assert encode(tmp_path / "data", tmp_path / "listed", run_dir, "--skip-unreadable", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["num_samples"], summary["num_skipped"], summary["num_shards"]) == (2, 3, 1)  # all of one are bad
    assert [sample["__key__"] for sample in samples_of(tmp_path / "listed")] == ["000000", "000002"]
    listed = json.loads((tmp_path / "listed" / "skipped.json").read_text())
    assert [entry["key"] for entry in listed] == ["000001", "000003", "000004"]


def test_a_latent_that_is_not_finite_stops_the_job(
    photos: Path, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = encode_shard.PictureCoder.encode
    monkeypatch.setattr(encode_shard.PictureCoder, "encode", lambda self, pictures: real(self, pictures) * 1e30)
    assert encode(photos, tmp_path / "out", run_dir, "--dtype", "fp16") == 2
    assert "000000 in shard-000000.tar: its latent is not finite as fp16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--any-size", "--short-side", "20"), "a short side without a size"),
        (("--carry", "png"), "cannot be carried over"),
        (("--tile", "30"), "multiple of 16"),
        (("--tile", "8"), "multiples of the model's factor 4"),
        (("--size", "16", "--short-side", "12"), "does not fit into a short side of 12"),
    ],
)
def test_mistakes(
    photos: Path,
    run_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    words: str,
) -> None:
    assert encode(photos, tmp_path / "out", run_dir, *options) == 2
    assert words in capsys.readouterr().err


def test_sixteen_bit_pictures_keep_their_depth(tmp_path: Path) -> None:
    pixels = (np.arange(16 * 16).reshape(16, 16) * 257 % 65536).astype(np.uint16)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    write_shards(tmp_path / "data", [4], {n: {"png": file.getvalue()} for n in range(4)})
    config = train_tokenizer(
        tmp_path / "data", tmp_path, "run", "data.bit_depth=16", "objective.model.in_channels=1",
        "objective.mean=[0.5]", "objective.std=[0.5]",
    )  # fmt: skip
    assert encode(tmp_path / "data", tmp_path / "out", config.run_dir) == 0
    latent = safetensors.torch.load(samples_of(tmp_path / "out")[0]["latent.safetensors"])["latent"]
    normalised = (torch.from_numpy(pixels.astype(np.float32))[None, None] / 65535 - 0.5) / 0.5
    with torch.no_grad():
        expected = model_of(config.run_dir).encode(normalised)[0]
    assert torch.allclose(latent, expected, atol=1e-4)
