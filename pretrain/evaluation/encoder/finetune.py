"""Fine-tuning of the whole encoder with MAE's and VideoMAE's recipes.

In: a subject; its backbone is copied and stays as it is. Out: an `Outcome`. It exists because masked autoencoders are
made for it: their features are less linear than those of contrastive methods, and their papers report this figure.
Nothing is chosen on the test set: the figure is that of the weights after the last step.

Differs from the originals: warm-up begins at 0, and nothing is erased at random.
Runs alone or under torchrun; the same samples and learning rates whatever the number of processes.

Legend: B samples, R repeats of each, C channels, T frames, H/W pixels, K classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sized
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from data_pipes.batch import Batch, BatchPlan
from data_pipes.bounds import bounded
from data_pipes.config import DataConfig
from data_pipes.loader import open_loader
from data_pipes.order.order import OrderConfig
from data_pipes.sequential.clips import SequentialClips
from pretrain.evaluation.encoder.augment import Mix, RandAugment, seed_of
from pretrain.evaluation.encoder.classifier import Classifier, layer_decay_groups
from pretrain.evaluation.encoder.datasets import loading_config
from pretrain.evaluation.encoder.multi_view import multi_view_accuracies
from pretrain.evaluation.encoder.subject import Subject
from pretrain.evaluation.outcome import Outcome
from pretrain.models.video_vit import VideoViT
from pretrain.models.vit import ViT
from pretrain.optim import scheduled_lr


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of the protocol `finetune_videomae`; the defaults are those of ViT-B on Kinetics-400."""

    epochs: float = bounded(75.0, above=0)
    """passes over the training samples; repeats of a sample count once"""
    warmup_epochs: float = bounded(5.0, least=0)
    """linear warm-up from 0"""
    batch: int = bounded(384, least=1)
    """training samples per step, over all processes; repeats come on top"""
    micro_batch: int | None = bounded(None, least=1)
    """training samples per process and pass; null = batch / processes, the rest is gradient accumulation"""
    learning_rate: float = bounded(5e-4, above=0)
    """of the head, per 256 samples: the peak is learning_rate * batch / 256"""
    min_learning_rate: float = bounded(1e-6, least=0)
    """of the head at the end of the half cosine"""
    layer_decay: float = bounded(0.75, above=0, most=1)
    """learning rate of a layer / that of the next one"""
    weight_decay: float = bounded(0.05, least=0)
    """of AdamW with betas 0.9 and 0.999; not on biases, norms, positions and class tokens"""
    drop_path: float = bounded(0.1, least=0, below=1)
    """probability that the last block is left out; it grows linearly from 0 at the first"""
    clip_norm: float | None = bounded(None, above=0)
    """largest global gradient norm; null = no clipping"""
    label_smoothing: float = bounded(0.1, least=0, below=1)
    """share of a label that goes to all classes"""
    mixup: float = bounded(0.8, least=0)
    """alpha of mixup; 0 = never"""
    cutmix: float = bounded(1.0, least=0)
    """alpha of cutmix; 0 = never. With both, each batch gets one of them"""
    rand_augment_ops: int = bounded(4, least=0)
    """operations of RandAugment per sample; 0 = none"""
    rand_augment_magnitude: int = bounded(21, least=0, most=30)
    """from 0 to 30; 21 is the m7 of timm's names"""
    repeats: int = bounded(2, least=1)
    """repeated augmentation (arXiv 1901.09335): clips of each decoded video; 1 for images"""
    crop_scale: tuple[float, float] = bounded((0.08, 1.0), above=0, most=1)
    """area of the random crop, as a fraction of the frame"""
    crop_ratio: tuple[float, float] = bounded((3 / 4, 4 / 3), above=0)
    """width / height of the random crop"""
    flip: float = bounded(0.5, least=0, most=1)
    """probability of a left-right flip; 0 where left and right are classes (Something-Something, motion)"""
    seed: int = bounded(0, least=0, most=2**53)
    """of the head, the order of the samples and all augmentation"""

    def __post_init__(self) -> None:
        if self.epochs <= 0 or self.warmup_epochs < 0 or self.batch < 1 or self.repeats < 1:
            raise ValueError(
                f"epochs={self.epochs}, warmup_epochs={self.warmup_epochs}, batch={self.batch}, repeats={self.repeats}:"
                " expected more than 0, at least 0, 1 and 1"
            )
        if self.epochs <= self.warmup_epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs} leaves nothing of epochs={self.epochs}")
        for name, highest in (("layer_decay", 1.0), ("drop_path", 1.0), ("label_smoothing", 1.0)):
            if not 0.0 <= getattr(self, name) <= highest:
                raise ValueError(f"{name}={getattr(self, name)}: expected a share from 0 to {highest:g}")


@dataclass(frozen=True)
class ImageFinetuneConfig(FinetuneConfig):
    """Settings of the protocol `finetune_mae`; the defaults are those of ViT-B on ImageNet-1k."""

    epochs: float = bounded(100.0, above=0)
    """passes over the training samples"""
    batch: int = bounded(1024, least=1)
    """training samples per step, over all processes"""
    layer_decay: float = bounded(0.65, above=0, most=1)
    """learning rate of a layer / that of the next one"""
    rand_augment_ops: int = bounded(2, least=0)
    """operations of RandAugment per sample; 0 = none"""
    rand_augment_magnitude: int = bounded(27, least=0, most=30)
    """from 0 to 30; 27 is the m9 of timm's names"""
    repeats: int = bounded(1, least=1)
    """1: images come once"""


def check_finetune(subject: Subject, config: FinetuneConfig, where: str) -> None:
    """Refuses what cannot run.

    Args:
        subject: what is evaluated.
        config: of the task.
        where: its place in the suite, for messages.

    Raises:
        ValueError: the protocol, or one of its settings, is not for this backbone or this number of processes.
    """
    model, processes = subject.backbone.model, subject.accelerator.num_processes
    if not isinstance(model, ViT | VideoViT):
        raise ValueError(
            f"{where}: fine-tuning knows the layers of this package's encoders, and this is a {type(model).__name__}; "
            "probe it with knn_dino, linear_dinov2_cached or attentive_vjepa2, or name a protocol of your own"
        )
    wanted = "finetune_mae" if isinstance(config, ImageFinetuneConfig) else "finetune_videomae"
    fitting = "finetune_videomae" if isinstance(model, VideoViT) else "finetune_mae"
    if wanted != fitting:
        raise ValueError(f"{where}: {wanted} does not fit a {type(model).__name__}, name the protocol {fitting}")
    if config.repeats > 1 and not isinstance(model, VideoViT):
        raise ValueError(f"{where}.repeats is {config.repeats}: images come once, set it to 1")
    plan = _plan(subject, config)
    if (config.mixup > 0 or config.cutmix > 0) and plan.micro_batch * config.repeats % 2:
        raise ValueError(
            f"{where}: mixup and cutmix pair the samples of a pass, and {plan.micro_batch} samples (per process, with "
            f"{processes} of them) x {config.repeats} repeats are an odd number: change batch or micro_batch"
        )
    if config.rand_augment_ops and model.config.in_channels not in (1, 3):
        raise ValueError(f"{where}.rand_augment_ops: RandAugment is for 1 or 3 channels, set it to 0")


def evaluate_finetuned(subject: Subject, config: FinetuneConfig) -> Outcome | None:
    """Fine-tunes a copy of the backbone and measures its accuracy on the test set. All processes call this.

    Returns:
        The metric `top1`, and `top5` where there are more than five classes; None off the main process.

    Raises:
        ValueError: a sample has no label, or the loss is not finite.
    """
    model = fine_tune(subject, config)
    metrics = multi_view_accuracies(subject, model)
    if not subject.accelerator.is_main_process:
        return None
    selection: dict[str, object] = {"by": "last step", "steps": _num_steps(subject, config)}
    sizes = (len(cast(Sized, dataset)) for dataset in (subject.data.train, subject.data.test))
    num_train, num_test = sizes
    return Outcome(metrics, selection, num_train=num_train, num_test=num_test)


def fine_tune(subject: Subject, config: FinetuneConfig) -> nn.Module:
    """Trains a classifier on the training set. All processes call this.

    Returns:
        The classifier as the accelerator has prepared it, with the weights after the last step.

    Raises:
        ValueError: a sample has no label, or the loss is not finite.
    """
    accelerator, device, plan = subject.accelerator, subject.device, _plan(subject, config)
    encoder = subject.backbone.model
    assert isinstance(encoder, ViT | VideoViT)
    loader = open_loader(
        _data_config(subject, config),
        plan,
        image_size=subject.backbone.interface.image_size,
        channels=subject.backbone.interface.in_channels,
        state=None,
    )
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        classifier = Classifier(encoder, subject.data.num_classes, config.drop_path).to(device)
        groups = layer_decay_groups(classifier, weight_decay=config.weight_decay, layer_decay=config.layer_decay)
        optimizer = torch.optim.AdamW(cast(list[dict[str, Any]], groups), lr=0.0, betas=(0.9, 0.999), fused=True)
        model: nn.Module = accelerator.prepare_model(classifier).train()
        torch.manual_seed(seed_of(config.seed, plan.rank))  # of drop path
        batches, num_steps = loader.batches(0), _num_steps(subject, config)
        try:
            for step in range(num_steps):
                rate = _learning_rate(subject, config, step * config.batch)
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["lr_scale"]
                _accumulate(subject, config, model, batches, plan.accumulate)
                if config.clip_norm is not None:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
                optimizer.step()
                optimizer.zero_grad()
                subject.say("fine-tuning, steps", step + 1, num_steps)
        finally:
            loader.close()
    return model


def _accumulate(
    subject: Subject, config: FinetuneConfig, model: nn.Module, batches: Iterator[Batch], passes: int
) -> None:
    """Adds up the gradients of one step.

    Args:
        subject: what is evaluated.
        config: of the task.
        model: is trained.
        batches: gives one batch per pass.
        passes: forward and backward passes of this process in one step.

    Raises:
        ValueError: a sample has no label, or the loss is not finite.
    """
    augment = RandAugment(config.rand_augment_ops, config.rand_augment_magnitude) if config.rand_augment_ops else None
    mix = Mix(config.mixup, config.cutmix, config.label_smoothing, subject.data.num_classes)
    for number in range(passes):
        batch = next(batches)
        if int(batch.labels.min()) < 0:
            raise ValueError("a training sample has no label: fine-tuning needs a dataset packed from class folders")
        seed = seed_of(config.seed, int(batch.positions[0]))
        stored = batch.images if augment is None else augment(batch.images, seed)
        inputs = subject.prepare(stored.to(subject.device))
        labels = batch.labels.to(subject.device).repeat_interleave(len(inputs) // len(batch.labels))
        inputs, targets = mix(inputs, labels, seed)
        is_last = number == passes - 1
        with contextlib.nullcontext() if is_last else subject.accelerator.no_sync(model):
            with subject.accelerator.autocast():
                logits = model(inputs)
            loss = F.cross_entropy(logits.float(), targets)
            if not bool(loss.isfinite()):
                raise ValueError(
                    f"the loss of fine-tuning is {float(loss.detach())}: lower learning_rate or set clip_norm"
                )
            (loss / passes).backward()


def _plan(subject: Subject, config: FinetuneConfig) -> BatchPlan:
    """How the batch is divided over processes and passes.

    Raises:
        ValueError: the processes cannot share the batch.
    """
    world, rank = subject.accelerator.num_processes, subject.accelerator.process_index
    return BatchPlan(config.batch, config.micro_batch or max(1, config.batch // world), rank, world)


def _num_steps(subject: Subject, config: FinetuneConfig) -> int:
    """Optimizer steps in all; at least 1."""
    return max(1, round(config.epochs * len(cast(Sized, subject.data.train)) / config.batch))


def _learning_rate(subject: Subject, config: FinetuneConfig, position: int) -> float:
    """The head's learning rate in the step that begins at sample `position`."""
    return scheduled_lr(
        position,
        peak=config.learning_rate * config.batch / 256,
        total=_num_steps(subject, config) * config.batch,
        warmup=config.warmup_epochs * len(cast(Sized, subject.data.train)),
        minimum=config.min_learning_rate,
        schedule="cosine",
    )


def _data_config(subject: Subject, config: FinetuneConfig) -> DataConfig:
    """The training set with random crops, read as the backbone's run reads its own."""
    dataset, video = subject.data.train, None
    if isinstance(dataset, SequentialClips):
        video = replace(dataset.sampling, repeats=config.repeats, shared_window=False)
    return replace(
        loading_config(subject.backbone),
        train=subject.data.train_folder,
        mixture=None,
        unindexed=None,
        val=None,
        workers=subject.loading.workers,
        order=OrderConfig(seed=config.seed),
        crop_scale=config.crop_scale,
        crop_ratio=config.crop_ratio,
        flip=config.flip,
        video=video,
        captions=False,
        metadata=False,
    )
