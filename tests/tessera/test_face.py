"""The Python interface does what the command line does, several times in one process, and leaves nothing behind."""

from __future__ import annotations

import gc
import io
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import tessera
from launchers.cli import main
from pretrain.evaluation.encoder.datasets import open_evaluation_data
from pretrain.evaluation.encoder.features import extract, make_accelerator
from pretrain.evaluation.encoder.views import make_prepare
from tests.pretrain.runs import CONFIG, assert_same_weights, losses, overrides_of, run_here
from tests.pretrain.tiny_tokenizer import train_tokenizer, write_photos
from tests.process_server import ENVIRONMENT
from tests.processes import wait_until


@pytest.fixture(autouse=True)
def _as_in_a_fresh_process() -> None:
    """Other tests of this process may have left accelerate in another precision, which it keeps for good."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


SUITE: dict[str, Any] = {"tasks": {"knn": {"protocol": "knn_dino", "settings": {"k": [3], "primary_k": 3}}}}


def left_behind() -> tuple[object, ...]:
    """What a call could leave in a process."""
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    threads = sorted(thread.name for thread in threading.enumerate() if not thread.daemon)
    return handlers, wakeup, threads, gc.isenabled(), torch.is_grad_enabled(), torch.distributed.is_initialized()


def test_importing_it_imports_nothing_else() -> None:
    probe = "import sys, tessera; print(sorted({m.split('.')[0] for m in sys.modules} & set(sys.argv[1:])))"
    heavy = ["torch", "numpy", "omegaconf", "timm", "pretrain", "data_pipes", "launchers"]
    done = subprocess.run(
        [sys.executable, "-c", probe, *heavy], capture_output=True, text=True, check=True, env=ENVIRONMENT
    )
    assert done.stdout.strip() == "[]"


def test_the_names_are_there_and_no_others() -> None:
    assert set(tessera.__all__) <= set(dir(tessera))
    for name in tessera.__all__:
        assert getattr(tessera, name).__module__.startswith("tessera.")
        assert getattr(tessera, name).__doc__
    with pytest.raises(AttributeError, match=r"no attribute 'trian'; it has .*train"):
        tessera.trian  # noqa: B018
    assert (Path(tessera.__file__).parent / "py.typed").is_file()


def test_configurations_from_files_names_and_dictionaries(tiny_dataset: Path, tmp_path: Path) -> None:
    given = overrides_of(tiny_dataset, tmp_path, "run", "train.steps=2")
    from_file = tessera.load_config(CONFIG, given)
    assert tessera.load_config("demo/digits", given) == from_file
    content = yaml.safe_load(from_file.to_yaml())
    assert tessera.load_config(content) == from_file
    changes = {"train.steps": 3, "train": {"log_every": 2}, "optim": {"lr": 0.5}}
    changed = tessera.load_config(content, changes)
    assert (changed.train.steps, changed.train.log_every, changed.optim.lr) == (3, 2, 0.5)
    assert changed.train.global_batch == from_file.train.global_batch
    assert tessera.load_config(CONFIG, "train.log_every=7").train.log_every == 7
    with pytest.raises(ValueError, match=r"the configuration: unknown key 'train.stesp' \(did you mean"):
        tessera.load_config(content, {"train.stesp": 3})
    with pytest.raises(ValueError, match="no configuration file at mae/vit_bsae"):
        tessera.load_config("mae/vit_bsae")


def test_training_evaluating_and_exporting_as_the_command_line_does(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = left_behind()
    config = tessera.load_config(CONFIG, overrides_of(tiny_dataset, tmp_path, "one", "train.steps=3"))
    result = tessera.train(config)
    assert (result.run_dir, result.status, result.step, result.samples) == (tmp_path / "one", "finished", 3, 24)
    assert result.metrics["train/loss"] == losses(result.run_dir)[3]
    assert Path(result.checkpoint).is_dir()
    assert "tessera train" in json.loads((result.run_dir / "run.json").read_text())["resume_command"]
    again = tessera.train(config)  # there is nothing left to do
    assert (again.status, again.step, again.summary["steps_this_start"]) == ("finished", 3, 0)
    run_here(overrides_of(tiny_dataset, tmp_path, "two", "train.steps=3"))
    assert_same_weights(tmp_path / "one", tmp_path / "two")
    assert left_behind() == before
    assert tessera.load_config(result.run_dir / "config.yaml") == config

    suite = tmp_path / "suite.yaml"
    suite.write_text(yaml.safe_dump(SUITE))
    other = other_pictures(tmp_path / "other")
    records = tessera.evaluate(result.run_dir, SUITE, {"test": str(other)}, untrained=True, device="cpu")
    assert [record["weights"] for record in records] == ["trained", "untrained"]
    for precision in ("bf16", "fp32"):  # accelerate alone refuses a second precision in a process
        tessera.evaluate(tmp_path / "two", suite, [f"test={other}", f"precision={precision}"], device="cpu")
    capsys.readouterr()
    given = ["--suite", str(suite), f"test={other}", "--device", "cpu", "--json"]
    assert main(["eval", str(tmp_path / "two"), *given]) == 0
    found = json.loads(capsys.readouterr().out)["results"]
    assert found[0]["metrics"] == records[0]["metrics"]

    assert tessera.export(result.run_dir, "timm", tmp_path / "timm", pool="avg") == tmp_path / "timm"
    assert json.loads((tmp_path / "timm/config.json").read_text())["global_pool"] == "avg"
    with pytest.raises(ValueError, match=r"no option 'pol' of --to timm \(did you mean pool\?\)"):
        tessera.export(result.run_dir, "timm", tmp_path / "timm2", pol="avg")
    with pytest.raises(FileExistsError, match="exports are never overwritten"):
        tessera.export(result.run_dir, "timm", tmp_path / "timm")
    assert left_behind() == before


def test_an_interrupt_stops_a_run_and_the_same_call_goes_on(tiny_dataset: Path, tmp_path: Path) -> None:
    before = left_behind()
    given = overrides_of(tiny_dataset, tmp_path, "run", "train.steps=300", "checkpoint.every_steps=1000")
    config = tessera.load_config(CONFIG, given)
    journal = config.run_dir / "journal.jsonl"

    def interrupt() -> None:
        wait_until(lambda: journal.is_file() and '"train/loss"' in journal.read_text(), "the journal's first point")
        os.kill(os.getpid(), signal.SIGINT)

    other = threading.Thread(target=interrupt)
    other.start()
    stopped = tessera.train(config)
    other.join()
    assert stopped.status == "stopped"
    assert 0 < stopped.step < 300
    assert left_behind() == before
    finished = tessera.train(config)
    assert (finished.status, finished.step) == ("finished", 300)
    assert finished.summary["steps_this_start"] == 300 - stopped.step


def test_mistakes_are_exceptions_with_the_sentences_of_the_command_line(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = left_behind()
    given = overrides_of(tiny_dataset, tmp_path, "run", "train.steps=1", "train.epochs=2")
    with pytest.raises(ValueError, match="give exactly one") as caught:
        tessera.train(tessera.load_config(CONFIG, given))
    assert main(["train", str(CONFIG), *given]) == 2
    assert str(caught.value) in capsys.readouterr().err
    for use in (tessera.load_backbone, tessera.load_tokenizer):
        with pytest.raises(FileNotFoundError, match="expected a run, a checkpoint"):
            use(tmp_path / "absent")
    with pytest.raises(ValueError, match="the suite has no tasks"):
        tessera.evaluate(tmp_path, {}, device="cpu")
    assert left_behind() == before


def other_pictures(folder: Path) -> Path:
    """31 labelled pictures in the classes of `tiny_dataset`."""
    import webdataset as wds

    from data_pipes.index.index import index_shards

    folder.mkdir()
    generator = np.random.Generator(np.random.PCG64(1))
    with wds.TarWriter(str(folder / "shard-000000.tar")) as writer:
        for number in range(31):
            file = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8)).save(file, "PNG")
            writer.write({"__key__": f"{number:04d}", "png": file.getvalue(), "cls": str(number % 4).encode()})
    index_shards(sorted(folder.glob("*.tar")), folder, classes=("a", "b", "c", "d"))
    return folder


@pytest.fixture(scope="module")
def run_dir(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    run_here(overrides_of(tiny_dataset, folder, "run", "train.steps=1"))
    return folder / "run"


def test_features_are_those_of_the_evaluation(run_dir: Path, tmp_path: Path) -> None:
    backbone = tessera.load_backbone(run_dir, ema=True)
    assert not backbone.training
    assert backbone.source.weights == "ema"
    assert (backbone.image_size, backbone.device.type) == ((8, 8), "cpu")
    data = open_evaluation_data(
        backbone.source, train=None, test=str(other_pictures(tmp_path / "other")), resize_ratio=None
    )
    stored = [data.test[number][0] for number in range(len(data.test))]
    found = backbone.features(torch.stack(stored))
    expected = extract(
        backbone.model,
        data.test,
        make_accelerator(cpu=True),
        normalise=make_prepare(backbone.source, "all"),
        num_blocks=1,
        batch_size=31,
    )
    assert expected is not None
    torch.testing.assert_close(found.summary, expected.class_tokens[:, -1])
    torch.testing.assert_close(found.average, expected.average)
    assert found.tokens.shape == (31, 16, 32)
    summary = backbone(backbone.preprocess(stored))
    torch.testing.assert_close(summary, found.summary)
    summary.sum().backward()  # gradients where they are wanted
    assert not found.summary.requires_grad


def test_every_form_of_a_picture_is_the_same_picture(run_dir: Path, tmp_path: Path) -> None:
    backbone = tessera.load_backbone(run_dir)
    array = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
    image = Image.fromarray(array)
    image.save(tmp_path / "one.png")
    tensor = torch.from_numpy(array)[None]
    forms = [
        image,
        array,
        array[:, :, None],
        tensor,
        tensor[None],
        tmp_path / "one.png",
        str(tmp_path / "one.png"),
        (tmp_path / "one.png").read_bytes(),
        [image],
    ]
    expected = backbone.preprocess(forms[0])
    assert expected.shape == (1, 1, 8, 8)
    for form in forms[1:]:
        torch.testing.assert_close(backbone.preprocess(form), expected, rtol=0, atol=0)
    deep = Image.fromarray(array.astype(np.uint16) * 257)
    torch.testing.assert_close(backbone.preprocess(deep), expected, rtol=0, atol=0.02)  # resized before it is rounded
    mixed = backbone.preprocess([image, np.full((8, 8), 7, dtype=np.uint8), tensor])
    torch.testing.assert_close(mixed[[0, 2]], expected.expand(2, -1, -1, -1))
    for wrong, words in (
        (tensor.float(), "expected uint8 or uint16, as stored"),
        (tensor.expand(3, -1, -1), r"expected \[1, height, width\]"),
        (array.reshape(-1), "a picture is a ndarray"),
        ([], "there is no picture"),
        (3, "a picture is a int"),
    ):
        with pytest.raises(ValueError, match=words):
            backbone.preprocess(wrong)  # type: ignore[arg-type]


def test_a_tokenizer_encodes_and_decodes(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", [4], ((16, 16),))
    run = train_tokenizer(tmp_path / "photos", tmp_path, "run").run_dir
    tokenizer = tessera.load_tokenizer(run)
    pictures = torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    latents = tokenizer.encode(pictures)
    assert latents.shape[2:] == (16 // tokenizer.factor, 24 // tokenizer.factor)
    back = tokenizer.decode(latents)
    assert (back.dtype, back.shape) == (torch.uint8, pictures.shape)
    arrays = [picture.permute(1, 2, 0).numpy() for picture in pictures]
    torch.testing.assert_close(tokenizer.encode(arrays), latents)
    model = tokenizer.source.model
    normal = (pictures / 255 - torch.tensor(tokenizer.source.mean)[:, None, None]) / torch.tensor(tokenizer.source.std)[
        :, None, None
    ]
    with torch.no_grad():
        torch.testing.assert_close(model.encode(normal), latents)
    with pytest.raises(ValueError, match="expected one size for all of a batch"):
        tokenizer.encode([arrays[0], arrays[1][:8]])
    with pytest.raises(ValueError, match="with a method `features`; tokenizers have their own"):
        tessera.load_backbone(run)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_gives_a_run_s_batches_and_resumes(tiny_dataset: Path, tmp_path: Path, workers: int) -> None:
    given = overrides_of(
        tiny_dataset, tmp_path, "run", "train.steps=1", "train.micro_batch=4", f"data.workers={workers}"
    )
    config = tessera.load_config(CONFIG, given)
    with tessera.open_loader(config) as batches:
        assert len(batches) == 61 // 8 * 2
        whole = [batch.positions for batch in batches]
        assert batches.position == 56
        second = next(iter(batches))
    assert torch.cat(whole).tolist() == list(range(56))
    assert second.positions.tolist() == [56, 57, 58, 59]
    assert (second.images.dtype, tuple(second.images.shape)) == (torch.uint8, (4, 1, 8, 8))
    with tessera.open_loader(config, position=16, epochs=None) as endless:
        assert next(iter(endless)).positions.tolist() == [16, 17, 18, 19]
        with pytest.raises(TypeError, match="do not end"):
            len(endless)
    with pytest.raises(ValueError, match="a run's configuration has its own batch"):
        tessera.open_loader(config, batch_size=3)


def test_the_loader_reads_a_folder_of_shards(tiny_dataset: Path) -> None:
    batches = tessera.open_loader(
        tiny_dataset, batch_size=8, image_size=(6, 6), channels=1, flip=0.0, crop_scale=(1.0, 1.0), epochs=2
    )
    keys = [key for batch in batches for key in batch.keys]
    assert len(keys) == 2 * 61 // 8 * 8
    assert len(set(keys[:61])) == 61
    with pytest.raises(ValueError, match=r"unknown key 'filp' \(did you mean flip\?\)"):
        tessera.open_loader(tiny_dataset, batch_size=8, image_size=(6, 6), filp=0.0)
    with pytest.raises(ValueError, match="a data set needs batch_size=NUMBER and image_size"):
        tessera.open_loader(tiny_dataset)
