"""The tokenizer's suite against scikit-image, numpy and scipy, over one and two processes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import scipy.linalg
import scipy.signal
import skimage.metrics
import torch
from torch import Tensor, nn

from data_pipes.transforms.image import EvalTransform
from pretrain.config import load_typed
from pretrain.evaluation.encoder.features import make_accelerator
from pretrain.evaluation.tokenizer import protocols as tokenizer_protocols
from pretrain.evaluation.tokenizer import suite as tokenizer_suite
from pretrain.evaluation.tokenizer.reconstruction_metrics import FrechetMeter, LPIPSConfig, RFIDConfig, load_inception
from pretrain.evaluation.tokenizer.suite import TokenizerSuiteConfig, evaluate_tokenizer
from pretrain.losses.config import PerceptualConfig
from pretrain.losses.perceptual import load_lpips
from pretrain.weights.tokenizer import LoadedTokenizer
from tests.pretrain.losses.test_perceptual import save as save_random_lpips
from tests.pretrain.tiny_tokenizer import photo, random_tokenizer, write_photos
from tests.process_server import ProcessServer

SIZES = ((40, 36), (33, 50))
NUM_TEST = 11
CROP = (32, 36)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder / "test", [NUM_TEST - 4, 4], SIZES)
    write_photos(folder / "train", [30], SIZES)
    return {"test": str(folder / "test"), "train": str(folder / "train")}


@pytest.fixture(scope="module")
def pairs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(pictures, reconstructions, latents) by hand, one picture at a time: uint8 [n, H, W, 3] twice, [n, 8, h, w]."""
    tokenizer = random_tokenizer()
    mean, std = (np.asarray(values)[:, None, None] for values in (tokenizer.mean, tokenizer.std))
    pictures, reconstructions, latents = [], [], []
    for number in range(NUM_TEST):
        whole = torch.from_numpy(photo(number, *SIZES[number % 2])).permute(2, 0, 1)
        picture = EvalTransform(CROP, 36)(whole).numpy()
        with torch.no_grad():
            latent = tokenizer.model.encode(torch.from_numpy((picture / 255 - mean) / std).float()[None])
            decoded = tokenizer.model.decode(latent, CROP)[0].numpy()
        pictures.append(picture)
        reconstructions.append(np.rint(np.clip((decoded * std + mean) * 255, 0, 255)).astype(np.uint8))
        latents.append(latent[0].numpy())
    as_pixels = [np.stack(images).transpose(0, 2, 3, 1) for images in (pictures, reconstructions)]
    return as_pixels[0], as_pixels[1], np.stack(latents)


class SmallExtractor(nn.Module):
    """Stands for Inception: uint8 [B, 3, H, W] -> 5 features."""

    num_features = 5

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(5, 3 * 16, generator=torch.Generator().manual_seed(0)))

    def forward(self, pictures: Tensor) -> Tensor:
        assert pictures.dtype == torch.uint8
        pooled = nn.functional.adaptive_avg_pool2d(pictures.float() / 255, 4).flatten(1)
        features: Tensor = pooled @ self.weight.T
        return features


def suite_of(folders: dict[str, str], **fields: Any) -> TokenizerSuiteConfig:
    tasks = fields.pop("tasks")
    named = {name: tokenizer_suite.TokenizerTaskConfig(*task) for name, task in tasks.items()}
    return TokenizerSuiteConfig(**{"size": CROP, "batch_size": 3, **folders, **fields}, tasks=named)


def evaluate(tokenizer: LoadedTokenizer, suite: TokenizerSuiteConfig) -> dict[str, dict[str, Any]]:
    return {record["task"]: record for record in evaluate_tokenizer(tokenizer, suite, make_accelerator(cpu=True))}


def literal_ssim(one: np.ndarray, other: np.ndarray) -> float:
    """Wang et al. 2004 in float64, [H, W, C] in 0..255, with windows at the border over the reflected picture."""
    kernel = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window = np.outer(kernel, kernel) / kernel.sum() ** 2

    def average(plane: np.ndarray) -> np.ndarray:
        result: np.ndarray = scipy.signal.convolve2d(np.pad(plane, 5, mode="reflect"), window, mode="valid")
        return result

    values = []
    for x, y in zip(one.transpose(2, 0, 1), other.transpose(2, 0, 1), strict=True):
        mx, my = average(x), average(y)
        vx, vy, covariance = average(x * x) - mx**2, average(y * y) - my**2, average(x * y) - mx * my
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        values.append((2 * mx * my + c1) * (2 * covariance + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(values))


def test_psnr_and_ssim_are_those_of_their_definitions(
    folders: dict[str, str], pairs: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    """Per picture, on rounded uint8, with a data range of 255; then the mean."""
    records = evaluate(random_tokenizer(), suite_of(folders, tasks={"psnr": ("psnr_uint8",), "ssim": ("ssim_uint8",)}))
    psnr = [skimage.metrics.peak_signal_noise_ratio(a, b) for a, b in zip(*pairs[:2], strict=True)]
    ssim = [literal_ssim(a.astype(float), b.astype(float)) for a, b in zip(*pairs[:2], strict=True)]
    assert records["psnr"]["metrics"] == {"psnr": pytest.approx(np.mean(psnr), abs=2e-4)}
    assert records["ssim"]["metrics"] == {"ssim": pytest.approx(np.mean(ssim), abs=2e-4)}
    record = records["psnr"]
    assert (record["protocol"], record["num_test"], record["num_train"]) == ("psnr_uint8", NUM_TEST, 0)
    assert record["model_digest"] == random_tokenizer().digest
    assert record["view"]["image_size"] == list(CROP)
    assert record["view"]["short_side"] == 36
    assert "uint8" in record["view"]["rounding"]
    json.dumps(record)


def test_lpips_names_its_network(
    folders: dict[str, str], pairs: tuple[np.ndarray, np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    files = save_random_lpips(tmp_path, "alex")
    names = ("backbone_path", "backbone_sha256", "linear_path", "linear_sha256")
    given = {name: getattr(files, name) for name in names}
    record = evaluate(random_tokenizer(), suite_of(folders, tasks={"lpips": ("lpips", given)}))["lpips"]
    network = load_lpips(PerceptualConfig(network="alex", **given))
    scaled = [torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1 for images in pairs[:2]]
    assert record["metrics"] == {"lpips_alex": pytest.approx(float(network(*scaled).mean()), rel=1e-4)}
    assert record["settings"]["network"] == "alex"
    with pytest.raises(ValueError, match="needs sides of at least 31 pixels"):
        evaluate(random_tokenizer(), suite_of(folders, size=(16, 16), tasks={"lpips": ("lpips", given)}))
    assert LPIPSConfig().network == "alex"


def test_rfid_is_the_frechet_distance_to_the_same_crops(
    folders: dict[str, str], pairs: tuple[np.ndarray, np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_protocols, "load_inception", lambda config: SmallExtractor())
    record = evaluate(random_tokenizer(), suite_of(folders, tasks={"rfid": ("rfid_inception",)}))["rfid"]
    extractor = SmallExtractor()
    real, fake = (extractor(torch.from_numpy(images).permute(0, 3, 1, 2)).double().numpy() for images in pairs[:2])
    shift = real.mean(axis=0) - fake.mean(axis=0)
    covariances = np.cov(real.T), np.cov(fake.T)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = shift @ shift + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert record["metrics"] == {"rfid": pytest.approx(expected, rel=1e-4)}


def test_latent_statistics(folders: dict[str, str], pairs: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    tokenizer = random_tokenizer()
    tasks = {"latents": ("latent_statistics", {"dead_below": 0.01})}
    record = evaluate(tokenizer, suite_of(folders, tasks=tasks))["latents"]
    pixels = pairs[2].astype(np.float64).transpose(1, 0, 2, 3).reshape(8, -1)
    singular = np.linalg.svd(pixels - pixels.mean(axis=1, keepdims=True), compute_uv=False)
    share = singular / singular.sum()
    rank = np.exp(-(share * np.log(share)).sum())
    metrics = record["metrics"]
    assert metrics["latent_rms"] == pytest.approx(np.sqrt((pixels**2).mean()), rel=1e-5)
    assert metrics["scaling_factor"] == pytest.approx(1 / np.sqrt((pixels**2).mean()), rel=1e-5)
    assert metrics["effective_rank"] == pytest.approx(rank, rel=1e-4)
    assert metrics["effective_rank_share"] == pytest.approx(rank / 8, rel=1e-4)
    assert metrics["dead_channels"] == 0
    assert np.allclose(record["details"]["mean"], pixels.mean(axis=1), atol=1e-5)
    assert np.allclose(record["details"]["std"], pixels.std(axis=1), rtol=1e-4)


class Chosen(nn.Module):
    """A tokenizer whose latents are the pictures' averages over 4 x 4 pixels, through a function."""

    def __init__(self, change: Callable[[Tensor], Tensor], channels: int = 3) -> None:
        super().__init__()
        self.config = random_tokenizer(channels).model.config
        self.change = change

    def encode(self, images: Tensor) -> Tensor:
        return self.change(nn.functional.avg_pool2d(images, 4))

    def decode(self, latent: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        return nn.functional.interpolate(latent[:, :3], size, mode="nearest")


def test_dead_channels_are_found(folders: dict[str, str]) -> None:
    def eight(latent: Tensor) -> Tensor:
        constant = torch.full_like(latent, 7.0)
        return torch.cat([latent, latent, constant[:, :1], 1e-4 * latent[:, :1]], dim=1)

    tokenizer = replace(random_tokenizer(), model=Chosen(eight))
    record = evaluate(tokenizer, suite_of(folders, tasks={"latents": ("latent_statistics",)}))["latents"]
    assert record["metrics"]["dead_channels"] == 2
    assert record["details"]["dead_channels"] == [6, 7]
    assert 1.0 < record["metrics"]["effective_rank"] < 4.0  # three planes that stand there twice


def test_the_probe_reads_labels_that_are_in_the_latents(pictures: Path) -> None:
    """Bright thirds of noise, which an average over 4 x 4 areas tells apart; and latents without content."""
    lines = {"iterations": 100, "batch": 60, "refit": False, "learning_rates": [0.01, 0.1, 1.0]}
    folders = {"train": str(pictures / "train"), "test": str(pictures / "val")}
    suite = suite_of(folders, size=(16, 16), tasks={"probe": ("latent_linear", lines)})
    record = evaluate(random_tokenizer(channels=1), suite)["probe"]
    assert record["metrics"]["top1"] > 80
    assert record["selection"]["by"] == "held-out training images"
    assert record["selection"]["num_heads"] == 3
    assert (record["num_test"], record["num_train"]) == (31, 54)
    blind = replace(random_tokenizer(channels=1), model=Chosen(lambda z: torch.zeros(len(z), 8, *z.shape[2:]), 1))
    assert evaluate(blind, suite)["probe"]["metrics"]["top1"] < 40
    coarse = suite_of(folders, size=(16, 16), tasks={"probe": ("latent_linear", {**lines, "grid": 1})})
    assert evaluate(random_tokenizer(channels=1), coarse)["probe"]["settings"]["grid"] == 1


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_count_every_picture_once(
    folders: dict[str, str], tmp_path: Path, process_server: ProcessServer
) -> None:
    """11 pictures on 2 processes, and 1 picture, of which one process sees none."""
    arguments = [folders["test"], folders["train"], str(tmp_path)]
    call = "tests.pretrain.evaluation.tokenizer.processes:main"
    process_server.run_ranks(2, call, *arguments, CUDA_VISIBLE_DEVICES="")
    from tests.pretrain.evaluation.tokenizer.processes import suites

    for name, suite in suites(*arguments[:2]).items():
        found = json.loads((tmp_path / f"{name}.json").read_text())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tokenizer_protocols, "load_inception", lambda config: SmallExtractor())
            alone = evaluate(random_tokenizer(), suite)
        assert [record["task"] for record in found] == list(alone)
        for record in found:
            expected = alone[record["task"]]
            assert record["num_test"] == expected["num_test"]
            for metric, value in expected["metrics"].items():
                assert record["metrics"][metric] == pytest.approx(value, rel=1e-5), metric


def test_inception_is_read_from_a_checked_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchmetrics.image.fid import NoTrainInceptionV3

    torch.save({}, tmp_path / "empty.pth")
    with monkeypatch.context() as patch:  # random weights, which it has before it loads
        patch.setattr(NoTrainInceptionV3, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        random = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(tmp_path / "empty.pth"))
    path = tmp_path / "inception.pth"
    torch.save(random.state_dict(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    network = load_inception(RFIDConfig(str(path), digest.upper()[:12]))
    pictures = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = network(pictures)
    assert features.shape == (1, 2048)
    assert torch.equal(features, random(pictures))
    with pytest.raises(ValueError, match=rf"has the SHA-256 {digest}; expected 6726825d"):
        load_inception(RFIDConfig(str(path)))
    with pytest.raises(ValueError, match=r"there is no file .*absent\.pth"):
        load_inception(RFIDConfig(str(tmp_path / "absent.pth")))


def test_inception_that_cannot_be_had_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str, *_: object, **__: object) -> None:
        raise URLError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(
        ValueError, match=r"could not be had from https://github.com/toshas.*set settings.inception_path"
    ):
        load_inception(RFIDConfig())


def test_a_pickle_in_place_of_inception_runs_nothing(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"weight": Bomb()}, tmp_path / "bomb.pth")
    digest = hashlib.sha256((tmp_path / "bomb.pth").read_bytes()).hexdigest()
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        load_inception(RFIDConfig(str(tmp_path / "bomb.pth"), digest))
    assert not (tmp_path / "ran").exists()


def test_one_channel_is_shown_three_times() -> None:
    seen: list[Tensor] = []

    class Looking(SmallExtractor):
        def forward(self, pictures: Tensor) -> Tensor:
            seen.append(pictures)
            return super().forward(pictures)

    meter = FrechetMeter(Looking(), tokenizer_suite._rgb((), 1), torch.device("cpu"))
    grey = torch.arange(48, dtype=torch.uint8).reshape(3, 1, 4, 4)
    meter.update(grey, grey, torch.zeros(3, 8, 1, 1))
    assert torch.equal(seen[0], grey.expand(-1, 3, -1, -1))
    assert meter.finish(lambda value: [value])["rfid"] == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ValueError, match=r"channels is \[0, 1, 2\] and the pictures have 2"):
        tokenizer_suite._rgb((0, 1, 2), 2)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tasks": {}}, "no task is left"),
        ({"tasks": {"a": ("psnr_unit8",)}}, r"did you mean psnr_uint8\?"),
        ({"tasks": {"a": ("lpips", {"net": "alex"})}}, r"unknown key tasks\.a\.settings\.net"),
        ({"tasks": {"a": ("psnr_uint8",)}, "skip": ("b",)}, "skip names 'b'; the suite's tasks are a"),
        ({"tasks": {"a": ("psnr_uint8",)}, "skip": ("a",)}, "no task is left"),
        ({"tasks": {"a": ("psnr_uint8",)}, "batch_size": 0}, "batch_size=0"),
    ],
)
def test_a_suite_that_cannot_be_run(folders: dict[str, str], fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        suite_of(folders, **fields)


def test_data_that_do_not_fit(folders: dict[str, str], tmp_path: Path) -> None:
    probe = {"probe": ("latent_linear",)}
    with pytest.raises(ValueError, match="the same: set test=FOLDER"):
        evaluate(random_tokenizer(), suite_of({"test": folders["test"], "train": folders["test"]}, tasks=probe))
    with pytest.raises(ValueError, match=r"no training pictures for the latents' probe"):
        evaluate(random_tokenizer(), suite_of({"test": folders["test"]}, tasks=probe))
    with pytest.raises(ValueError, match="no test pictures"):
        evaluate(random_tokenizer(), suite_of({}, tasks={"psnr": ("psnr_uint8",)}))
    with pytest.raises(ValueError, match="does not say which size"):
        evaluate(random_tokenizer(), suite_of(folders, size=None, tasks={"psnr": ("psnr_uint8",)}))
    with pytest.raises(ValueError, match="window of 11 pixels"):
        evaluate(random_tokenizer(), suite_of(folders, size=(8, 8), tasks={"ssim": ("ssim_uint8",)}))


def test_the_shipped_suite(root: Path) -> None:
    suite = load_typed(TokenizerSuiteConfig, root / "configs/eval/tokenizer.yaml", ["skip=[rfid]", "size=[64,96]"])
    assert list(suite.tasks) == ["psnr", "ssim", "lpips", "rfid", "latents", "probe"]
    assert suite.task_settings("probe").linear().blocks == (1,)
    assert tuple(suite.size or ()) == (64, 96)
