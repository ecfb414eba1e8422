"""The charts of a run's report, made of its curves."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

from sfumato.common.text import list_some
from sfumato.track.charts.chart import (
    Axis,
    Bars,
    Chart,
    Line,
    find_step_axis,
    find_value_axis,
    format_number,
    make_zero_axis,
)
from sfumato.track.charts.svg import render_figure
from sfumato.track.html import make_table
from sfumato.track.report_curves import Curves, LevelLoss, loss_by_level

MAX_OTHER_CHARTS = 6
COLORS = 8  # in the style
VALIDATION_PREFIX = "loss/validation/"
VALIDATION, VALIDATION_LEVEL = f"{VALIDATION_PREFIX}step_average", re.compile(rf"{VALIDATION_PREFIX}t(\d+)")
OWN_SERIES = (  # which have charts of their own, or none
    "loss/current", "loss/average", "loss/epoch_average", "grad_norm", "speed/seconds_per_step",
)  # fmt: skip


def render_curves(curves: Curves, *, clip: float) -> Iterator[str]:
    """The loss over the full width, the others in pairs. clip: --max_grad_norm."""
    if not len(curves.xy("loss/current")[0]):
        yield '<section><h2>Curves</h2><p class="note">There is no step yet.</p></section>'
        return
    yield render_figure(make_loss_chart(curves), "loss", wide=True)
    figures = [*render_levels(curves), *render_validation(curves), *render_learning_rates(curves)]
    figures += [*render_norms(curves, clip), *render_others(curves)]
    if figures:
        yield f'<div class="pair">{"".join(figures)}</div>'


def make_line_chart(title: str, lines: Sequence[Line], *, robust: bool = True, note: str = "") -> Chart:
    """Lines over the steps."""
    x, y = find_step_axis(lines), find_value_axis(lines, robust=robust)
    return Chart(title=title, lines=lines, x=x, y=y, note=note)


def make_line(curves: Curves, series: str, name: str, *, color: int = 0, faint: bool = False) -> Line:
    steps, values = curves.xy(series)
    return Line(name=name, x=steps, y=values, color=color, faint=faint)


def make_loss_chart(curves: Curves) -> Chart:
    lines = [
        make_line(curves, "loss/current", "each step", faint=True),
        make_line(curves, "loss/average", "average"),
    ]
    note = "The average is over an epoch. Single steps beyond the scale are clipped."
    if len(curves.xy(VALIDATION)[0]):
        lines.append(make_line(curves, VALIDATION, "validation", color=1))
        note += " The validation loss is unweighted, with the same timesteps and noise every time."
    return Chart(
        title="Loss",
        lines=lines,
        x=find_step_axis(lines),
        y=find_value_axis(lines, robust=True),
        note=note,
        marks=curves.nonfinite_steps(),
        marks_name="skipped",
    )


def render_learning_rates(curves: Curves) -> Iterator[str]:
    """The learning rate of each group; groups that always have the same share a line."""
    shared: dict[bytes, list[str]] = {}
    for series in curves.series:
        steps, values = curves.xy(series)
        if series.startswith("lr/") and len(steps):
            shared.setdefault(steps.tobytes() + values.tobytes(), []).append(series)
    lines: list[Line] = []
    for series in shared.values():
        name = list_some([text.removeprefix("lr/") for text in series], 4)
        lines.append(make_line(curves, series[0], name, color=len(lines) % COLORS))
    if lines:
        yield render_figure(make_line_chart("Learning rate", lines, robust=False), "learning-rates")


def render_norms(curves: Curves, clip: float) -> Iterator[str]:
    steps, values = curves.xy("grad_norm")
    if not len(steps):
        return
    line = Line(name="before clipping" if clip > 0 else "norm", x=steps, y=values, color=1)
    limit, note = None, ""
    if clip > 0:
        limit = (f"clipped at {format_number(clip)}", clip)
        share = float(np.mean(values > clip))
        note = f"{100 * share:.3g}% of the steps were clipped at {format_number(clip)}."
    x, y = find_step_axis([line]), find_value_axis([line], robust=True)
    yield render_figure(Chart(title="Gradient norm", lines=[line], x=x, y=y, limit=limit, note=note), "norms")


def render_validation(curves: Curves) -> Iterator[str]:
    """The loss of the validation images at each timestep."""
    matches = [match for match in map(VALIDATION_LEVEL.fullmatch, curves.series) if match]
    lines: list[Line] = []
    for color, t in enumerate(sorted(int(match[1]) for match in matches)):
        line = make_line(curves, f"{VALIDATION_PREFIX}t{t}", f"t = {t}", color=color)
        if len(line.x):
            lines.append(line)
    if lines:
        note = "Mean loss of the validation images at each timestep, 0 clean to 1000 noise."
        chart = make_line_chart("Validation loss by noise level", lines, robust=False, note=note)
        yield render_figure(chart, "validation")


def render_others(curves: Curves) -> Iterator[str]:
    """The other series, a chart for each group of names."""
    groups: dict[str, list[str]] = {}
    for name in curves.series:
        if name not in OWN_SERIES and not name.startswith(("lr/", VALIDATION_PREFIX)) and len(curves.xy(name)[0]):
            groups.setdefault(name.rpartition("/")[0] or name, []).append(name)
    for number, (group, names) in enumerate(list(groups.items())[:MAX_OTHER_CHARTS]):
        lines = [
            make_line(curves, name, name.rpartition("/")[2], color=color) for color, name in enumerate(names[:COLORS])
        ]
        yield render_figure(make_line_chart(group, lines), f"other{number}")


def render_levels(curves: Curves) -> Iterator[str]:
    """Two bars for each tenth of the timesteps: early and late in the run."""
    levels = loss_by_level(curves)
    if levels:
        yield render_figure(make_level_chart(levels), "levels", table=make_level_table(levels))


def make_level_chart(levels: Sequence[LevelLoss]) -> Chart:
    early, late = np.array([level.early for level in levels]), np.array([level.late for level in levels])
    losses = np.concatenate([early, late])
    highest = float(np.max(losses[np.isfinite(losses)], initial=0.0))
    low, high = np.array([level.low for level in levels]), np.array([level.high for level in levels])
    width = high - low
    return Chart(
        title="Loss by noise level",
        x=Axis(low=0, high=levels[-1].high, ticks=[*low[::2], levels[-1].high]),
        y=make_zero_axis(highest * 1.06 or 1.0),
        bars=[
            Bars(name="first third of the steps", left=low + 0.14 * width, right=low + 0.49 * width, y=early, color=1),
            Bars(name="last third", left=low + 0.51 * width, right=low + 0.86 * width, y=late, color=0),
        ],
        note="Unweighted mean loss of the samples by timestep, 0 clean to 1000 noise.",
    )


def make_level_table(levels: Sequence[LevelLoss]) -> str:
    rows: list[list[str]] = []
    for level in levels:
        early, late = format_number(level.early), format_number(level.late)
        rows.append([f"{level.low} to {level.high}", early, str(level.early_count), late, str(level.late_count)])
    heads = ["timestep", "early", "samples", "late", "samples"]
    return make_table(heads, rows, caption="Loss by noise level")
