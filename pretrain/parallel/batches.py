"""The micro-batch of a run that comes back with another number of processes.

Enters: the global batch, the world size, and the micro-batch that the configuration wants. Leaves: the one that fits.
Why it exists: a node that returns with fewer GPUs must go on at the same global batch, by accumulating more.
"""

from __future__ import annotations


def fit_micro_batch(global_batch: int, world_size: int, wanted: int | None) -> int:
    """Samples per rank and forward pass: the largest divisor of global_batch / world_size that is at most `wanted`.

    Args:
        global_batch: samples per optimizer step, over all ranks and micro-batches.
        world_size: number of processes.
        wanted: the configured micro-batch. It is what a device's memory holds, so it is never exceeded; None takes all
            of a rank's share in one pass.

    Raises:
        ValueError: a number is less than 1, or the world size does not divide the global batch; the message names the
            nearest numbers of processes that do.
    """
    if global_batch < 1 or world_size < 1 or (wanted is not None and wanted < 1):
        raise ValueError(
            f"global_batch is {global_batch}, the world size {world_size} and micro_batch {wanted}; expected 1 or more "
            "of each"
        )
    share, rest = divmod(global_batch, world_size)
    if rest:
        fewer = next(size for size in range(world_size - 1, 0, -1) if global_batch % size == 0) if world_size > 1 else 0
        more = next((size for size in range(world_size + 1, global_batch + 1) if global_batch % size == 0), None)
        usable = " or ".join(str(size) for size in (fewer, more) if size)
        raise ValueError(
            f"global_batch {global_batch} cannot be divided over {world_size} processes; the nearest numbers of "
            f"processes that can: {usable}. Start that many, or change train.global_batch"
        )
    most = share if wanted is None else min(wanted, share)
    return next(size for size in range(most, 0, -1) if share % size == 0)
