"""Extraction: evaluation mode, the dataset's order, and no sample lost or doubled over several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretrain.evaluation.encoder.features import Features, _FeatureBuffer, extract, make_accelerator
from tests.pretrain.evaluation.encoder.extraction import Pictures, seeded_model, to_float
from tests.process_server import ProcessServer


def run_extract(model: nn.Module, num_samples: int, batch_size: int, **kwargs: Any) -> Features:
    features = extract(
        model,
        Pictures(num_samples),
        make_accelerator(cpu=True),
        normalise=to_float,
        num_blocks=2,
        batch_size=batch_size,
        **kwargs,
    )
    assert features is not None
    return features


def test_features_are_those_of_the_model_in_the_datasets_order() -> None:
    model, data = seeded_model(), Pictures(11)
    features = run_extract(model, 11, 4)
    with torch.no_grad():
        blocks = model.eval().features(to_float(data.images), 2)
    assert features.class_tokens.shape == (11, 2, 16)
    assert torch.allclose(features.class_tokens, torch.stack([cls for cls, _ in blocks], dim=1), atol=1e-6)
    assert torch.allclose(features.average, blocks[-1][1].mean(dim=1), atol=1e-6)
    assert features.labels.tolist() == [index % 5 for index in range(11)]
    assert len(features) == 11
    assert features.class_tokens.dtype == torch.float32
    assert not features.class_tokens.requires_grad


def test_features_can_be_stored_in_half_precision() -> None:
    assert run_extract(seeded_model(), 5, 4, dtype=torch.float16).average.dtype == torch.float16


def test_decoding_workers_change_nothing() -> None:
    plain, worked = run_extract(seeded_model(), 11, 4), run_extract(seeded_model(), 11, 4, workers=1)
    assert torch.equal(plain.class_tokens, worked.class_tokens)


def test_a_model_left_in_train_mode_is_put_in_eval_mode() -> None:
    class WithDropout(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.dropout = seeded_model(), nn.Dropout(0.5)

        def features(self, images: Tensor, num_blocks: int) -> list[tuple[Tensor, Tensor]]:
            return [
                (self.dropout(cls), self.dropout(patches)) for cls, patches in self.inner.features(images, num_blocks)
            ]

    features = run_extract(WithDropout().train(), 6, 4)
    assert torch.allclose(features.class_tokens, run_extract(seeded_model(), 6, 4).class_tokens, atol=1e-6)


def test_progress_reaches_the_number_of_samples() -> None:
    seen: list[tuple[int, int]] = []
    run_extract(seeded_model(), 11, 4, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(4, 11), (8, 11), (11, 11)]


@pytest.mark.distributed
def test_two_processes_give_every_sample_once_and_equal_features(tmp_path: Path, process_server: ProcessServer) -> None:
    """23 is divisible by neither processes nor batch; 3 is less than a batch; 1 leaves a process without a sample."""
    sizes = (23, 8, 3, 1)
    call = "tests.pretrain.evaluation.encoder.extraction:main"
    process_server.run_ranks(2, call, str(tmp_path), 4, sizes, CUDA_VISIBLE_DEVICES="")
    for num_samples in sizes:
        gathered = torch.load(tmp_path / f"{num_samples}.pt", weights_only=True)
        assert int(gathered["processes"]) == 2
        alone = run_extract(seeded_model(), num_samples, 100)
        assert gathered["labels"].tolist() == alone.labels.tolist()
        assert torch.allclose(gathered["class_tokens"], alone.class_tokens, atol=1e-5)
        assert torch.allclose(gathered["average"], alone.average, atol=1e-5)


def filled_buffer(indices: list[int], num_samples: int) -> _FeatureBuffer:
    buffer = _FeatureBuffer(num_samples, torch.float32)
    rows = torch.tensor(indices)
    buffer.put(torch.randn(len(rows), 1, 4), torch.randn(len(rows), 4), torch.zeros(len(rows), dtype=torch.int64), rows)
    return buffer


def test_a_lost_sample_stops_the_evaluation() -> None:
    with pytest.raises(
        RuntimeError, match=r"1 of 4 samples were not gathered exactly once \(sample 2 arrived 0 times\)"
    ):
        filled_buffer([0, 1, 3], 4).finish()


def test_a_doubled_sample_stops_the_evaluation() -> None:
    with pytest.raises(RuntimeError, match=r"sample 1 arrived 2 times"):
        filled_buffer([0, 1, 1, 2], 3).finish()


def test_an_empty_dataset_is_an_error() -> None:
    with pytest.raises(ValueError, match="the evaluation dataset is empty"):
        run_extract(seeded_model(), 0, 4)


def test_an_unlabelled_image_is_an_error() -> None:
    class Unlabelled(Pictures):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return self.images[index], -1

    accelerator = make_accelerator(cpu=True)
    with pytest.raises(ValueError, match=r"3 of 3 evaluation samples have no label"):
        extract(seeded_model(), Unlabelled(3), accelerator, normalise=to_float, num_blocks=1, batch_size=2)
