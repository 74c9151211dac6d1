"""An objective, protocols and an export target that live in a folder of the user's, from training to the report."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import types
from collections.abc import Iterator
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest
import torch

import pretrain.extensions
from launchers.cli import main
from pretrain.checkpoint.open_folder import open_folder
from pretrain.config import ConfigError, load_config, load_run_config
from pretrain.export.targets import export_model
from pretrain.extensions import ExtensionError, find_extension
from pretrain.weights.backbone import load_backbone
from tests.pretrain.runs import CONFIG as DIGITS
from tests.pretrain.runs import losses, overrides_of, torchrun
from tests.pretrain.tiny_tokenizer import train_tokenizer, write_photos
from tests.process_server import ENVIRONMENT
from tests.processes import run_to_end

CONFIG = """
name: own
seed: 3
device: cpu
objective: {name: "mine.parts:RowObjective", width: 6}
optim: {base_lr: null, lr: 1.0e-2, ema_decay: 0.5}
train: {global_batch: 8, steps: 8, log_every: 1, val_samples: 8, num_pictures: 2}
checkpoint: {every_steps: 4}
tracking: {ship: false}
"""
SUITE = """
tasks:
  knn: {protocol: knn_dino, settings: {k: [3], primary_k: 3}}
  attentive: {protocol: attentive_vjepa2, settings: {heads: 2, epochs: 1, batch: 8, learning_rates: [1.0e-3]}}
  spread: {protocol: "mine.parts:PROTOCOL", settings: {scale: 2.0}}
"""


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Each test finds the modules of its own folder."""
    path = list(sys.path)
    yield
    sys.path[:] = path
    for name in [name for name in sys.modules if name == "mine" or name.startswith("mine.")]:
        del sys.modules[name]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's working directory: mine/parts.py and run.yaml."""
    folder = tmp_path / "project"
    (folder / "mine").mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("own_parts.py"), folder / "mine" / "parts.py")
    (folder / "run.yaml").write_text(CONFIG)
    (folder / "suite.yaml").write_text(SUITE)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(folder))])
    return folder


@pytest.fixture
def other_dataset(tiny_dataset: Path, tmp_path: Path) -> Path:
    """The pictures of `tiny_dataset` in another order, for evaluations, which refuse the training data."""
    from data_pipes.index.index import index_shards

    folder = tmp_path / "other"
    shutil.copytree(tiny_dataset, folder, ignore=shutil.ignore_patterns("*.json", "*.idx*", "index*"))
    for path in sorted(folder.iterdir()):
        if path.suffix != ".tar":
            path.unlink()
    shards = sorted(folder.glob("*.tar"))[:2]
    index_shards(shards, folder, classes=("a", "b", "c", "d"))
    return folder


def arguments(data: Path, name: str = "own") -> list[str]:
    return ["run.yaml", f"name={name}", f"data.train={data}", f"data.val={data}"]


def test_from_training_to_the_report(
    project: Path, tiny_dataset: Path, other_dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "tessera.py").write_text("import sys\nfrom launchers.cli import main\nsys.exit(main())\n")
    (project / "bin").mkdir()
    (project / "tessera.py").rename(project / "bin" / "tessera")  # as installed: its own folder leads Python's path
    checkpoint = project / "runs/own/checkpoints/step-00000004"
    command = [sys.executable, str(project / "bin" / "tessera"), "train", *arguments(tiny_dataset)]
    done = run_to_end(command, env={**ENVIRONMENT, "OWN_PARTS_DIE": str(checkpoint)}, cwd=project)
    assert done.returncode == -signal.SIGKILL, done.stderr

    assert main(["train", *arguments(tiny_dataset), "--dry-run", "--json"]) == 0, capsys.readouterr().err
    assert json.loads(capsys.readouterr().out)["memory"]["num_parameters"] == (8 * 6 + 6) + (6 * 8 + 8)
    assert main(["train", *arguments(tiny_dataset), "--json"]) == 0, capsys.readouterr().err
    resumed = json.loads(capsys.readouterr().out)
    assert (resumed["status"], resumed["step"], resumed["steps_this_start"]) == ("finished", 8, 4)
    assert main(["train", *arguments(tiny_dataset, "whole"), "--json"]) == 0
    capsys.readouterr()
    assert losses(project / "runs/own") == losses(project / "runs/whole")
    ours, theirs = load_backbone("runs/own"), load_backbone("runs/whole")
    assert ours.digest == theirs.digest
    assert ours.interface.input_shape == (1, 8, 8)
    assert (ours.interface.width, ours.interface.num_tokens) == (6, 8)
    saved = load_run_config(open_folder("runs/own"))
    assert (saved.objective_name, saved.objective.width) == ("mine.parts:RowObjective", 6)

    evaluation = ["eval", "runs/own", "--suite", "suite.yaml", f"test={other_dataset}", "--device", "cpu", "--json"]
    assert main([*evaluation, "--untrained"]) == 0, capsys.readouterr().err
    found = json.loads(capsys.readouterr().out)
    assert set(found["trained"]) == {"knn_top1", "attentive_top1", "spread_spread"}
    record = json.loads((project / "runs/own/eval/step-00000008/spread.json").read_text())
    assert record["protocol"] == "mine.parts:PROTOCOL"
    assert record["settings"] == {"scale": 2.0}
    with torch.no_grad():
        summaries = [
            ours.model.features(view[None].float() / 255 * 2 - 1, 1)[0][0]  # type: ignore[operator]
            for view in _pictures(other_dataset)
        ]
    assert record["metrics"]["spread"] == pytest.approx(2.0 * float(torch.cat(summaries).std()), rel=1e-4)

    assert main(["export", "runs/own", "out", "--to", "mine.parts:export", "half=true", "--json"]) == 0
    exported = json.loads(capsys.readouterr().out)
    assert (exported["step"], exported["half"], exported["errors"]) == (8, True, {"sums": 0.0})
    written = json.loads((project / "out/sums.json").read_text())
    assert written["sums"] == {name: float(tensor.sum()) for name, tensor in ours.model.state_dict().items()}
    card = (project / "out/README.md").read_text()
    assert ours.digest in card
    assert "sums.json" in card
    assert main(["report", "runs/own"]) == 0
    page = (project / "runs/own/report.html").read_text()
    assert "mine.parts:RowObjective" in page
    assert "mine.parts:PROTOCOL" in page


def _pictures(folder: Path) -> list[torch.Tensor]:
    from data_pipes.sequential.pictures import SequentialImages
    from data_pipes.shards.manifest import Manifest
    from data_pipes.transforms.image import EvalTransform

    dataset = SequentialImages(Manifest.load(str(folder)), EvalTransform((8, 8), 8), channels=1)
    return [dataset[number][0] for number in range(len(dataset))]


@pytest.mark.distributed
def test_every_rank_of_torchrun_finds_the_working_directory(project: Path, tiny_dataset: Path) -> None:
    done = run_to_end(torchrun(2, "-m", "pretrain", *arguments(tiny_dataset)), env=ENVIRONMENT, cwd=project)
    assert done.returncode == 0, done.stderr[-4000:]
    assert sorted(losses(project / "runs/own")) == list(range(1, 9))


def test_what_such_an_encoder_cannot_do_is_refused(
    project: Path, tiny_dataset: Path, other_dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *arguments(tiny_dataset), "train.steps=1"]) == 0
    capsys.readouterr()
    for target, words in (
        ("timm", "it is a Rows, and only plain vision transformers"),
        ("transformers", "it is a Rows"),
        ("original", "it is a RowModel"),
        ("diffusers", "is no tokenizer"),
        ("mine.parts:absent", "there is no 'absent' in it"),
        ("mine.parts:NUMBER", "which is a int; expected a function (model, folder)"),
        ("mine.parts:write_nothing", "wrote no file"),
        ("tmim", "did you mean timm?"),
    ):
        assert main(["export", "runs/own", "out", "--to", target]) == 2, target
        assert words in capsys.readouterr().err
        assert not (project / "out").exists()
    assert main(["export", "runs/own", "out", "--to", "onnx", "half=true"]) == 2
    assert "'half=true' goes with a target of your own" in capsys.readouterr().err
    (project / "suite.yaml").write_text("tasks: {tune: {protocol: finetune_mae}}")
    assert main(["eval", "runs/own", "--suite", "suite.yaml", f"test={other_dataset}", "--device", "cpu"]) == 2
    assert "fine-tuning knows the layers of this package's encoders, and this is a Rows" in capsys.readouterr().err
    onnx = export_model("runs/own", project / "onnx", "onnx")
    assert max(onnx.summary["errors"].values()) < 1e-5  # type: ignore[attr-defined]


def test_an_encoder_of_this_package_goes_where_it_always_goes(
    project: Path, tiny_dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = overrides_of(tiny_dataset, project / "runs", "own", "train.steps=1", "objective.name=mine.parts:WrappedMAE")
    assert main(["train", str(DIGITS), *given]) == 0, capsys.readouterr().err
    assert load_backbone("runs/own").interface.depth == 2
    assert main(["export", "runs/own", "timm", "--to", "timm"]) == 0, capsys.readouterr().err
    assert main(["export", "runs/own", "whole", "--to", "transformers", "--pretraining"]) == 2
    assert "its decoder is that of a Wrapped, and only MAE's has a counterpart" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mine.prats:RowObjective", r"no module 'mine.prats' was found; looked for mine/prats.py .* working directory"),
        ("mnie.parts:RowObjective", "no module 'mnie' was found"),
        ("mine.parts.deep:X", "no module 'mine.parts.deep' was found"),
        ("mine.parts:RowObjectiv", r"mine/parts.py was imported, and there is no 'RowObjectiv' in it"),
        ("mine.parts:", "expected package.module:Name"),
        ("mine/parts.py:RowObjective", "expected package.module:Name"),
        ("mine.parts:NoObjective", "the class NoObjective; expected a subclass of pretrain.objectives.base.Objective"),
        ("mine.parts:NUMBER", "which is a int; expected a subclass"),
        ("mine.parts:Unfinished", "an Objective without blocks, build_backbone, "),
        ("mine.parts:WithoutConfig", "config_class is None; expected the dataclass"),
        ("mine.parts:Named", "config_class has a field `name`"),
        ("mine.broken:X", "importing mine.broken failed with ZeroDivisionError: division by zero"),
        ("mine.needs:X", "importing mine.needs failed with ModuleNotFoundError: No module named 'not_installed'"),
        ("image_mea", r"known objectives: image_mae, .* \(did you mean image_mae\?\), or an import path such as"),
    ],
)
def test_wrong_objectives_are_named(project: Path, name: str, words: str) -> None:
    (project / "mine/broken.py").write_text("1 / 0\n")
    (project / "mine/needs.py").write_text("import not_installed\n")
    with pytest.raises(ConfigError, match=words) as caught:
        load_config("run.yaml", [f"objective.name='{name}'"])
    assert name in str(caught.value)
    assert "run.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("objective.wdith=3", r"unknown key 'objective.wdith' \(did you mean objective.width\?\)"),
        ("objective.width=wide", "'objective.width'"),
        ("objective_name=image_mae", "unknown key 'objective_name'"),
    ],
)
def test_keys_are_checked_as_those_of_other_objectives(project: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config("run.yaml", [override])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("OtherPrefix", "do not fit what build_backbone"),
        ("OtherPlayer", r"names 'columns' as backbone_player; its players are \['rows'\]"),
    ],
)
def test_a_backbone_that_could_not_be_loaded_is_said_before_training(
    project: Path, tiny_dataset: Path, name: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *arguments(tiny_dataset), f"objective.name=mine.parts:{name}"]) == 2
    assert words.replace("\\", "") in capsys.readouterr().err
    assert not (project / "runs").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("NoFeatures", "holds a Linear .* with a method `features`"),
        ("FlatFeatures", r"FlatRows.features\(inputs, 1\) gives .*; expected a list of one pair"),
    ],
)
def test_a_backbone_that_is_no_encoder_trains_and_is_not_evaluated(
    project: Path, tiny_dataset: Path, name: str, words: str
) -> None:
    assert main(["train", *arguments(tiny_dataset), "train.steps=1", f"objective.name=mine.parts:{name}"]) == 0
    with pytest.raises(ValueError, match=words):
        load_backbone("runs/own")


def test_code_that_comes_with_a_run_is_not_run(project: Path, tiny_dataset: Path) -> None:
    assert main(["train", *arguments(tiny_dataset), "train.steps=1"]) == 0
    run = project / "runs/own"
    bait = "import pathlib\npathlib.Path('ran').touch()\nfrom tests.pretrain.own_parts import RowObjective\n"
    (run / "bait.py").write_text(bait)
    for folder in (run, run / "checkpoints/step-00000001"):
        text = (folder / "config.yaml").read_text().replace("mine.parts:", "runs.own.bait:")
        (folder / "config.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"bait.py lies within .*own, and code that comes with a run"):
            load_run_config(open_folder(folder))
    assert not (project / "ran").exists()
    sys.modules.pop("runs.own", None)
    load_config(run / "config.yaml")  # what a user starts is the user's
    assert (project / "ran").exists()
    sys.modules.pop("runs.own.bait")


def register(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    """Entry points as an installed distribution would register them, by their group's last word."""
    found = EntryPoints(EntryPoint(kind, value, f"tessera.{kind}s") for kind, value in values.items())
    monkeypatch.setattr(pretrain.extensions, "entry_points", lambda **wanted: found.select(**wanted))


def test_entry_points_are_names_too(
    project: Path, tiny_dataset: Path, other_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(
        monkeypatch,
        objective="mine.parts:RowObjective",
        protocol="mine.parts:PROTOCOL",
        exporter="mine.parts:export",
    )
    assert main(["train", *arguments(tiny_dataset), "train.steps=1", "objective.name=objective"]) == 0
    assert load_run_config(open_folder("runs/own")).objective_name == "objective"
    (project / "suite.yaml").write_text("tasks: {spread: {protocol: protocol}}")
    assert main(["eval", "runs/own", "--suite", "suite.yaml", f"test={other_dataset}", "--device", "cpu"]) == 0
    assert main(["export", "runs/own", "out", "--to", "exporter"]) == 0
    with pytest.raises(ConfigError, match=r"known objectives: image_mae, .*, objective \(did you mean objective\?\)"):
        load_config("run.yaml", ["objective.name=objectiv"])
    register(monkeypatch, objective="mine.gone:X")
    with pytest.raises(ConfigError, match=r"the entry point 'mine.gone:X': no module 'mine.gone'"):
        load_config("run.yaml", ["objective.name=objective"])


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (
            "protocol: 'mine.parts:METER'",
            r"a TokenizerProtocol; protocols are instances of .*protocols.Protocol",
        ),
        ("protocol: 'mine.parts:gone'", "tasks.spread.protocol is 'mine.parts:gone': .* there is no 'gone' in it"),
        ("protocol: knn_dion", r"known protocols: knn_dino, .* \(did you mean knn_dino\?\), or an import path"),
        ("protocol: 'mine.parts:PROTOCOL', settings: {scael: 1}", r"spread.settings.scael \(did you mean scale\?\)"),
    ],
)
def test_wrong_protocols_are_named(project: Path, task: str, words: str) -> None:
    from pretrain.config import load_typed
    from pretrain.evaluation.encoder.suite import SuiteConfig

    (project / "suite.yaml").write_text(f"tasks: {{spread: {{{task}}}}}")
    with pytest.raises(ConfigError, match=words):
        load_typed(SuiteConfig, project / "suite.yaml")


def test_a_protocol_of_tokenizers(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_photos(tmp_path / "photos", [4], ((16, 16),))
    run = train_tokenizer(tmp_path / "photos", tmp_path, "run", f"data.val={tmp_path / 'photos'}").run_dir
    (project / "suite.yaml").write_text(
        "tasks: {one: {protocol: 'mine.parts:METER'}, two: {protocol: 'mine.parts:METER', settings: {scale: -2}}}"
    )
    assert main(["eval", str(run), "--suite", "suite.yaml", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["trained"]
    assert found["one_brighter_by"] != 0
    assert found["two_brighter_by"] == pytest.approx(-2 * found["one_brighter_by"])


def test_names_in_a_notebook_and_packages(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = types.ModuleType("__main__")
    notebook.Outer = types.SimpleNamespace(inner=7)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "__main__", notebook)
    assert find_extension("__main__:Outer.inner", "tessera.objectives", "here") == 7
    assert find_extension("no_such_name", "tessera.objectives", "here") is None
    with pytest.raises(ExtensionError, match=r"here is '__main__:Outer.other'"):
        find_extension("__main__:Outer.other", "tessera.objectives", "here")


def test_the_working_directory_is_found_where_nothing_else_leads_to_it(project: Path) -> None:
    """And with -P it is not."""
    script = project / "bin" / "look.py"
    script.parent.mkdir()
    script.write_text(
        "from pretrain.extensions import find_extension\nprint(find_extension('mine.parts:NUMBER', 'x', 'here'))\n"
    )
    found = run_to_end([sys.executable, str(script)], env=ENVIRONMENT, cwd=project)
    assert found.stdout.strip() == "3", found.stderr
    safe = run_to_end([sys.executable, "-P", str(script)], env=ENVIRONMENT, cwd=project)
    assert "no module 'mine' was found" in safe.stderr
