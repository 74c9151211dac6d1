"""Numbers on their way from the device to the host, without holding up either.

Enters: 0-d tensors of a step. Leaves: the same as floats, later. Why it exists: reading a number of the current step
makes the host wait for the whole step, and the device then waits for the host; read one step later it is free.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Readback:
    """Floats that are copied in the background. On the CPU they are there at once."""

    def __init__(self, values: Sequence[Tensor]) -> None:
        """values: 0-d tensors of one device."""
        stacked = torch.stack([value.detach().float() for value in values])
        self._event: torch.cuda.Event | None = None
        if stacked.device.type == "cuda":
            self._values = torch.empty(len(stacked), pin_memory=True)
            self._values.copy_(stacked, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._values = stacked

    def floats(self) -> list[float]:
        """The numbers; waits only if the device is not yet past them."""
        if self._event is not None:
            self._event.synchronize()
        return [float(value) for value in self._values.tolist()]
