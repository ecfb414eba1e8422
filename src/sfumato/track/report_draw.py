"""Charts for a page: lines and bars as inline SVG that stretches, with labels as text that does not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np

from sfumato.track.report_curves import Level, thinned

SIDE = 1000  # of the drawing, in its own units, both ways
COLOURS = 8  # classes c0 .. c7 in the style
ROWS = 12  # of a table of numbers


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve; `faint` for raw values behind an average."""

    name: str
    x: np.ndarray
    y: np.ndarray
    colour: int = 0
    faint: bool = False


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Some lines over the steps. `marks`: steps to point at; `limit`: a dashed level with its name."""

    key: str  # of the figure in the page
    title: str
    lines: Sequence[Line]
    note: str = ""
    marks: Sequence[int] = ()
    limit: tuple[str, float] | None = None
    robust: bool = True  # leave the wildest hundredth out of the scale
    wide: bool = False


@dataclass(frozen=True, kw_only=True)
class Scale:
    """From values to the drawing and its tick marks."""

    low: float
    high: float
    ticks: Sequence[float] = field(default=())

    def part(self, value: float) -> float:
        """0 at the low end, 1 at the high end, cut off beyond."""
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))


def drawn(chart: Chart) -> str:
    """The figure: heading, legend, drawing, and its numbers as a table."""
    x, y = step_scale(chart.lines), value_scale(chart)
    lines = "".join(polyline(line, x, y) for line in chart.lines)
    plot = frame(chart, x, y, lines + marks(chart.marks, x) + limit(chart.limit, y))
    entries = [legend_entry(line.name, f"c{line.colour}{' faint' if line.faint else ''}") for line in chart.lines]
    if chart.limit and y.low <= chart.limit[1] <= y.high:
        entries.append(legend_entry(chart.limit[0], "limit"))
    if chart.marks:
        entries.append(legend_entry("left out", "bad"))
    return figure(
        chart.key, chart.title, "".join(entries), plot, chart.note, numbers(chart.lines, chart.title), chart.wide
    )


def figure(key: str, title: str, legend: str, plot: str, note: str, table: str, wide: bool = False) -> str:
    said = f'<p class="note">{escape(note)}</p>' if note else ""
    return (
        f'<figure class="chart{" wide" if wide else ""}" id="{key}"><figcaption><h2>{escape(title)}</h2>'
        f'<ul class="legend">{legend}</ul></figcaption>{plot}{said}'
        f"<details><summary>Numbers</summary>{table}</details></figure>"
    )


def legend_entry(name: str, style: str) -> str:
    return f'<li><i class="{style}"></i>{escape(name)}</li>'


def frame(chart: Chart, x: Scale, y: Scale, inside: str) -> str:
    """Grid, drawing and labels; the scales go along for the pointer."""
    grid = "".join(f"M0 {at(1 - y.part(tick))}H{SIDE}" for tick in y.ticks)
    labels = "".join(
        f'<span class="y" style="top:{100 * (1 - y.part(tick)):.2f}%">{shown(tick)}</span>' for tick in y.ticks
    ) + "".join(
        f'<span class="x" style="left:{100 * x.part(tick):.2f}%">{tick:,.0f}</span>' for tick in x.ticks
    )  # fmt: skip
    told = f"{chart.title} over the steps: " + ", ".join(
        f"{line.name} from {shown(line.y[0])} to {shown(line.y[-1])}" for line in chart.lines if len(line.y)
    )
    return (
        f'<div class="plot" data-x="{x.low!r} {x.high!r}" data-y="{y.low!r} {y.high!r}">'
        f'<svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none" role="img" aria-label="{escape(told)}">'
        f'<path class="grid" d="{grid}"/>{inside}</svg>{labels}</div>'
    )


def polyline(line: Line, x: Scale, y: Scale) -> str:
    steps, values = thinned(line.x, line.y)
    if len(steps) == 1:  # one point is no line
        steps, values = np.repeat(steps, 2), np.repeat(values, 2)
    points = " ".join(f"{at(x.part(a))},{at(1 - y.part(b))}" for a, b in zip(steps, values, strict=True))
    style = f"line c{line.colour}{' faint' if line.faint else ''}"
    return f'<polyline class="{style}" data-name="{escape(line.name)}" points="{points}"/>'


def marks(steps: Sequence[int], x: Scale) -> str:
    places = "".join(f"M{at(x.part(step))} {SIDE}V{SIDE - 45}" for step in steps[-200:])
    return f'<path class="bad" d="{places}"/>' if places else ""


def limit(level: tuple[str, float] | None, y: Scale) -> str:
    if level is None or not y.low <= level[1] <= y.high:
        return ""
    return f'<path class="limit" d="M0 {at(1 - y.part(level[1]))}H{SIDE}"/>'


def at(part: float) -> str:
    return f"{part * SIDE:.4g}"


def step_scale(lines: Sequence[Line]) -> Scale:
    ends = [float(step) for line in lines if len(line.x) for step in (line.x[0], line.x[-1])] or [0.0, 1.0]
    low, high = min(ends), max(ends)
    if low == high:
        low, high = low - 1, high + 1
    return Scale(low=low, high=high, ticks=[tick for tick in ticks(low, high, most=6) if tick == int(tick)])


def value_scale(chart: Chart) -> Scale:
    """From 0 where that does not squeeze the curves into the upper half, else from the lowest value."""
    raw = [line.y for line in chart.lines if len(line.y)]
    if not raw:
        return Scale(low=0.0, high=1.0, ticks=(0.0, 0.5, 1.0))
    whole = [line.y for line in chart.lines if len(line.y) and not line.faint] or raw
    if chart.robust:
        low = min(min(float(np.quantile(each, 0.01)) for each in raw), min(float(each.min()) for each in whole))
        ceilings = [float(np.quantile(each, 0.99)) for each in raw]
        high = max(ceilings + ([float(each.max()) for each in whole] if len(whole) < len(raw) else []))
    else:
        low, high = min(float(each.min()) for each in raw), max(float(each.max()) for each in raw)
    if low >= 0 and low < 0.5 * high:
        low = 0.0
    if low == high:
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)
    room = 0.06 * (high - low)
    low, high = (low if low == 0 else low - room), high + room
    return Scale(low=low, high=high, ticks=ticks(low, high, most=6))


def ticks(low: float, high: float, *, most: int) -> list[float]:
    """Round numbers within, at most `most`: multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(power * factor for factor in (1, 2, 5, 10, 20, 50) if (high - low) / (power * factor) <= most - 1)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [step * i for i in range(first, last + 1)]


def shown(value: float) -> str:
    """A number in few signs."""
    return "–" if not math.isfinite(value) else f"{value:.4g}".replace("-", "−")


def numbers(lines: Sequence[Line], title: str) -> str:
    """About a dozen steps of the curves, the first and the last among them."""
    steps = np.unique(np.concatenate([line.x for line in lines])) if lines else np.empty(0)
    places = np.unique(np.linspace(0, len(steps) - 1, min(ROWS, len(steps))).round().astype(int))
    rows = [[f"{step:,.0f}", *(shown(value_at(line, step)) for line in lines)] for step in steps[places]]
    return table(["step", *(line.name for line in lines)], rows, caption=f"{title}, at some of the steps")


def value_at(line: Line, step: float) -> float:
    """nan where the curve has no value of its own."""
    i = int(np.searchsorted(line.x, step))
    return float(line.y[i]) if i < len(line.x) and line.x[i] == step else math.nan


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str, style: str = "numbers") -> str:
    """Everything in it is escaped here. The first column names its row."""
    head = "".join(f'<th scope="col">{escape(each)}</th>' for each in heads)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(each)}</td>" for each in row[1:]) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0"><table class="{style}"><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def level_bars(levels: Sequence[Level]) -> str:
    """Two bars for each tenth of the timesteps: early and late in the run."""
    title = "Loss by noise level"
    highest = max([each for level in levels for each in (level.early, level.late) if math.isfinite(each)], default=1.0)
    top = highest * 1.06 or 1.0
    y = Scale(low=0.0, high=top, ticks=ticks(0.0, top, most=6))
    width = SIDE / len(levels)
    bars, labels = [], []
    for i, level in enumerate(levels):
        for place, value, colour, name in ((0.14, level.early, 1, "early"), (0.51, level.late, 0, "late")):
            height = SIDE * y.part(value) if math.isfinite(value) else 0.0
            bars.append(
                f'<rect class="bar c{colour}" x="{(i + place) * width:.1f}" y="{SIDE - height:.1f}" '
                f'width="{0.35 * width:.1f}" height="{height:.1f}" data-name="{name}"/>'
            )
        if i % 2 == 0:
            labels.append(f'<span class="x" style="left:{100 * i / len(levels):.1f}%">{level.low}</span>')
    labels.append('<span class="x" style="left:100%">1000</span>')
    labels += [f'<span class="y" style="top:{100 * (1 - y.part(t)):.2f}%">{shown(t)}</span>' for t in y.ticks]
    grid = "".join(f"M0 {at(1 - y.part(tick))}H{SIDE}" for tick in y.ticks)
    plot = (
        f'<div class="plot"><svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none" role="img" '
        f'aria-label="{title}: mean loss by timestep, early and late in the run; the numbers are in the table">'
        f'<path class="grid" d="{grid}"/>{"".join(bars)}</svg>{"".join(labels)}</div>'
    )
    rows = [
        [f"{level.low} to {level.high}", shown(level.early), str(level.early_count), shown(level.late),
         str(level.late_count)]
        for level in levels
    ]  # fmt: skip
    heads = ["timestep", "early", "samples", "late", "samples"]
    legend = legend_entry("first third of the steps", "c1") + legend_entry("last third", "c0")
    note = "Mean loss of the samples by timestep, 0 clean to 1000 noise, before any weighting."
    return figure("levels", title, legend, plot, note, table(heads, rows, caption=title))
