"""The charts of a report: which curves belong together, and what they are called."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pretrain.report.curves import format_value, line_chart
from pretrain.tracking.journal import MetricPoint

Curves = dict[str, list[MetricPoint]]
"""Metric -> its points, in the order of their steps."""


@dataclass(frozen=True)
class Panel:
    """One chart of the page: metrics that share a scale."""

    title: str
    """with the unit"""
    metrics: tuple[str, ...]
    """names in the journal; those that a run lacks are left out"""
    factor: float = 1.0
    """from the journal's unit to the one in the title"""
    from_zero: bool = False
    """whether the scale begins at 0"""
    log: bool = False
    """whether the scale may be logarithmic"""


PANELS = (
    Panel("Loss", ("train/loss", "val/loss"), log=True),
    Panel("Learning rate", ("train/lr",), from_zero=True),
    Panel("Gradient norm", ("train/grad_norm",), log=True),
    Panel("Throughput, samples/s over all ranks", ("throughput/samples_per_s",), from_zero=True),
    Panel("Waiting for data, % of the time, slowest rank", ("data/wait_fraction",), factor=100, from_zero=True),
    Panel(
        "Wait for data in a step, ms, slowest rank",
        ("data/wait_p50_ms_per_step", "data/wait_p99_ms_per_step"),
        from_zero=True,
    ),
    Panel("Loading, ms per sample", ("data/read_ms_per_sample", "data/decode_ms_per_sample"), from_zero=True),
    Panel("Data, MB/s", ("data/used_bytes_per_s", "data/fetched_bytes_per_s"), factor=1e-6, from_zero=True),
    Panel("Read amplification since the start", ("data/read_amplification",), from_zero=True),
    Panel("Cache hits, %", ("data/cache_hit_fraction",), factor=100, from_zero=True),
    Panel("Bad samples since the start", ("data/bad_samples",), from_zero=True),
    Panel("Model FLOPs utilisation, %", ("throughput/mfu",), factor=100, from_zero=True),
    Panel("Peak memory per rank, GiB", ("memory/peak_bytes_per_rank",), factor=2**-30, from_zero=True),
)
"""The charts of every run, in the order of the page."""


def panel_charts(curves: Curves, marks: Sequence[int]) -> list[dict[str, Any]]:
    """The charts of `PANELS`, and of the mixture's sources, for which the run has points.

    Args:
        curves: of the run.
        marks: steps at which the run was resumed.

    Returns:
        {"title", "svg", "legend"} for the template.
    """
    charts = (_chart(panel, curves, marks) for panel in (*PANELS, _mixture_panel(curves)))
    return [chart for chart in charts if chart is not None]


def other_charts(curves: Curves, marks: Sequence[int]) -> list[dict[str, Any]]:
    """A chart for each metric that is in no panel and is no evaluation's; arguments and result as `panel_charts`."""
    shown = {name for panel in (*PANELS, _mixture_panel(curves)) for name in panel.metrics}
    others = [name for name in sorted(curves) if name not in shown and not name.startswith("eval/")]
    charts = (_chart(Panel(name, (name,), log="loss" in name), curves, marks) for name in others)
    return [chart for chart in charts if chart is not None]


def evaluation_charts(curves: Curves) -> list[dict[str, Any]]:
    """A chart for each evaluation's metric, as `panel_charts` has them, with the "step" of the last point."""
    charts = []
    for name, points in sorted(curves.items()):
        if name.startswith("eval/"):
            chart = _chart(Panel(name.removeprefix("eval/"), (name,)), curves, ())
            charts.append({**(chart or {}), "step": points[-1].step})
    return charts


def _chart(panel: Panel, curves: Curves, marks: Sequence[int]) -> dict[str, Any] | None:
    """A panel for the template; None where the run has no point of it."""
    series = {
        name: [(float(point.step), panel.factor * point.value) for point in curves[name]]
        for name in panel.metrics
        if curves.get(name)
    }
    if not series:
        return None
    import markupsafe

    svg = line_chart(series, from_zero=panel.from_zero, log=panel.log, marks=marks)
    legend = [(name, format_value(points[-1][1])) for name, points in series.items()]
    return {"title": panel.title, "svg": markupsafe.Markup(svg), "legend": legend}


def _mixture_panel(curves: Curves) -> Panel:
    """The shares of a mixture's sources, where the run has some."""
    names = sorted(name for name in curves if name.startswith(("data/share_", "data/wanted_share_")))
    return Panel("Shares of the sources, %, consumed and wanted", tuple(names), factor=100, from_zero=True)
