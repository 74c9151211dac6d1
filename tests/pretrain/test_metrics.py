"""What the utilisation of a device is divided by."""

from __future__ import annotations

import pytest
import torch

from pretrain.metrics import peak_flops


@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=pytest.mark.slow)])  # minutes, where bf16 is emulated
def test_a_cpu_is_measured(bf16: bool) -> None:
    found = peak_flops(torch.device("cpu"), bf16=bf16)
    assert 1e8 < found.flops_per_s < 1e14
    assert found.source.startswith("measured, 1024^3 matmul in ")
    assert bf16 or found.source.endswith(" in float32")
