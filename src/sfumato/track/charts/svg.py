"""Charts for a page: inline SVG that stretches with its figure, and labels as text that does not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np

from sfumato.track.charts.chart import Axis, Bars, Chart, Line, format_count, format_number, thin_curve, value_at
from sfumato.track.html import make_table

SIDE = 1000  # width and height of the drawing in its own units
MAX_MARKS = 200
TABLE_ROWS = 12


def render_figure(chart: Chart, key: str, *, table: str = "", wide: bool = False) -> str:
    """An HTML figure: heading, legend, drawing, note, and a table, by default of the lines' values.

    key: the id of the figure in the page.
    """
    note = f'<p class="note">{escape(chart.note)}</p>' if chart.note else ""
    return (
        f'<figure class="chart{" wide" if wide else ""}" id="{key}"><figcaption><h2>{escape(chart.title)}</h2>'
        f'<ul class="legend">{render_legend(chart)}</ul></figcaption>{render_plot(chart)}{note}'
        f"<details><summary>Numbers</summary>{table or make_number_table(chart)}</details></figure>"
    )


def render_legend(chart: Chart) -> str:
    entries = [(line.name, line_style(line)) for line in chart.lines]
    entries += [(bars.name, f"c{bars.color}") for bars in chart.bars]
    if chart.limit and chart.limit_is_visible:
        entries.append((chart.limit[0], "limit"))
    if chart.marks:
        entries.append((chart.marks_name, "bad"))
    return "".join(f'<li><i class="{style}"></i>{escape(name)}</li>' for name, style in entries)


def line_style(line: Line) -> str:
    return f"c{line.color} faint" if line.faint else f"c{line.color}"


def render_plot(chart: Chart) -> str:
    """Grid, drawing and labels; the ranges of the axes are attributes, for the pointer."""
    x, y = chart.x, chart.y
    grid = "".join(f"M0 {to_units(1 - y.fraction(tick))}H{SIDE}" for tick in y.ticks)
    drawing = [render_bars(bars, x, y) for bars in chart.bars] + [render_line(line, x, y) for line in chart.lines]
    drawing += [render_marks(chart.marks, x), render_limit(chart)]
    word = escape(get_word(chart))
    ranges = f' data-x="{x.low!r} {x.high!r}" data-y="{y.low!r} {y.high!r}" data-word="{word}"' if chart.lines else ""
    label = escape(describe_chart(chart))
    return (
        f'<div class="plot"{ranges}>'
        f'<svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none" role="img" aria-label="{label}">'
        f'<path class="grid" d="{grid}"/>{"".join(drawing)}</svg>{render_labels(x, y)}</div>'
    )


def describe_chart(chart: Chart) -> str:
    """The chart in words, for a screen reader."""
    if chart.bars:
        names = ", ".join(bars.name for bars in chart.bars)
        return f"{chart.title}: {names}; the numbers are in the table"
    ranges = [
        f"{line.name} from {format_number(line.y[0])} to {format_number(line.y[-1])}"
        for line in chart.lines
        if len(line.y)
    ]
    return f"{chart.title} over the {get_word(chart)}s: {', '.join(ranges)}"


def get_word(chart: Chart) -> str:
    """What the x axis counts."""
    return chart.x.name or "step"


def render_labels(x: Axis, y: Axis) -> str:
    rows = [
        f'<span class="y" style="top:{100 * (1 - y.fraction(tick)):.2f}%">{y.format(tick)}</span>' for tick in y.ticks
    ]
    columns = [
        f'<span class="x" style="left:{100 * x.fraction(tick):.2f}%">{x.format(tick)}</span>' for tick in x.ticks
    ]
    return "".join(rows + columns)


def render_line(line: Line, x: Axis, y: Axis) -> str:
    steps, values = thin_curve(line.x, line.y)
    if len(steps) == 1:  # one point is no line
        steps, values = np.repeat(steps, 2), np.repeat(values, 2)
    pairs = zip(steps, values, strict=True)
    points = " ".join(f"{to_units(x.fraction(step))},{to_units(1 - y.fraction(value))}" for step, value in pairs)
    return f'<polyline class="line {line_style(line)}" data-name="{escape(line.name)}" points="{points}"/>'


def render_bars(bars: Bars, x: Axis, y: Axis) -> str:
    rectangles: list[str] = []
    for left, right, value in zip(bars.left, bars.right, bars.y, strict=True):
        start, width = SIDE * x.fraction(left), SIDE * (x.fraction(right) - x.fraction(left))
        height = SIDE * y.fraction(value) if math.isfinite(value) else 0.0
        rectangles.append(
            f'<rect class="bar c{bars.color}" x="{start:.1f}" y="{SIDE - height:.1f}" width="{width:.1f}" '
            f'height="{height:.1f}" data-name="{escape(bars.name)}"/>'
        )
    return "".join(rectangles)


def render_marks(marks: Sequence[float], x: Axis) -> str:
    path = "".join(f"M{to_units(x.fraction(mark))} {SIDE}V{SIDE - 45}" for mark in marks[-MAX_MARKS:])
    return f'<path class="bad" d="{path}"/>' if path else ""


def render_limit(chart: Chart) -> str:
    if chart.limit is None or not chart.limit_is_visible:
        return ""
    return f'<path class="limit" d="M0 {to_units(1 - chart.y.fraction(chart.limit[1]))}H{SIDE}"/>'


def to_units(fraction: float) -> str:
    """0 .. 1 -> the drawing's own units."""
    return f"{fraction * SIDE:.4g}"


def make_number_table(chart: Chart) -> str:
    """The lines' values at about a dozen steps, the first and the last among them."""
    steps = np.unique(np.concatenate([line.x for line in chart.lines])) if chart.lines else np.empty(0)
    indices = np.unique(np.linspace(0, len(steps) - 1, min(TABLE_ROWS, len(steps))).round().astype(int))
    rows = [make_number_row(chart.lines, step) for step in steps[indices]]
    heads = [get_word(chart), *(line.name for line in chart.lines)]
    return make_table(heads, rows, caption=f"{chart.title}, at some of the {get_word(chart)}s")


def make_number_row(lines: Sequence[Line], step: float) -> list[str]:
    return [format_count(step), *(format_number(value_at(line, step)) for line in lines)]
