"""Extracts a frozen backbone's features, over one or several processes, every sample exactly once.

In: an encoder, a map-style dataset of (uint8 image or views of a video, label), an accelerator. Out: `Features` on the
main process, rows in the dataset's order. It exists because distributed samplers pad with duplicates: here the
dataset's indices travel with the features and a run whose indices are not exactly 0..n-1, once each, stops.

Legend: n samples, V views of each (images: 1), B samples per process and batch, C channels, T frames, H/W pixels, N
patch tokens, D width, L number of last blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sized
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from data_pipes.sequential.clips import SequentialClips
from pretrain.parallel.launch import Launch

Precision = Literal["fp32", "bf16"]
"""Of a forward pass."""
Normalise = Callable[[Tensor], Tensor]
"""Integer [B, C, H, W], or [B, V, C, T, H, W], on the device -> the model's float32 input, [B, C, H, W] or
[B * V, C, T, H, W]."""
Progress = Callable[[int, int], None]
"""(samples, or optimizer steps, that are done; how many there are in all)."""


class FeatureModel(Protocol):
    """What extraction needs of a backbone: pretrain.models' ViT and VideoViT have it."""

    def features(self, inputs: Tensor, num_blocks: int, /) -> list[tuple[Tensor, Tensor]]:
        """The tokens of the last blocks, after the final norm.

        Args:
            inputs: normalised images [B, C, H, W] or clips [B, C, T, H, W].
            num_blocks: L.

        Returns:
            (class token [B, D], patch tokens [B, N, D]) of each of these blocks, the last block's at the end. A model
            without a class token gives the mean of its patch tokens there.
        """


@dataclass(frozen=True)
class Features:
    """A dataset seen through a frozen backbone; CPU tensors, samples in the dataset's order, views of one adjacent."""

    class_tokens: Tensor
    """[n * V, L, D] class tokens of the last L blocks after the final norm; index -1 is the last block"""
    average: Tensor
    """[n * V, D] mean of the last block's patch tokens after the final norm"""
    labels: Tensor
    """int64 [n], each >= 0"""
    views: int = 1
    """V"""

    def __len__(self) -> int:
        return len(self.labels)

    def rows_of(self, samples: Tensor) -> Tensor:
        """The rows, int64 [m * V], of samples, int64 [m]."""
        return (samples[:, None] * self.views + torch.arange(self.views)).flatten()

    def subset(self, samples: Tensor) -> Features:
        """A part of the samples.

        Args:
            samples: int64 indices, or a bool mask [n].
        """
        rows = self.rows_of(torch.arange(len(self))[samples])
        return Features(self.class_tokens[rows], self.average[rows], self.labels[samples], self.views)

    def averaged(self) -> Features:
        """One row per sample: the mean over its views."""
        if self.views == 1:
            return self
        class_tokens, average = (
            torch.cat([part.float().mean(dim=1) for part in values.unflatten(0, (-1, self.views)).split(4096)])
            for values in (self.class_tokens, self.average)
        )
        return Features(class_tokens, average, self.labels)


def num_views(dataset: Dataset[tuple[Tensor, int]]) -> int:
    """V, how many views of each sample a data set gives."""
    return math.prod(dataset.views) if isinstance(dataset, SequentialClips) else 1


class Indexed(Dataset[tuple[Tensor, int, int]]):
    """Adds each sample's own index, so that what was gathered can be checked and put in order."""

    def __init__(self, dataset: Dataset[tuple[Tensor, int]]):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        image, label = self.dataset[index]
        return image, int(label), index


def make_accelerator(*, cpu: bool, precision: Precision = "fp32") -> Any:
    """An accelerate.Accelerator for evaluation, alone or under torchrun.

    The main process fits heads while the others already wait in the next model's first gather: the collectives' timeout
    is a day, not the default's ten minutes.

    Args:
        cpu: use no GPU, even where there is one.
        precision: of the forward pass under its autocast.

    Raises:
        RuntimeError: accelerate has not joined the processes that were started.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs

    accelerator = Accelerator(
        cpu=cpu or not torch.cuda.is_available(),  # without it accelerate ignores torchrun on a machine without a GPU
        mixed_precision="no" if precision == "fp32" else "bf16",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))],
    )
    started = Launch.from_environment().size
    if accelerator.num_processes != started:
        raise RuntimeError(f"{started} processes were started and accelerate joined {accelerator.num_processes}")
    return accelerator


def extract(
    model: nn.Module,
    dataset: Dataset[tuple[Tensor, int]],
    accelerator: Any,
    *,
    normalise: Normalise,
    num_blocks: int,
    batch_size: int,
    workers: int = 0,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> Features | None:
    """Features of every sample of `dataset`, in the dataset's order. All processes call this.

    Args:
        model: a `FeatureModel`; put in eval mode here, all tokens are seen (nothing is masked).
        dataset: [i] -> (integer image [C,H,W] or views [V,C,T,H,W], label >= 0), the same on every process.
        accelerator: accelerate.Accelerator; with several processes each one extracts its share.
        normalise: pixels -> the model's input, called on the device.
        num_blocks: L, how many last blocks' class tokens are kept.
        batch_size: images, or views, per process and forward pass. All views of a sample are loaded together.
        workers: decoding processes per process; 0 decodes in this one.
        dtype: storage of the features on the CPU.
        progress: called on the main process after each batch, with samples.

    Returns:
        The features on the main process, None on the others.

    Raises:
        ValueError: empty dataset, or a sample without label.
        RuntimeError: a sample was lost or came twice (a defect of the gathering, never of the user).
    """
    num_samples = len(cast(Sized, dataset))
    if num_samples == 0:
        raise ValueError("the evaluation dataset is empty: pack at least one sample into it")
    # Without even_batches a process may run out of batches before the others and leave them waiting in the gather.
    loader = DataLoader(
        Indexed(dataset), batch_size=max(1, batch_size // num_views(dataset)), num_workers=workers, shuffle=False
    )
    loader = accelerator.prepare_data_loader(loader)
    model = accelerator.prepare_model(model, evaluation_mode=True)
    model.eval()
    buffer = _FeatureBuffer(num_samples, dtype) if accelerator.is_main_process else None
    with torch.no_grad():
        for images, labels, indices in loader:
            parts = []
            for inputs in normalise(images).split(batch_size):
                with accelerator.autocast():
                    blocks = cast(FeatureModel, model).features(inputs, num_blocks)
                if len(blocks) != num_blocks:
                    raise ValueError(f"the encoder gives features of {len(blocks)} blocks; {num_blocks} were asked for")
                class_tokens = torch.stack([class_token for class_token, _ in blocks], dim=1)
                parts.append((class_tokens, blocks[-1][1].mean(dim=1)))
            by_sample = (torch.cat(part).unflatten(0, (len(labels), -1)) for part in zip(*parts, strict=True))
            gathered = accelerator.gather_for_metrics((*by_sample, labels, indices))
            if buffer is not None:
                buffer.put(*gathered)
                if progress is not None:
                    progress(buffer.num_stored, num_samples)
    return None if buffer is None else buffer.finish()


class _FeatureBuffer:
    """Collects samples that arrive in any order; each must arrive once."""

    def __init__(self, num_samples: int, dtype: torch.dtype):
        self.arrivals = torch.zeros(num_samples, dtype=torch.int64)
        self.labels = torch.full((num_samples,), -1, dtype=torch.int64)
        self.dtype = dtype
        self.class_tokens = torch.empty(0)
        self.average = torch.empty(0)

    @property
    def num_stored(self) -> int:
        """How many samples have arrived."""
        return int(self.arrivals.sum())

    def put(self, class_tokens: Tensor, average: Tensor, labels: Tensor, indices: Tensor) -> None:
        """Stores a batch under its samples' indices.

        Args:
            class_tokens: [B, V, L, D].
            average: [B, V, D].
            labels: int64 [B].
            indices: int64 [B].
        """
        if self.class_tokens.numel() == 0:
            self.class_tokens = torch.empty(len(self.labels), *class_tokens.shape[1:], dtype=self.dtype)
            self.average = torch.empty(len(self.labels), *average.shape[1:], dtype=self.dtype)
        rows = indices.cpu()
        self.arrivals += torch.bincount(rows, minlength=len(self.arrivals))
        self.class_tokens[rows] = class_tokens.to("cpu", self.dtype)
        self.average[rows] = average.to("cpu", self.dtype)
        self.labels[rows] = labels.cpu()

    def finish(self) -> Features:
        """All samples.

        Raises:
            ValueError: a sample without label.
            RuntimeError: a sample was lost or came twice.
        """
        wrong = (self.arrivals != 1).nonzero().flatten()
        if len(wrong):
            first = int(wrong[0])
            raise RuntimeError(
                f"{len(wrong)} of {len(self.arrivals)} samples were not gathered exactly once "
                f"(sample {first} arrived {int(self.arrivals[first])} times): no figure is computed from this"
            )
        unlabelled = (self.labels < 0).nonzero().flatten()
        if len(unlabelled):
            raise ValueError(
                f"{len(unlabelled)} of {len(self.labels)} evaluation samples have no label (the first is sample "
                f"{int(unlabelled[0])}): accuracies need a labelled dataset, packed from class folders"
            )
        views = self.average.shape[1]
        return Features(self.class_tokens.flatten(0, 1), self.average.flatten(0, 1), self.labels, views)
