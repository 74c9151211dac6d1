"""References in float64: what two implementations agree on there is the same mathematics, on any processor.

In float32 they differ by rounding, which depends on the kernels that a processor runs; and where a value lies within
rounding of a kink, as ReLU has one, the two take different sides of it and their gradients differ by far more than
that. So mathematics are compared in float64, with a tolerance that only rounding in float64 passes, and float32 is
held to what the other implementation's own rounding is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

EXACT = 1e-10
"""Relative: thousands of times what rounding in float64 leaves, and a thousandth of what float32 leaves."""


class StaysDouble(TorchFunctionMode):
    """A context in which float64 tensors stay float64: other implementations take parts of their work to float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.float, torch.Tensor.to) and args[0].dtype == torch.float64:
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in kwargs.items()}
            func = torch.Tensor.to if func is torch.Tensor.to else torch.Tensor.double
        return func(*args, **kwargs)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected, in float64."""
    assert actual.shape == expected.shape
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


def assert_rounds_like(ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
    """`ours` may be four times as far from `exact` as `theirs` is, which was computed in the same low precision."""
    assert ours.dtype == theirs.dtype != torch.float64
    ours_error, their_error = relative_error(ours, exact), relative_error(theirs, exact)
    assert their_error > 0, "the reference was not computed apart from the other implementation"
    assert ours_error <= 4 * their_error, f"{ours_error:.2g} from the exact values, the other one {their_error:.2g}"
