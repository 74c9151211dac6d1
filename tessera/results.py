"""What is done with a trained model: evaluations, and exports to other libraries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal


def evaluate(
    where: str | Path,
    suite: str | Path | Mapping[str, Any],
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    ema: bool = False,
    untrained: bool = False,
    architecture: str | None = None,
    output: str | Path | None = None,
    device: Literal["auto", "cpu"] = "auto",
) -> list[dict[str, Any]]:
    """Evaluates an encoder or a tokenizer, as `tessera eval` does.

    Args:
        where: a run (its newest complete checkpoint), a checkpoint, an exported folder, or a weights file.
        suite: a YAML file, or its content as a dictionary, such as `{"tasks": {"knn": {"protocol": "knn_dino"}}}`.
        overrides: changes to the suite, as `["batch_size=64"]` or `{"batch_size": 64}`.
        ema: the moving average of the weights.
        untrained: the freshly initialised model as well; not for tokenizers.
        architecture: timm name or size; required for a weights file, refused otherwise.
        output: folder of the result files; None: `eval` in the run's folder.
        device: auto takes the GPU where there is one.

    Returns:
        One record per model and task: protocol, settings, `metrics`, how they were chosen, and the weights' digest.

    Raises:
        FileNotFoundError: nothing at `where`.
        ValueError: a mistake in the suite, the model or its data.
    """
    from pretrain.evaluate import evaluate as run

    return run(
        where,
        suite,
        [overrides] if isinstance(overrides, str) else overrides,
        ema=ema,
        untrained=untrained,
        architecture=architecture,
        output=None if output is None else Path(output),
        cpu=device == "cpu",
    ).records


def export(
    where: str | Path,
    to: str,
    out: str | Path,
    *,
    ema: bool = False,
    architecture: str | None = None,
    **options: Any,
) -> Path:
    """Exports a model, as `tessera export` does: written, reloaded and compared before it appears.

    Args:
        where: a run (its newest complete checkpoint), a checkpoint, or a weights file.
        to: "timm", "transformers", "diffusers", "onnx", "original", an entry point of the group `tessera.exporters`, or
            the import path of a function.
        out: the folder to make; it must not exist.
        ema: the moving average of the weights.
        architecture: timm name or size; required for a weights file, refused otherwise.
        options: of the target: `pool`, `pretraining`, `scaling_factor`, `size`, or those of your own function.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: nothing at `where`.
        FileExistsError: something is at `out`.
        ValueError: the target cannot express the model, or an option does not fit it.
        ExportError: (a RuntimeError) the other library computes something else; nothing was published.
    """
    from pretrain.export.targets import export_model

    return export_model(where, Path(out), to, ema=ema, architecture=architecture, **options).folder
