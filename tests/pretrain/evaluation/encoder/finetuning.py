"""Run by test_finetune on two ranks: fine-tunes a run's backbone and saves what the main process has."""

from __future__ import annotations

from pathlib import Path

import torch

from pretrain.evaluation.encoder.datasets import open_evaluation_data
from pretrain.evaluation.encoder.features import make_accelerator
from pretrain.evaluation.encoder.finetune import FinetuneConfig, fine_tune
from pretrain.evaluation.encoder.multi_view import multi_view_accuracies
from pretrain.evaluation.encoder.subject import Loading, Subject
from pretrain.evaluation.encoder.views import VideoConfig, Views
from pretrain.weights.backbone import load_backbone

QUICK = FinetuneConfig(
    epochs=4.0,
    warmup_epochs=0.0,
    batch=8,
    learning_rate=0.05,
    layer_decay=0.9,
    drop_path=0.0,
    mixup=0.0,
    cutmix=0.0,
    rand_augment_ops=0,
    repeats=1,
    crop_scale=(0.5, 1.0),
)


def make_subject(run_dir: Path, data: Path) -> Subject:
    """A subject in this process, on the data sets `data`/train and `data`/val."""
    backbone, video = load_backbone(run_dir), VideoConfig(views=Views(1, 2))
    sides = {"train": str(data / "train"), "test": str(data / "val")}
    opened = open_evaluation_data(backbone, **sides, resize_ratio=None, video=video)  # type: ignore[arg-type]
    loading = Loading(batch_size=7, workers=0, feature_dtype=torch.float32, num_blocks=1)
    return Subject(backbone, opened, "all", make_accelerator(cpu=True), loading, lambda what, done, total: None)


def main(run_dir: str, data: str, output: str) -> None:
    torch.set_num_threads(1)
    subject = make_subject(Path(run_dir), Path(data))
    model = fine_tune(subject, QUICK)
    metrics = multi_view_accuracies(subject, model)
    if subject.accelerator.is_main_process:
        weights = subject.accelerator.unwrap_model(model).state_dict()
        processes = subject.accelerator.num_processes
        torch.save({"weights": weights, "metrics": metrics, "processes": processes}, output)
    subject.accelerator.end_training()
