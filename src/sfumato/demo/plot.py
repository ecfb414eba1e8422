"""The loss curve of the demo as an image."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from sfumato.track.charts.chart import Chart, Line, make_step_axis, make_zero_axis
from sfumato.track.charts.png import draw_charts

PLOT_HEIGHT = 520


def draw_loss_plot(losses: Sequence[float], *, title: str, subtitle: str = "") -> Image.Image:
    """Losses of steps 1, 2, ... as a faint line under their smoothed curve."""
    return draw_charts([make_demo_chart(losses)], height=PLOT_HEIGHT, title=title, subtitle=subtitle, end_values=True)


def make_demo_chart(losses: Sequence[float]) -> Chart:
    assert losses, "a plot needs at least one step"
    steps, values = np.arange(1, len(losses) + 1), np.asarray(losses)
    average = smooth(losses)
    return Chart(
        title="loss",
        x=make_step_axis(0, len(losses), most=9, name="optimizer step"),
        y=make_zero_axis(find_top(losses, average), most=7),
        lines=[
            Line(name="each step", x=steps, y=values, faint=True),
            Line(name="average", x=steps, y=np.asarray(average)),
        ],
    )


def smooth(values: Sequence[float]) -> list[float]:
    """The mean under a Gaussian window whose deviation is a thirtieth of the run, truncated at the ends."""
    deviation = max(1.0, len(values) / 30)
    reach = min(len(values), math.ceil(3 * deviation))
    window = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
    sums = np.convolve(values, window, mode="full")[reach:-reach]
    weights = np.convolve(np.ones(len(values)), window, mode="full")[reach:-reach]
    return (sums / weights).tolist()


def find_top(losses: Sequence[float], average: Sequence[float]) -> float:
    """The end of the y axis: above the average and above 98% of the steps."""
    highest = max(float(np.quantile(losses, 0.98)), max(average))
    return highest * 1.08 or 1.0
