"""Accuracies of a classifier on the test set, on several views of each sample.

In: a subject and a model that gives class scores. Out: percentages over all processes, every sample exactly once.

Legend: B samples, V views of each, K classes.
"""

from __future__ import annotations

from collections.abc import Sized
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pretrain.evaluation.encoder.features import Indexed, num_views
from pretrain.evaluation.encoder.subject import Subject
from pretrain.evaluation.encoder.views import vote
from pretrain.evaluation.outcome import percentage_correct


@torch.no_grad()
def multi_view_accuracies(subject: Subject, model: nn.Module) -> dict[str, float]:
    """Accuracies on the test set by the mean softmax of each sample's views. All processes call this.

    Returns:
        `top1`, and `top5` where there are more than five classes, in percent.

    Raises:
        ValueError: a sample has no label.
        RuntimeError: a sample was lost or came twice (a defect of the gathering, never of the user).
    """
    dataset, accelerator, batch_size = subject.data.test, subject.accelerator, subject.loading.batch_size
    views, model = num_views(dataset), model.eval()
    samples_per_batch = max(1, batch_size // views)
    loader = DataLoader(Indexed(dataset), batch_size=samples_per_batch, num_workers=subject.loading.workers)
    ranks = []
    for stored, labels, _ in accelerator.prepare_data_loader(loader):
        if int(labels.min()) < 0:
            raise ValueError("a test sample has no label: accuracies need a dataset packed from class folders")
        with accelerator.autocast():
            logits = torch.cat([model(inputs) for inputs in subject.prepare(stored).split(batch_size)])
        ranks.append(accelerator.gather_for_metrics(rank_of(vote(logits.float(), views), labels)).cpu())
    found = torch.cat(ranks)
    if len(found) != len(cast(Sized, dataset)):
        raise RuntimeError(f"{len(found)} results for {len(cast(Sized, dataset))} samples: no figure is computed")
    highest = {"top1": 1} if subject.data.num_classes <= 5 else {"top1": 1, "top5": 5}
    return {name: percentage_correct(int((found < count).sum()), len(found)) for name, count in highest.items()}


def rank_of(scores: Tensor, labels: Tensor) -> Tensor:
    """How many other classes score at least as high as the label's.

    Args:
        scores: [B, K].
        labels: int64 [B].

    Returns:
        int64 [B]: 0 = right; K where a sample's scores are not finite.
    """
    own = scores.gather(1, labels[:, None])
    ranks = (scores >= own).sum(dim=1) - 1
    return torch.where(scores.isfinite().all(dim=1), ranks, scores.shape[1])
