"""Line charts as inline SVG, for pages that must stand alone and follow the reader's light or dark theme.

In: series of (step, value). Out: one `<svg>` string of a few kB whatever the length of the run, coloured by the
page's CSS variables (`--series-0` ..., `--muted`, `--grid`). A chart of many points shows the mean per column, with a
band from the smallest to the largest value; points that are not finite are crosses on the upper edge, because a NaN
must be seen and not be left out.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 520, 230
"""Pixels of the view box."""
LEFT, RIGHT, TOP, BOTTOM = 58, 24, 10, 34
"""Margins around the curves, in pixels."""
MAX_COLUMNS = 220
"""A longer curve shows this many means; more would be finer than the eye sees at this width."""
MAX_DOTS = 40
"""A curve of at most this many points also shows each of them as a dot, with its value on hovering."""
LOG_RATIO = 30.0
"""Largest / smallest value from which a logarithmic scale shows more."""

Point = tuple[float, float]
"""(step, value)."""


@dataclass(frozen=True)
class Scale:
    """Maps values to pixels, linearly or by their logarithm."""

    low: float
    """the value at `start`"""
    high: float
    """the value at `end`"""
    start: float
    """in pixels"""
    end: float
    """in pixels; may be smaller than `start`, as the vertical axis points down"""
    log: bool = False
    """logarithmic; values are positive then"""

    def __call__(self, value: float) -> float:
        """The pixel of a value, to a tenth."""
        low, high, value = (math.log10(x) if self.log else x for x in (self.low, self.high, value))
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """Round numbers within the range: about five equal steps, or powers of ten (few of them: also 2 and 5)."""
        if self.log:
            exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            factors = (1,) if len(exponents) > 4 else (1, 2, 5)
            values = [factor * 10.0**exponent for exponent in exponents for factor in factors]
            return [value for value in values if self.low <= value <= self.high]
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / 5))
        step *= next(factor for factor in (1, 2, 2.5, 5, 10) if (self.high - self.low) / (step * factor) <= 5.5)
        first = math.ceil(self.low / step - 1e-9)
        return [index * step for index in range(first, math.floor(self.high / step + 1e-9) + 1)]


def line_chart(
    series: Mapping[str, Sequence[Point]], *, from_zero: bool = False, log: bool = False, marks: Sequence[float] = ()
) -> str:
    """Draws one chart.

    Args:
        series: label -> points in the order of their steps.
        from_zero: the scale begins at 0.
        log: the scale is logarithmic where all values are positive and span more than LOG_RATIO.
        marks: steps that get a vertical line, because the run was resumed there.

    Returns:
        An `<svg>` string; empty where no series has a point.
    """
    shown = {label: list(points) for label, points in series.items() if points}
    if not shown:
        return ""
    steps = [step for points in shown.values() for step, _ in points]
    values = [value for points in shown.values() for _, value in points if math.isfinite(value)]
    x = Scale(min(steps), max(steps) if max(steps) > min(steps) else min(steps) + 1, LEFT, WIDTH - RIGHT)
    y = _value_scale(values, from_zero, log)
    parts = [*_axes(x, y), *(_mark(x, step) for step in marks if x.low < step < x.high)]
    for index, (label, points) in enumerate(shown.items()):
        parts += _series(x, y, points, index, label)
    label = escape(" and ".join(shown), quote=True)
    body = "".join(parts)
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label} over steps">{body}</svg>'


def _value_scale(values: Sequence[float], from_zero: bool, log: bool) -> Scale:
    """The vertical scale for these values, with some room around them."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    log = log and low > 0 and high / low > LOG_RATIO
    if log:
        return Scale(low / 1.1, high * 1.1, HEIGHT - BOTTOM, TOP, log=True)
    if from_zero:
        low = min(low, 0.0)
    margin = 0.06 * (high - low) if high - low > 1e-9 * max(abs(high), abs(low)) else 0.1 * abs(high) or 1.0
    return Scale(low if from_zero and low == 0 else low - margin, high + margin, HEIGHT - BOTTOM, TOP)


def _axes(x: Scale, y: Scale) -> list[str]:
    """Horizontal lines at round values, and round steps below them."""
    parts, label_y = [], HEIGHT - BOTTOM + 15
    for value in y.ticks():
        at = y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 3.5}" text-anchor="end">{format_value(value)}</text>')
    parts += [
        f'<text x="{x(step)}" y="{label_y}" text-anchor="middle">{format_value(step)}</text>'
        for step in x.ticks()
        if step == int(step)  # there is no half a step
    ]
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">optimizer step</text>')
    return parts


def _mark(x: Scale, step: float) -> str:
    """The vertical line at a step where the run was resumed."""
    at, title = x(step), f"<title>resumed at step {step:g}</title>"
    return f'<line class="mark" x1="{at}" x2="{at}" y1="{TOP}" y2="{HEIGHT - BOTTOM}">{title}</line>'


def _series(x: Scale, y: Scale, points: Sequence[Point], index: int, label: str) -> list[str]:
    """One curve in the colour of its index, with its band, dots and crosses."""
    colour, label = f"var(--series-{index % 4})", escape(label)
    columns = _columns([point for point in points if math.isfinite(point[1])])
    line = [(x(step), y(mean)) for step, _, mean, _ in columns]
    parts = []
    if any(low < high for _, low, _, high in columns):
        upper = [(x(step), y(high)) for step, _, _, high in columns]
        lower = [(x(step), y(low)) for step, low, _, _ in columns]
        parts.append(f'<polygon points="{_path([*upper, *reversed(lower)])}" fill="{colour}" opacity="0.18"/>')
    parts.append(f'<polyline points="{_path(line)}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
    if len(line) <= MAX_DOTS:
        for (px, py), (step, _, mean, _) in zip(line, columns, strict=True):
            title = f"<title>{label}, step {step:g}: {mean:.6g}</title>"
            parts.append(f'<circle cx="{px}" cy="{py}" r="2.4" fill="{colour}">{title}</circle>')
    for step, value in [point for point in points if not math.isfinite(point[1])][:MAX_COLUMNS]:
        title = f"<title>{label}, step {step:g}: {value}</title>"
        parts.append(f'<text class="cross" x="{x(step)}" y="{TOP + 6}" text-anchor="middle">&#215;{title}</text>')
    return parts


def _columns(points: Sequence[Point]) -> list[tuple[float, float, float, float]]:
    """Joins consecutive points in at most MAX_COLUMNS groups of about equal size.

    Returns:
        (step, smallest, mean, largest) of each group.
    """
    size = -(-len(points) // MAX_COLUMNS) or 1
    columns = []
    for first in range(0, len(points), size):
        part = points[first : first + size]
        values = [value for _, value in part]
        columns.append((part[len(part) // 2][0], min(values), math.fsum(v / len(values) for v in values), max(values)))
    if size > 1:  # the ends of the curve stay where they are
        columns[0] = (points[0][0], *columns[0][1:])
        columns[-1] = (points[-1][0], *columns[-1][1:])
    return columns


def _path(points: Sequence[Point]) -> str:
    """The points of an SVG line."""
    return " ".join(f"{px:g},{py:g}" for px, py in points)


def format_value(value: float) -> str:
    """A number for people: four significant digits, thousands as k, M, G; powers of ten where it is tiny."""
    if not math.isfinite(value):
        return str(value)
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if suffix == 'k' else limit):.4g}{suffix}"
    return f"{value:.2e}".replace("e-0", "e-") if 0 < abs(value) < 1e-3 else f"{value:.4g}"
