"""Writes modules as ONNX graphs, runs them with onnxruntime, and compares the outputs before they are published.

In: any module with example inputs. Out: a folder with one `.onnx` file per graph, each with its weights beside it
(`.onnx.data`: a graph alone may hold 2 GB), and README.md. It exists for those who run a model without torch; for
tokenizers and backbones see `pretrain/export/onnx_models.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from pretrain.export.card import compose_card, table
from pretrain.export.pictures import Errors, pictures_text
from pretrain.export.publish import ExportError, check_error, publish, relative_error

OPSET = 20
"""Version of ONNX's operators."""
TOLERANCE = 1e-5
"""Largest relative error of an output that is published."""

Inputs = tuple[Tensor, ...]
"""What a module is called with."""


@dataclass(frozen=True)
class Graph:
    """One file to write."""

    name: str
    """of the file, without its suffix"""
    module: nn.Module
    """gives one tensor or a tuple of them"""
    example: Inputs
    """what it is traced with; at least 2 long along each dynamic axis"""
    input_names: tuple[str, ...]
    """in the order of the module's arguments"""
    output_names: tuple[str, ...]
    """in the order of what the module gives"""
    dynamic: tuple[Mapping[int, Any], ...]
    """per input, the axes that may have any length, each with its `torch.export.Dim`"""
    checks: tuple[Inputs, ...]
    """inputs on which onnxruntime is compared with torch, of several lengths along the dynamic axes"""


@dataclass(frozen=True)
class OnnxExport:
    """What was published."""

    folder: Path
    """where it is"""
    files: tuple[str, ...]
    """the graphs; their weights lie beside them"""
    errors: Mapping[str, float]
    """per output, the largest |onnxruntime's - ours| / |ours| over what was compared"""
    pictures: Errors = field(default_factory=dict)
    """of the pictures that were compared from the file on, see `compare_pictures`"""


def export_onnx(
    module: nn.Module,
    inputs: Inputs,
    out: Path,
    *,
    input_names: Sequence[str],
    output_names: Sequence[str],
    dynamic: Sequence[Mapping[int, Any]] | None = None,
    checks: Sequence[Inputs] | None = None,
    tolerance: float = TOLERANCE,
) -> OnnxExport:
    """Exports a module into the new folder `out`, as model.onnx.

    Args:
        module: gives one tensor or a tuple of them; is put into evaluation mode.
        inputs: example inputs; at least 2 long along each dynamic axis.
        out: must not exist; it appears when everything has been compared, and not otherwise.
        input_names: names in the graph, in the order of the module's arguments.
        output_names: names in the graph, in the order of what the module gives.
        dynamic: per input, the axes of any length, each with its `torch.export.Dim`; None: axis 0, the batch.
        checks: inputs for the comparison; None: the example, and its first sample alone.
        tolerance: largest allowed relative error of an output.

    Raises:
        FileExistsError: something is at `out`.
        ImportError: onnx, onnxscript or onnxruntime is not installed.
        ExportError: onnxruntime computes something else.
    """
    graph = Graph(
        "model",
        module,
        inputs,
        tuple(input_names),
        tuple(output_names),
        tuple(dynamic) if dynamic is not None else ({0: Dim("batch")},) * len(inputs),
        tuple(checks) if checks is not None else (inputs, tuple(x[:1] for x in inputs)),
    )
    summary = f"An ONNX graph (opset {OPSET}) of a {type(module).__name__}."
    return export_graphs([graph], out, summary, {}, tolerance)


def export_graphs(
    graphs: Sequence[Graph],
    out: Path,
    summary: str,
    sections: Mapping[str, str],
    tolerance: float = TOLERANCE,
    compare_files: Callable[[Path], Errors] | None = None,
) -> OnnxExport:
    """Exports graphs with outputs of different names into the new folder `out`.

    Args:
        graphs: one file each.
        out: must not exist; it appears when everything has been compared, and not otherwise.
        summary: of the model card.
        sections: of the model card, which also lists the graphs and the errors that were measured.
        tolerance: largest allowed relative error of an output.
        compare_files: takes pictures through the graphs of a folder, from the file on.

    Raises:
        FileExistsError: something is at `out`.
        ImportError: onnx, onnxscript or onnxruntime is not installed.
        ExportError: onnxruntime computes something else.
    """
    _check_installed()
    errors: dict[str, float] = {}
    with publish(out) as partial:
        for graph in graphs:
            expected = outputs(graph)  # before tracing, which may leave its placeholders in a module's caches
            write_graph(graph, partial)
            for output, error in compare(graph, expected, partial).items():
                check_error(f"{graph.name}'s {output}", error, tolerance)
                errors[output] = error
        measured = ", ".join(f"{output} {error:.3g}" for output, error in errors.items())
        reproduction = (
            "Run with onnxruntime before publication, on inputs of several sizes along the dynamic axes. Largest "
            f"relative error (fp32): {measured}; allowed: {tolerance:.3g}."
        )
        pictures: Errors = {} if compare_files is None else compare_files(partial)
        if pictures:
            reproduction += f"\n\n{pictures_text(pictures)}"
        inventory = table({f"{graph.name}.onnx": _signature(graph) for graph in graphs})
        sections = {"Graphs": inventory, **sections, "Reproduction": reproduction}
        (partial / "README.md").write_text(compose_card(out.name, ("onnx",), summary, sections))
    return OnnxExport(out, tuple(f"{graph.name}.onnx" for graph in graphs), errors, pictures)


def write_graph(graph: Graph, folder: Path) -> None:
    """Writes NAME.onnx and NAME.onnx.data into `folder`."""
    with torch.no_grad(), warnings.catch_warnings():
        # Two inputs that share an axis are what a batch is.
        warnings.filterwarnings("ignore", message="# The axis name: .* will not be used", category=UserWarning)
        program = torch.onnx.export(
            graph.module.eval(),
            graph.example,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(graph.input_names),
            output_names=list(graph.output_names),
            dynamic_shapes=tuple(dict(axes) for axes in graph.dynamic),
            verbose=False,
        )
        assert program is not None
        program.save(folder / f"{graph.name}.onnx", external_data=True)


@torch.no_grad()
def outputs(graph: Graph) -> list[tuple[Tensor, ...]]:
    """What the module gives for each of the graph's checks, always as a tuple."""
    given = [graph.module.eval()(*inputs) for inputs in graph.checks]
    return [output if isinstance(output, tuple) else (output,) for output in given]


def compare(graph: Graph, expected: Sequence[tuple[Tensor, ...]], folder: Path) -> dict[str, float]:
    """Runs a graph with onnxruntime.

    Args:
        graph: whose checks are run.
        expected: of `outputs`.
        folder: holds the graph's file.

    Returns:
        Output -> the largest relative error; infinite where a value is not finite.

    Raises:
        ExportError: a dynamic axis has become a number, or an output has another shape.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / f"{graph.name}.onnx"), providers=["CPUExecutionProvider"])
    _check_axes(graph, {node.name: node.shape for node in session.get_inputs()})
    errors = dict.fromkeys(graph.output_names, 0.0)
    for inputs, ours in zip(graph.checks, expected, strict=True):
        feeds = {name: tensor.numpy() for name, tensor in zip(graph.input_names, inputs, strict=True)}
        theirs = session.run(list(graph.output_names), feeds)
        for name, their, our in zip(graph.output_names, theirs, ours, strict=True):
            errors[name] = max(errors[name], relative_error(name, torch.from_numpy(their), our))
    return errors


def run_graph(path: Path, **inputs: Tensor) -> dict[str, Tensor]:
    """The outputs of a graph, by name, with onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_outputs()]
    outputs = session.run(names, {name: tensor.contiguous().numpy() for name, tensor in inputs.items()})
    return {name: torch.from_numpy(output) for name, output in zip(names, outputs, strict=True)}


def _check_installed() -> None:
    """Refuses to begin without the packages that are needed at the end.

    Raises:
        ImportError: one of them is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"exporting to ONNX needs the package {error.name}: pip install 'tessera-pretrain[export]'"
        ) from error


def _check_axes(graph: Graph, shapes: Mapping[str, Sequence[Any]]) -> None:
    """Finds what torch does not say: that tracing has turned the length of a dynamic axis into a number.

    Args:
        graph: as it was to be.
        shapes: of the inputs in the file; a dynamic axis has a name there.

    Raises:
        ExportError: there is such an axis.
    """
    for name, axes in zip(graph.input_names, graph.dynamic, strict=True):
        fixed = [axis for axis in axes if isinstance(shapes[name][axis], int)]
        if fixed:
            raise ExportError(
                f"axis {fixed[0]} of {name} has become the number {shapes[name][fixed[0]]} in {graph.name}.onnx: the "
                "module reads its length as a Python number, with len(x) or int(...). Use x.shape there, or export "
                "with this axis fixed"
            )


def _signature(graph: Graph) -> str:
    """Inputs with their axes, and outputs, for the model card."""
    described = []
    for name, tensor, axes in zip(graph.input_names, graph.example, graph.dynamic, strict=True):
        sides = [str(getattr(axes.get(axis), "__name__", length)) for axis, length in enumerate(tensor.shape)]
        described.append(f"{name} [{', '.join(sides)}]")
    return f"{', '.join(described)} -> {', '.join(graph.output_names)}"
