"""Extracts a frozen backbone's features, over one or several processes, every sample exactly once.

In: a ViT, a map-style dataset of (uint8 image, label), an accelerator. Out: `Features` on the main process, rows in the
dataset's order. It exists because distributed samplers pad with duplicates: here the dataset's indices travel with the
features and a run whose indices are not exactly 0..n-1, once each, stops.

Legend: n samples, B batch per process, C channels, H/W pixels, N patch tokens, D width, L number of last blocks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sized
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

Precision = Literal["fp32", "bf16"]
Normalise = Callable[[Tensor], Tensor]  # [B,C,H,W] integer pixels -> float32, normalised, on the same device
Progress = Callable[[int, int], None]  # (samples done, samples in all)


class FeatureModel(Protocol):
    """What extraction needs of a backbone: pretrain.models.vit.ViT has it."""

    def features(self, images: Tensor, num_blocks: int) -> list[tuple[Tensor, Tensor]]:
        """[B,C,H,W] -> (class token [B,D], patch tokens [B,N,D]) of the last `num_blocks` blocks, the last one last."""


@dataclass(frozen=True)
class Features:
    """A dataset seen through a frozen backbone; CPU tensors, rows in the dataset's order."""

    class_tokens: Tensor
    """[n, L, D] class tokens of the last L blocks after the final norm; index -1 is the last block"""
    average: Tensor
    """[n, D] mean of the last block's patch tokens after the final norm"""
    labels: Tensor
    """int64 [n], each >= 0"""

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, rows: Tensor) -> Features:
        """The rows selected by an int64 index or a bool mask [n]."""
        return Features(self.class_tokens[rows], self.average[rows], self.labels[rows])


class _Indexed(Dataset[tuple[Tensor, int, int]]):
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
    """
    from accelerate import Accelerator, InitProcessGroupKwargs

    accelerator = Accelerator(
        cpu=cpu or not torch.cuda.is_available(),  # without it accelerate ignores torchrun on a machine without a GPU
        mixed_precision="no" if precision == "fp32" else "bf16",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))],
    )
    started = int(os.environ.get("WORLD_SIZE", "1"))
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
    """Features of every sample of `dataset`, in the dataset's order; None off the main process.

    Args:
        model: a `FeatureModel`; put in eval mode here, all tokens are seen (nothing is masked).
        dataset: [i] -> (integer image [C,H,W], label >= 0), the same on every process.
        accelerator: accelerate.Accelerator; with several processes each one extracts its share.
        normalise: pixels -> the model's input, called on the device.
        num_blocks: L, how many last blocks' class tokens are kept.
        batch_size: images per process and forward pass.
        workers: decoding processes per process; 0 decodes in this one.
        dtype: storage of the features on the CPU.

    Raises:
        ValueError: empty dataset, or an image without label.
        RuntimeError: a sample was lost or came twice (a defect of the gathering, never of the user).
    """
    num_samples = len(cast(Sized, dataset))
    if num_samples == 0:
        raise ValueError("the evaluation dataset is empty: pack at least one image into it")
    # Without even_batches a process may run out of batches before the others and leave them waiting in the gather.
    loader = DataLoader(_Indexed(dataset), batch_size=batch_size, num_workers=workers, shuffle=False)
    loader = accelerator.prepare_data_loader(loader)
    model = accelerator.prepare_model(model, evaluation_mode=True)
    model.eval()
    store = _Store(num_samples, dtype) if accelerator.is_main_process else None
    with torch.no_grad():
        for images, labels, indices in loader:
            with accelerator.autocast():
                blocks = cast(FeatureModel, model).features(normalise(images), num_blocks)
            class_tokens = torch.stack([class_token for class_token, _ in blocks], dim=1)
            average = blocks[-1][1].mean(dim=1)
            gathered = accelerator.gather_for_metrics((class_tokens, average, labels, indices))
            if store is not None:
                store.put(*gathered)
                if progress is not None:
                    progress(store.num_stored, num_samples)
    return None if store is None else store.finish()


class _Store:
    """Rows arrive in any order; every row must arrive once."""

    def __init__(self, num_samples: int, dtype: torch.dtype):
        self.arrivals = torch.zeros(num_samples, dtype=torch.int64)
        self.labels = torch.full((num_samples,), -1, dtype=torch.int64)
        self.dtype = dtype
        self.class_tokens = torch.empty(0)
        self.average = torch.empty(0)

    @property
    def num_stored(self) -> int:
        return int(self.arrivals.sum())

    def put(self, class_tokens: Tensor, average: Tensor, labels: Tensor, indices: Tensor) -> None:
        """Store [B,L,D] class tokens and [B,D] averages under their samples' indices int64 [B]."""
        if self.class_tokens.numel() == 0:
            self.class_tokens = torch.empty(len(self.labels), *class_tokens.shape[1:], dtype=self.dtype)
            self.average = torch.empty(len(self.labels), average.shape[1], dtype=self.dtype)
        rows = indices.cpu()
        self.arrivals += torch.bincount(rows, minlength=len(self.arrivals))
        self.class_tokens[rows] = class_tokens.to("cpu", self.dtype)
        self.average[rows] = average.to("cpu", self.dtype)
        self.labels[rows] = labels.cpu()

    def finish(self) -> Features:
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
                f"{len(unlabelled)} of {len(self.labels)} evaluation images have no label (the first is sample "
                f"{int(unlabelled[0])}): accuracies need a labelled dataset, packed from class folders"
            )
        return Features(self.class_tokens, self.average, self.labels)
