"""Fine-tuning in a suite: it learns, it repeats itself, and it leaves the backbone alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launchers.cli import main
from pretrain.evaluation.encoder.finetune import (
    FinetuneConfig,
    ImageFinetuneConfig,
    _data_config,
    _learning_rate,
    check_finetune,
    evaluate_finetuned,
    fine_tune,
)
from pretrain.evaluation.encoder.multi_view import multi_view_accuracies, rank_of
from pretrain.evaluation.encoder.protocols import PROTOCOLS
from pretrain.evaluation.encoder.subject import Subject
from pretrain.weights.backbone import weights_digest
from tests.pretrain.evaluation.encoder.finetuning import QUICK, make_subject
from tests.process_server import ProcessServer

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


@pytest.fixture
def subject(video_run_dir: Path, videos: Path) -> Subject:
    return make_subject(video_run_dir, videos)


def test_a_suite_fine_tunes_beside_probes(
    video_run_dir: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "suite.yaml").write_text(
        "video: {views: {clips: 2, crops: 3}}\n"
        "tasks:\n"
        "  finetune: {protocol: finetune_videomae, settings: {epochs: 10, warmup_epochs: 1, batch: 8,"
        " learning_rate: 0.3, layer_decay: 0.9, crop_scale: [0.5, 1.0], rand_augment_ops: 0, mixup: 0.0}}\n"
        "  attentive: {protocol: attentive_vjepa2, settings: {learning_rates: [0.01], weight_decays: [0.01],"
        " blocks: 1, heads: 2, epochs: 20, batch: 8, refit: false}}\n"
    )
    arguments = [str(video_run_dir), "--suite", str(tmp_path / "suite.yaml"), f"test={videos / 'val'}"]
    assert main(["eval", *arguments, "--device", "cpu", "--json", "--output", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    result: dict[str, Any] = json.loads(captured.out)
    assert result["trained"]["finetune_top1"] > 90
    assert result["trained"]["attentive_top1"] > 90
    record = json.loads((tmp_path / "step-00000003/finetune.json").read_text())
    assert record["selection"] == {"by": "last step", "steps": 30}
    assert (record["num_train"], record["num_test"], record["protocol"]) == (24, 16, "finetune_videomae")
    assert record["settings"]["repeats"] == 2
    assert "last step" in captured.err


def test_an_image_encoder_is_fine_tuned_too(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "suite.yaml").write_text(
        "tasks: {finetune: {protocol: finetune_mae, settings: {epochs: 12, warmup_epochs: 1, batch: 20,"
        " learning_rate: 0.1, crop_scale: [0.9, 1.0], rand_augment_ops: 1, rand_augment_magnitude: 3}}}\n"
    )
    arguments = [str(run_dir), "--suite", str(tmp_path / "suite.yaml"), "--device", "cpu", "--json"]
    assert main(["eval", *arguments, "--output", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["trained"]["finetune_top1"] > 80


def test_the_same_twice_and_the_backbone_stays(subject: Subject) -> None:
    config = replace(QUICK, epochs=2.0, rand_augment_ops=2, mixup=0.8, cutmix=1.0, drop_path=0.5, repeats=2)
    digest = weights_digest(subject.backbone.model.state_dict())
    first, second = (fine_tune(subject, config).state_dict() for _ in range(2))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert weights_digest(subject.backbone.model.state_dict()) == digest
    other = fine_tune(subject, replace(config, seed=1)).state_dict()
    assert not torch.equal(other["head.weight"], first["head.weight"])


def test_accumulated_passes_are_one_batch(subject: Subject) -> None:
    whole, parts = (fine_tune(subject, replace(QUICK, epochs=2.0, micro_batch=size)).state_dict() for size in (None, 2))
    for name, tensor in whole.items():
        torch.testing.assert_close(tensor, parts[name], atol=1e-5, rtol=1e-4)


def test_test_videos_are_judged_by_the_mean_softmax_of_their_views(subject: Subject) -> None:
    model = fine_tune(subject, replace(QUICK, epochs=10.0, learning_rate=0.3)).eval()
    right = 0
    with torch.no_grad():
        for views, label in subject.data.test:  # type: ignore[attr-defined]
            scores = model((views / 255 - 0.4) / 0.25).softmax(1).mean(0)
            right += int(scores.argmax() == label)
    assert right > 12
    assert multi_view_accuracies(subject, model) == {"top1": 100 * right / 16}


def test_a_rank_counts_the_classes_that_score_as_high() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, 0.0], [float("nan"), 1.0, 0.0]])
    assert rank_of(scores, torch.tensor([2, 0, 1])).tolist() == [1, 1, 3]
    assert rank_of(scores, torch.tensor([0, 2, 1])).tolist() == [0, 2, 3]


def test_the_learning_rate_warms_up_and_falls(subject: Subject) -> None:
    config = replace(QUICK, epochs=10.0, warmup_epochs=5.0, learning_rate=0.64, min_learning_rate=0.004)
    rates = [_learning_rate(subject, config, position) for position in (0, 60, 120, 180, 240)]
    assert rates == pytest.approx([0.0, 0.01, 0.02, 0.012, 0.004])  # the peak: 0.64 * 8 / 256


def test_training_clips_are_those_of_the_recipe(subject: Subject) -> None:
    config = _data_config(subject, FinetuneConfig(flip=0.0, crop_scale=(0.5, 1.0)))
    assert config.video is not None
    assert (config.video.repeats, config.video.num_frames, config.video.stride) == (2, 4, 2)
    assert (config.flip, config.crop_scale, config.train) == (0.0, (0.5, 1.0), subject.data.train_folder)


def test_what_cannot_run_is_said_first(subject: Subject, run_dir: Path, pictures: Path) -> None:
    images = make_subject(run_dir, pictures)

    def refusal(subject: Subject, config: FinetuneConfig) -> str:
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the messages are compared below
            check_finetune(subject, config, "tasks.a.settings")
        return str(caught.value)

    assert "finetune_videomae does not fit a ViT, name the protocol finetune_mae" in refusal(images, FinetuneConfig())
    assert "name the protocol finetune_videomae" in refusal(subject, ImageFinetuneConfig())
    assert "repeats is 2" in refusal(images, ImageFinetuneConfig(repeats=2))
    assert "are an odd number" in refusal(images, ImageFinetuneConfig(batch=9))
    assert "not a multiple of ranks x micro_batch" in refusal(subject, FinetuneConfig(batch=9, micro_batch=2))
    check_finetune(subject, FinetuneConfig(batch=9), "tasks.a.settings")
    with pytest.raises(ValueError, match="leaves nothing"):
        FinetuneConfig(epochs=3.0)
    with pytest.raises(ValueError, match="layer_decay=2"):
        FinetuneConfig(layer_decay=2.0)
    assert {"finetune_mae", "finetune_videomae"} < set(PROTOCOLS)


def test_a_loss_that_is_not_finite_stops(subject: Subject) -> None:
    with pytest.raises(ValueError, match="lower learning_rate"):
        fine_tune(subject, replace(QUICK, learning_rate=1e30, epochs=3.0))


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_do_what_one_does(
    subject: Subject, video_run_dir: Path, videos: Path, tmp_path: Path, process_server: ProcessServer
) -> None:
    arguments = [str(path) for path in (video_run_dir, videos, tmp_path / "out.pt")]
    process_server.run_ranks(2, "tests.pretrain.evaluation.encoder.finetuning:main", *arguments)
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    model = fine_tune(subject, QUICK)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(found["weights"][name], tensor, atol=1e-5, rtol=1e-4)
    outcome = evaluate_finetuned(subject, QUICK)
    assert outcome is not None
    assert (found["metrics"], found["processes"]) == (outcome.metrics, 2)
