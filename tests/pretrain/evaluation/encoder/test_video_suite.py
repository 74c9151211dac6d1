"""Runs on clips through the suite: backbones, views, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from data_pipes.sequential.clips import SequentialClips
from data_pipes.transforms.clip_sampling import ClipSampling
from launchers.cli import main
from pretrain.checkpoint.open_folder import open_folder
from pretrain.checkpoint.read import load_weights, newest_complete
from pretrain.config import load_typed
from pretrain.evaluation.encoder.datasets import open_evaluation_data, read_labels
from pretrain.evaluation.encoder.features import Features, extract, make_accelerator
from pretrain.evaluation.encoder.knn import KNNConfig, evaluate_knn
from pretrain.evaluation.encoder.linear import LinearConfig, evaluate_linear, fit_heads
from pretrain.evaluation.encoder.suite import SuiteConfig
from pretrain.evaluation.encoder.views import VideoConfig, Views, freeze, make_prepare, vote
from pretrain.models.normalise import Normalise
from pretrain.models.video_vit import VideoViT
from pretrain.objectives.clip_target import normalise_clips
from pretrain.tracking.journal import read_metrics
from pretrain.weights.backbone import Backbone, load_backbone, weights_digest

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled:UserWarning"  # DCP says so whenever one process reads a checkpoint
)

SUITE = """\
batch_size: 16
video: {views: {clips: 2, crops: 3}, train_views: {clips: 2, crops: 1}}
tasks:
  knn:
    protocol: knn_dino
    settings: {k: [3], primary_k: 3}
  linear:
    protocol: linear_dinov2_cached
    settings: {iterations: 200, batch: 32, blocks: [1, 2], standardize: true, learning_rates: [0.1], refit: false}
  linear_single_frame:
    protocol: linear_dinov2_cached
    frames: single
    views: {clips: 1, crops: 3}
    settings: {iterations: 200, batch: 32, blocks: [1, 2], standardize: true, learning_rates: [0.1], refit: false}
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    (tmp_path / "suite.yaml").write_text(SUITE)
    return tmp_path / "suite.yaml"


def test_a_run_on_clips_gives_its_encoder_and_its_sampling(video_run_dir: Path, videos: Path) -> None:
    checkpoint = newest_complete(open_folder(video_run_dir))
    assert checkpoint is not None
    encoders = {}
    for ema in (False, True):
        weights = load_weights(checkpoint, "model", ema=ema)
        encoders[ema] = {name.removeprefix("encoder."): t for name, t in weights.items() if name.startswith("encoder.")}
    backbone, average = load_backbone(video_run_dir), load_backbone(video_run_dir, ema=True)
    assert isinstance(backbone.model, VideoViT)
    for found, encoder in ((backbone, encoders[False]), (average, encoders[True])):
        assert all(torch.equal(tensor, encoder[name]) for name, tensor in found.model.state_dict().items())
        assert found.digest == weights_digest(encoder)
    assert (backbone.label, average.label) == ("step-00000003", "step-00000003-ema")
    assert (backbone.mean, backbone.std) == ((0.4, 0.4, 0.4), (0.25, 0.25, 0.25))
    assert backbone.sampling == ClipSampling(4, 2)
    assert not backbone.model.training
    assert len({backbone.digest, average.digest, load_backbone(video_run_dir, untrained=True).digest}) == 3


def test_the_command_evaluates_views_of_videos_and_a_single_frame(
    video_run_dir: Path, suite: Path, capsys: pytest.CaptureFixture[str], videos: Path
) -> None:
    arguments = ["eval", str(video_run_dir), "--suite", str(suite), f"test={videos / 'val'}", "--untrained"]
    assert main([*arguments, "--device", "cpu", "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    for side in ("trained", "untrained"):
        assert set(result[side]) == {"knn_top1", "linear_top1", "linear_single_frame_top1"}
    assert result["trained"]["linear_top1"] > 90
    assert result["trained"]["linear_top1"] > result["trained"]["linear_single_frame_top1"] + 20
    records = {record["task"]: record for record in result["results"] if record["weights"] == "trained"}
    view = records["linear_single_frame"]["view"]
    assert (view["frames"], records["linear"]["view"]["frames"]) == ("single", "all")
    assert (view["num_frames"], view["stride"], view["image_size"]) == (4, 2, [16, 16])
    assert (view["test_views"], view["train_views"]) == ({"clips": 1, "crops": 3}, {"clips": 2, "crops": 1})
    assert records["linear"]["view"]["test_views"] == {"clips": 2, "crops": 3}
    assert (records["linear"]["num_test"], records["linear"]["num_train"]) == (16, 22)
    assert read_metrics(video_run_dir)["eval/linear_single_frame/top1"][0].step == 3


def test_features_of_views_are_those_of_the_model_view_by_view(video_run_dir: Path, videos: Path) -> None:
    backbone = load_backbone(video_run_dir)
    assert isinstance(backbone.model, VideoViT)
    clips = SequentialClips(videos / "val", ClipSampling(4, 2), (16, 16), views=(2, 3))
    features = extract(
        backbone.model,
        clips,
        make_accelerator(cpu=True),
        normalise=make_prepare(backbone, "all"),
        num_blocks=2,
        batch_size=4,  # fewer than the views of a video
    )
    assert features is not None
    assert (len(features), features.views, len(features.average)) == (16, 6, 96)
    for video in (0, 15):
        views = (clips[video][0] / 255 - 0.4) / 0.25
        with torch.no_grad():
            (first, _), (last, tokens) = backbone.model.features(views, 2)
        rows = features.rows_of(torch.tensor([video]))
        torch.testing.assert_close(features.class_tokens[rows], torch.stack((first, last), 1), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(features.average[rows], tokens.mean(1), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(features.averaged().average[video], tokens.mean((0, 1)), atol=1e-5, rtol=1e-5)


def test_a_single_frame_shows_the_middle_one_everywhere(video_run_dir: Path) -> None:
    stored = torch.randint(0, 256, (2, 3, 3, 4, 16, 16), dtype=torch.uint8)
    backbone = load_backbone(video_run_dir)
    shown = make_prepare(backbone, "single")(stored)
    expected = normalise_clips(Normalise(backbone.mean, backbone.std), stored.flatten(0, 1))
    assert shown.shape == expected.shape == (6, 3, 4, 16, 16)
    for frame in range(4):
        assert torch.equal(shown[:, :, frame], expected[:, :, 2])
    assert torch.equal(make_prepare(backbone, "all")(stored), expected)
    assert torch.equal(freeze(stored[0]), stored[0][:, :, 2:3].repeat(1, 1, 4, 1, 1))


def test_views_vote_by_their_mean_softmax_and_not_by_their_mean_logits() -> None:
    logits = torch.tensor([[9.0, 0.0, 0.0], [0.0, 1.5, 0.0], [0.0, 1.5, 0.0], [0.0, 0.0, 2.0]])
    by_hand = torch.stack([functional.softmax(logits[:3], 1).sum(0) / 3])
    torch.testing.assert_close(vote(logits[:3], 3), by_hand)
    assert (logits[:3].mean(0).argmax(), vote(logits[:3], 3).argmax()) == (0, 1)
    assert torch.equal(vote(logits, 1), logits)
    heads = torch.randn(6, 4, 5)  # [B * V, heads, classes]
    torch.testing.assert_close(vote(heads, 2)[1], (heads[2].softmax(1) + heads[3].softmax(1)) / 2)


def views_of(labels: torch.Tensor, views: int, seed: int) -> Features:
    generator = torch.Generator().manual_seed(seed)
    rows = functional.one_hot(labels, 4).float().repeat_interleave(views, 0)
    rows = rows + torch.randn(rows.shape, generator=generator)
    return Features(rows[:, None], rows, labels, views)


def test_linear_heads_see_every_view_and_average_their_softmax() -> None:
    labels = torch.arange(4).repeat(30)
    train, test = views_of(labels, 2, 0), views_of(labels, 3, 1)
    config = LinearConfig(learning_rates=(0.1,), blocks=(1,), average_pool=(False,), iterations=20, batch=32)
    fitted = fit_heads(train, config, 4, torch.device("cpu"), lambda done, total: None)
    flat = Features(train.class_tokens, train.average, labels.repeat_interleave(2))
    same = fit_heads(flat, config, 4, torch.device("cpu"), lambda done, total: None)
    assert torch.equal(fitted.banks[0].weight, same.banks[0].weight)
    bank = fitted.banks[0]
    right = 0
    for sample in range(len(labels)):
        scores = [functional.softmax(bank.logits(test.average[3 * sample + view][None])[0, 0], 0) for view in range(3)]
        right += int(torch.stack(scores).sum(0).argmax() == labels[sample])
    assert fitted.accuracies(test, chunk=7) == [pytest.approx(100 * right / len(labels))]
    outcome = evaluate_linear(train, test, config, num_classes=4, device=torch.device("cpu"))
    assert (outcome.num_train, outcome.num_test) == (120, 120)


def test_nearest_neighbours_are_sought_with_the_mean_of_the_views() -> None:
    labels = torch.arange(4).repeat(10)
    train, test = views_of(labels, 2, 0), views_of(labels, 3, 1)
    config = KNNConfig(k=(5,), primary_k=5, feature="average")
    found = evaluate_knn(train, test, config, num_classes=4, device=torch.device("cpu"))
    by_hand = [features.average.unflatten(0, (-1, features.views)).mean(1) for features in (train, test)]
    memory, queries = (Features(mean[:, None], mean, labels) for mean in by_hand)
    expected = evaluate_knn(memory, queries, config, num_classes=4, device=torch.device("cpu"))
    assert found == expected
    assert found.metrics["top1"] > 60


def test_part_of_the_videos_keeps_their_views() -> None:
    features = views_of(torch.arange(4), 3, 0)
    chosen = features.subset(torch.tensor([False, True, False, True]))
    assert torch.equal(chosen.average, features.average[[3, 4, 5, 9, 10, 11]])
    assert torch.equal(chosen.labels, torch.tensor([1, 3]))
    assert torch.equal(features.subset(torch.tensor([3, 1])).average[:3], features.average[9:])


def open_data(backbone: Backbone, videos: Path, video: VideoConfig) -> Any:
    return open_evaluation_data(backbone, train=None, test=str(videos / "val"), resize_ratio=None, video=video)


def test_data_are_opened_as_the_run_had_them(video_run_dir: Path, videos: Path) -> None:
    backbone = load_backbone(video_run_dir)
    data = open_data(backbone, videos, VideoConfig(views=Views(5, 3), short_side=20))
    assert (data.train.views, data.test.views, data.test.short_side) == ((1, 1), (5, 3), 20)
    assert data.test.sampling == ClipSampling(4, 2, repeats=5)
    assert backbone.config is not None
    assert read_labels(data.test, backbone.config.data.storage).tolist() == [0, 1] * 8
    sampled = open_data(backbone, videos, VideoConfig(sampling=ClipSampling(4, mode="segments")))
    assert sampled.test.sampling.mode == "segments"
    with pytest.raises(ValueError, match=r"num_frames is 8, the encoder takes clips of 4 frames"):
        open_data(backbone, videos, VideoConfig(sampling=ClipSampling(8)))


def test_a_single_frame_of_a_picture_is_refused(run_dir: Path, suite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = "tasks.linear_single_frame.views=null"
    assert main(["eval", str(run_dir), "--suite", str(suite), "--device", "cpu", whole]) == 2
    assert "frames=single is for encoders of clips" in capsys.readouterr().err
    changed = ["tasks.linear_single_frame.frames=all", "tasks.linear_single_frame.settings.iterations=1"]
    assert main(["eval", str(run_dir), "--suite", str(suite), "--device", "cpu", *changed]) == 2
    assert "tasks.linear_single_frame.views is for encoders of clips" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["kinetics", "motion", "something", "video_finetune"])
def test_the_shipped_video_suites_are_valid(root: Path, name: str) -> None:
    suite = load_typed(SuiteConfig, root / f"configs/eval/{name}.yaml")
    assert suite.tasks
    for task in suite.tasks:
        suite.task_settings(task)
