"""What a chart is, however it is drawn: lines, bars, axes with tick marks, and the numbers on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

MAX_POINTS = 1000  # of a drawn curve


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve; `faint` for raw values behind an average."""

    name: str
    x: np.ndarray
    y: np.ndarray
    color: int = 0  # index into the palette
    faint: bool = False


@dataclass(frozen=True, kw_only=True)
class Bars:
    """Bars from `left` to `right` on the x axis; nan for a bar that is missing."""

    name: str
    left: np.ndarray
    right: np.ndarray
    y: np.ndarray
    color: int = 0


def format_number(value: float) -> str:
    """At most four significant digits; a dash for nan and infinity."""
    return "–" if not math.isfinite(value) else f"{value:.4g}".replace("-", "−")


def format_count(value: float) -> str:
    return f"{value:,.0f}"


@dataclass(frozen=True, kw_only=True)
class Axis:
    """The range of one direction and its tick marks."""

    low: float
    high: float
    ticks: Sequence[float] = ()
    name: str = ""
    ends: tuple[str, str] = ("", "")  # what the lowest and the highest values are
    format: Callable[[float], str] = format_number

    def fraction(self, value: float) -> float:
        """0 at the low end, 1 at the high end, clipped beyond."""
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Lines and bars over one pair of axes. `marks`: values of x to point at, `limit`: a dashed level with its name."""

    title: str
    x: Axis
    y: Axis
    lines: Sequence[Line] = ()
    bars: Sequence[Bars] = ()
    marks: Sequence[float] = ()
    marks_name: str = ""
    limit: tuple[str, float] | None = None
    note: str = ""

    @property
    def limit_is_visible(self) -> bool:
        return self.limit is not None and self.y.low <= self.limit[1] <= self.y.high


def choose_ticks(low: float, high: float, *, most: int) -> list[float]:
    """Round numbers within, at most `most`: multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(power * factor for factor in (1, 2, 5, 10, 20, 50) if (high - low) / (power * factor) <= most - 1)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [step * i for i in range(first, last + 1)]


def make_step_axis(low: float, high: float, *, most: int = 6, name: str = "") -> Axis:
    """An axis of steps, with ticks at integers."""
    if low == high:
        low, high = low - 1, high + 1
    ticks = [tick for tick in choose_ticks(low, high, most=most) if tick == int(tick)]
    return Axis(low=low, high=high, ticks=ticks, name=name, format=format_count)


def find_step_axis(lines: Sequence[Line]) -> Axis:
    """The axis of steps that all lines fit."""
    ends: list[float] = []
    for line in lines:
        if len(line.x):
            ends += [float(line.x[0]), float(line.x[-1])]
    return make_step_axis(min(ends, default=0.0), max(ends, default=1.0))


def find_value_axis(lines: Sequence[Line], *, robust: bool) -> Axis:
    """The y axis of some lines, from 0 unless that would squeeze them into the upper half.

    robust: ignore the highest and lowest hundredth of the raw values.
    """
    values = [line.y for line in lines if len(line.y)]
    if not values:
        return Axis(low=0.0, high=1.0, ticks=(0.0, 0.5, 1.0))
    averages = [line.y for line in lines if len(line.y) and not line.faint] or values
    if robust:
        low = min(min(float(np.quantile(y, 0.01)) for y in values), min(float(y.min()) for y in averages))
        highs = [float(np.quantile(y, 0.99)) for y in values]
        high = max(highs + ([float(y.max()) for y in averages] if len(averages) < len(values) else []))
    else:
        low, high = min(float(y.min()) for y in values), max(float(y.max()) for y in values)
    if low >= 0 and low < 0.5 * high:
        low = 0.0
    if low == high:
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)
    margin = 0.06 * (high - low)
    low, high = (low if low == 0 else low - margin), high + margin
    return Axis(low=low, high=high, ticks=choose_ticks(low, high, most=6))


def make_zero_axis(high: float, *, most: int = 6, name: str = "") -> Axis:
    """A y axis from 0."""
    return Axis(low=0.0, high=high, ticks=choose_ticks(0.0, high, most=most), name=name)


def value_at(line: Line, x: float) -> float:
    """nan where the curve has no value of its own."""
    i = int(np.searchsorted(line.x, x))
    return float(line.y[i]) if i < len(line.x) and line.x[i] == x else math.nan


def thin_curve(x: np.ndarray, y: np.ndarray, most: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` points: the lowest and the highest of each stretch, so that no peak is lost."""
    if len(x) <= most:
        return x, y
    edges = np.linspace(0, len(x), most // 2 + 1).astype(int)
    indices: list[int] = []
    for start, end in pairwise(edges.tolist()):
        piece = y[start:end]
        low, high = start + int(piece.argmin()), start + int(piece.argmax())
        indices += sorted({low, high})
    return x[indices], y[indices]
