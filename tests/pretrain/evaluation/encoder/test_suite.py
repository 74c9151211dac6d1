"""Backbones, suites and the two commands on a real run: what is found, evaluated, written and exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from data_pipes.pack.pack import pack
from launchers.cli import main
from pretrain.checkpoint.open_folder import open_folder
from pretrain.checkpoint.read import load_weights, newest_complete
from pretrain.config import load_typed
from pretrain.evaluation.encoder.datasets import open_evaluation_data
from pretrain.evaluation.encoder.suite import SuiteConfig
from pretrain.evaluation.encoder.views import view_ratio, view_short_side
from pretrain.models.config import ViTConfig
from pretrain.models.vit import ViT
from pretrain.tracking.journal import read_metrics
from pretrain.weights.backbone import load_backbone, weights_digest
from pretrain.weights.starting import initialize
from tests.pretrain.evaluation.encoder.labelled_pictures import write_pictures

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled:UserWarning"  # DCP says so whenever one process reads a checkpoint
)

SUITE = """\
batch_size: 16
tasks:
  knn:
    protocol: knn_dino
    settings: {k: [3, 5], primary_k: 5}
  linear:
    protocol: linear_dinov2_cached
    settings: {iterations: 30, batch: 32, blocks: [1, 2], standardize: true, learning_rates: [0.01, 0.1]}
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    (tmp_path / "suite.yaml").write_text(SUITE)
    return tmp_path / "suite.yaml"


def test_a_run_and_its_checkpoint_give_the_trained_encoder(run_dir: Path) -> None:
    checkpoint = newest_complete(open_folder(run_dir))
    assert checkpoint is not None
    weights = load_weights(checkpoint, "model")
    encoder = {name.removeprefix("encoder."): t for name, t in weights.items() if name.startswith("encoder.")}
    for path in (run_dir, str(checkpoint)):
        backbone = load_backbone(path)
        assert all(torch.equal(tensor, encoder[name]) for name, tensor in backbone.model.state_dict().items())
        assert (backbone.label, backbone.step, backbone.weights) == ("step-00000003", 3, "trained")
        assert (backbone.mean, backbone.std) == ((0.3,), (0.37,))
        assert backbone.run_dir == run_dir
        assert backbone.digest == weights_digest(encoder)
        assert not backbone.model.training


def test_the_untrained_backbone_is_the_runs_own_first_step(run_dir: Path) -> None:
    backbone = load_backbone(run_dir, untrained=True)
    assert backbone.config is not None
    objective = backbone.config.build_objective()
    initialize(objective, backbone.config.seed, None)  # what the trainer does before its first step
    start = objective.players["model"].state_dict()
    assert all(torch.equal(tensor, start[f"encoder.{name}"]) for name, tensor in backbone.model.state_dict().items())
    assert (backbone.label, backbone.step, backbone.weights) == ("step-00000003-untrained", 0, "untrained")


def test_the_moving_average_is_another_backbone(run_dir: Path) -> None:
    backbone = load_backbone(run_dir, ema=True)
    assert (backbone.label, backbone.weights) == ("step-00000003-ema", "ema")
    assert len({backbone.digest, load_backbone(run_dir).digest, load_backbone(run_dir, untrained=True).digest}) == 3


def test_the_digest_sees_names_shapes_and_values() -> None:
    state = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    digests = [
        weights_digest(changed)
        for changed in (
            state,
            {"a": torch.zeros(3, 2), "b": torch.ones(1)},
            {"a": torch.zeros(2, 3), "c": torch.ones(1)},
            {"a": torch.zeros(2, 3), "b": torch.full((1,), 1.0000001)},
        )
    ]
    assert len(set(digests)) == 4
    assert weights_digest(dict(reversed(state.items()))) == digests[0]


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["eval", *arguments, "--device", "cpu", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    result: dict[str, Any] = json.loads(lines[0])
    return result


def test_eval_reports_trained_and_untrained_and_writes_what_it_printed(
    run_dir: Path, suite: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = evaluate(capsys, str(run_dir), "--suite", str(suite), "--untrained")
    for side, label, prefix, step in (
        ("trained", "step-00000003", "eval", 3),
        ("untrained", "step-00000003-untrained", "eval_untrained", 0),
    ):
        assert set(result[side]) == {"knn_top1", "linear_top1"}
        for task in ("knn", "linear"):
            record = json.loads((run_dir / "eval" / label / f"{task}.json").read_text())
            assert record["metrics"]["top1"] == result[side][f"{task}_top1"]
            assert (record["weights"], record["step"], record["num_test"]) == (side, step, 31)
            points = read_metrics(run_dir)[f"{prefix}/{task}/top1"]
            assert [(point.step, point.value) for point in points] == [(step, record["metrics"]["top1"])]
    assert result["trained"]["linear_top1"] > 80  # rows of pixels are easy
    knn, linear = result["results"][:2]
    assert knn["settings"]["k"] == [3, 5]
    assert knn["selection"] == {"by": "fixed in advance", "k": 5}
    assert linear["protocol"] == "linear_dinov2_cached"
    assert linear["selection"]["by"] == "held-out training images"
    assert linear["num_train"] == 60
    assert linear["model_digest"] == load_backbone(run_dir).digest
    assert linear["view"]["image_size"] == [16, 16]


def test_evaluating_again_changes_no_figure_and_adds_no_point(
    run_dir: Path, suite: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = evaluate(capsys, str(run_dir), "--suite", str(suite))
    points = read_metrics(run_dir)["eval/knn/top1"]
    assert evaluate(capsys, str(run_dir), "--suite", str(suite))["trained"] == first["trained"]
    assert read_metrics(run_dir)["eval/knn/top1"] == points


def test_an_export_and_its_weights_file_evaluate_like_the_checkpoint(
    run_dir: Path, pictures: Path, suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = evaluate(capsys, str(run_dir), "--suite", str(suite))["trained"]
    assert main(["export", str(run_dir), str(tmp_path / "out"), "--to", "timm", "--json"]) == 0
    exported = json.loads(capsys.readouterr().out)
    assert exported["max_difference"] <= 1e-5
    assert exported["model_digest"] == load_backbone(run_dir).digest
    sets = [f"train={pictures / 'train'}", f"test={pictures / 'val'}"]
    found = evaluate(capsys, str(tmp_path / "out"), "--suite", str(suite), "--output", str(tmp_path / "results"), *sets)
    assert found["trained"] == expected
    assert sorted(path.name for path in (tmp_path / "results/out").iterdir()) == ["knn.json", "linear.json"]


def test_the_card_of_a_run_says_where_the_weights_come_from(
    run_dir: Path, suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    top1 = evaluate(capsys, str(run_dir), "--suite", str(suite))["trained"]["linear_top1"]
    assert main(["export", str(run_dir), str(tmp_path / "out"), "--to", "timm", "--pool", "avg"]) == 0
    card = (tmp_path / "out/README.md").read_text()
    run = json.loads((run_dir / "run.json").read_text())
    assert f"| run uid | {run['run_uid']} |" in card
    assert "| run | tiny |" in card
    assert "| optimizer step | 3 |" in card
    assert "| samples seen | 24 |" in card
    assert f"| linear | `linear_dinov2_cached` | {top1:.2f} | 31 |" in card
    assert str(run_dir.parent) not in card
    fingerprint = json.loads(newest_complete(open_folder(run_dir)).read("state.json"))["order"]["fingerprint"]  # type: ignore[union-attr]
    assert f"| training data fingerprint | {fingerprint} |" in card


def test_the_moving_average_is_exported_on_request(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run_dir), str(tmp_path / "out"), "--to", "timm", "--ema", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"] == "ema"
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert torch.equal(model.cls_token, load_backbone(run_dir, ema=True).model.cls_token)


def failing(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    return capsys.readouterr().err


def test_a_weights_file_needs_its_architecture(tmp_path: Path, suite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ViT(ViTConfig(image_size=(16, 16), patch_size=(4, 4), width=16, depth=2, heads=2))
    save_file(model.state_dict(), tmp_path / "theirs.safetensors")
    message = failing(capsys, "eval", str(tmp_path / "theirs.safetensors"), "--suite", str(suite))
    assert "does not say its architecture, it holds a ViT encoder of width 16 and depth 2 with 16 patches" in message


def test_an_unknown_setting_names_the_nearest_one(suite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = failing(capsys, "eval", "nowhere", "--suite", str(suite), "tasks.linear.settings.iteration=5")
    assert "unknown key tasks.linear.settings.iteration (did you mean iterations?)" in message
    message = failing(capsys, "eval", "nowhere", "--suite", str(suite), "bach_size=5")
    assert "did you mean batch_size?" in message
    message = failing(capsys, "eval", "nowhere", "--suite", str(suite), "tasks.knn.protocol=knn_dyno")
    assert "'knn_dyno'; known protocols: knn_dino, linear_dinov2_cached, " in message
    assert "(did you mean knn_dino?)" in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tasks.linear.settings.iterations=many", "tasks.linear.settings"),
        ("tasks.linear.settings.iterations=0", "iterations"),
        ("resize_ratio=0.5", "resize_ratio is 0.5; expected at least 1"),
    ],
)
def test_a_wrong_value_is_found_before_anything_runs(
    suite: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert message in failing(capsys, "eval", "nowhere", "--suite", str(suite), override)


def test_more_blocks_than_the_backbone_has_are_refused(
    run_dir: Path, suite: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = failing(capsys, "eval", str(run_dir), "--suite", str(suite), "tasks.linear.settings.blocks=[1,4]")
    assert "joins the last 4 blocks, the backbone has 2" in message


def test_datasets_that_cannot_give_a_figure_are_refused(run_dir: Path, pictures: Path, tmp_path: Path) -> None:
    backbone = load_backbone(run_dir)

    def refusal(**folders: Any) -> str:
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the messages are compared below
            open_evaluation_data(backbone, **{"train": None, "test": None, "resize_ratio": None, **folders})
        return str(caught.value)

    assert "hold the same samples" in refusal(test=str(pictures / "train"))
    assert "no manifest" in refusal(test=str(tmp_path)).lower()
    shutil.rmtree(write_pictures(tmp_path / "c", 2, seed=2) / "class2")
    pack(tmp_path / "c", tmp_path / "two")
    assert "has 3 classes (class0, class1, class2)" in refusal(test=str(tmp_path / "two/train"))
    flat = tmp_path / "flat"
    flat.mkdir()
    shutil.copy(tmp_path / "c/class0/000.png", flat)
    pack(flat, tmp_path / "unlabelled")
    assert "have no labels" in refusal(test=str(tmp_path / "unlabelled/train"))


def test_small_inputs_keep_their_borders() -> None:
    assert (view_ratio((32, 64)), view_ratio((224, 224))) == (1.0, 256 / 224)


def test_both_borders_of_the_usual_view_are_equally_wide() -> None:
    for side in range(65, 1025):
        short_side = view_short_side((side, 48))
        assert (short_side - side) % 2 == 0
        assert abs(short_side - side * 256 / 224) <= 1.0
        assert round(side * view_ratio((48, side))) == short_side  # as callers that take the ratio compute it


def test_what_is_no_model_is_refused(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no model at" in failing(capsys, "export", str(tmp_path / "none"), str(tmp_path / "out"), "--to", "timm")
    message = failing(capsys, "export", str(tmp_path), str(tmp_path / "out"), "--to", "timm")
    assert "is no model: expected a run folder" in message
    torn = tmp_path / "step-00000003"
    shutil.copytree(str(newest_complete(open_folder(run_dir))), torn)
    (torn / "COMPLETE").unlink()
    assert "no COMPLETE" in failing(capsys, "export", str(torn), str(tmp_path / "out"), "--to", "timm")
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    message = failing(capsys, "export", str(tmp_path / "empty"), str(tmp_path / "out"), "--to", "timm")
    assert "has no complete checkpoint yet" in message
    assert not (tmp_path / "out").exists()


def test_a_flipped_bit_in_a_checkpoint_stops_an_export(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "step-00000003"
    shutil.copytree(str(newest_complete(open_folder(run_dir))), damaged)
    shard = next(damaged.glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert "is damaged" in failing(capsys, "export", str(damaged), str(tmp_path / "out"), "--to", "timm")


@pytest.mark.parametrize("name", ["quick", "imagenet"])
def test_the_shipped_suites_are_valid(root: Path, name: str) -> None:
    suite = load_typed(SuiteConfig, root / f"configs/eval/{name}.yaml")
    assert {"knn", "linear"} <= set(suite.tasks)
    assert suite.task_settings("knn").primary_k == 20
    assert len(suite.task_settings("linear").learning_rates) == 13
