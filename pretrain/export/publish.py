"""What every export does around its own files: a folder that appears whole or not at all, tensors, a strict reload.

Enters: where to publish. Leaves: the published folder. It exists so that a half-written export, or one that computes
something else, is never found where a user looks for a good one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from data_pipes.errors import UserError


class ExportError(UserError, RuntimeError):
    """The exported model does not compute what ours does; nothing was published."""


@contextmanager
def publish(folder: Path) -> Iterator[Path]:
    """Publishes what the block has written and compared.

    Args:
        folder: what the block's folder becomes, unless the block raises.

    Yields:
        An empty folder to write into, beside `folder`.

    Raises:
        FileExistsError: something is at `folder` already.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists: exports are never overwritten, choose another folder or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_tensors(path: Path, state: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file, with floats as fp32."""
    from safetensors.torch import save_file

    tensors = {
        name: (tensor.float() if tensor.is_floating_point() else tensor).detach().contiguous().clone()
        for name, tensor in state.items()
    }
    save_file(tensors, path, metadata={"format": "pt"})


def load_completely(
    library: str,
    theirs: Any,
    folder: Path,
    described: Mapping[str, Any],
    read: Callable[[Any, str], Any],
    **arguments: bool,
) -> Any:
    """Loads an export with a library that only warns of what does not fit.

    Args:
        library: its name, for messages.
        theirs: the class, with `from_pretrained` as in transformers and diffusers.
        folder: holds config.json and the weights.
        described: the settings that were written.
        read: (the loaded model's configuration, name) -> that setting.
        arguments: of the class's constructor.

    Returns:
        The model, on the CPU in evaluation mode.

    Raises:
        ExportError: a tensor is missing, left over or of another shape, or a setting differs from `described`.
    """
    model, info = theirs.from_pretrained(str(folder), local_files_only=True, output_loading_info=True, **arguments)
    problems = {kind: found for kind, found in info.items() if found}
    if problems:
        raise ExportError(f"{library} did not load the export completely: {problems}")
    for name, value in described.items():
        loaded = read(model.config, name)
        if json.dumps(loaded, default=str) != json.dumps(value):  # which makes tuples lists
            raise ExportError(f"{library} reads {name} as {loaded!r}; {value!r} was written")
    return model.eval()


def relative_error(what: str, theirs: Tensor, ours: Tensor) -> float:
    """|theirs - ours| / |ours| over all values, Euclidean.

    Args:
        what: what a message calls the values.
        theirs: of the other library.
        ours: of the same shape.

    Returns:
        The error; infinite where a value is not finite.

    Raises:
        ExportError: the shapes differ.
    """
    if theirs.shape != ours.shape:
        raise ExportError(f"the export gives {what} of shape {list(theirs.shape)}, ours are {list(ours.shape)}")
    error = float((theirs.double() - ours.double()).norm() / ours.double().norm())
    return error if error < float("inf") else float("inf")  # NaN too


def check_error(what: str, error: float, tolerance: float) -> None:
    """Refuses an error that is larger than the tolerance.

    Args:
        what: what a message calls the values.
        error: relative to the values' size; may be NaN.
        tolerance: the largest that is published.

    Raises:
        ExportError: the error is larger, or not a number.
    """
    if not error <= tolerance:
        raise ExportError(
            f"the exported model's {what} differ from ours by {error:.3g} of their size, more than {tolerance:.3g}: "
            "nothing was published"
        )
