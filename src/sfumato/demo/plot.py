"""The loss of a run as a picture, drawn with Pillow alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from sfumato.track.drawing import ACCENT, FINE, GREY, HAIRLINE, INK, PALE, PAPER, curve, text, ticks

WIDTH, HEIGHT = 960, 520
LEFT, TOP, RIGHT, BOTTOM = 86, 104, 96, 64  # margins around the curve
TITLE, SUBTITLE, LABEL = 24, 15, 15  # sizes of type


@dataclass(frozen=True, kw_only=True)
class Axes:
    """From step and loss to a place in the picture; both axes begin at 0."""

    last: float
    top: float

    def x(self, step: float) -> float:
        return FINE * (LEFT + step / self.last * (WIDTH - LEFT - RIGHT))

    def y(self, loss: float) -> float:
        return FINE * (HEIGHT - BOTTOM - loss / self.top * (HEIGHT - TOP - BOTTOM))

    def places(self, losses: Sequence[float]) -> list[tuple[float, float]]:
        """Of the losses of steps 1, 2, ..."""
        return [(self.x(step), self.y(loss)) for step, loss in enumerate(losses, 1)]


def loss_plot(losses: Sequence[float], *, title: str, subtitle: str = "") -> Image.Image:
    """Losses of steps 1, 2, ... as a faint line under their smoothed curve."""
    assert losses, "a plot needs at least one step"
    smooth = smoothed(losses)
    axes = Axes(last=len(losses), top=ceiling(losses, smooth))
    picture = Image.new("RGB", (WIDTH * FINE, HEIGHT * FINE), PAPER)
    draw = ImageDraw.Draw(picture)
    draw_scales(draw, axes)
    curve(draw, axes.places([min(loss, axes.top) for loss in losses]), PALE, width=1.2)
    curve(draw, axes.places(smooth), ACCENT, width=3)
    mark_end(draw, axes, smooth)
    text(draw, LEFT, 40, title, TITLE, INK, anchor="ls")
    text(draw, LEFT, 66, subtitle, SUBTITLE, GREY, anchor="ls")
    return picture.reduce(FINE)


def smoothed(values: Sequence[float]) -> list[float]:
    """Average under a Gaussian window of a thirtieth of the run, cut off at the ends."""
    spread = max(1.0, len(values) / 30)
    reach = min(len(values), math.ceil(3 * spread))
    window = np.exp(-0.5 * (np.arange(-reach, reach + 1) / spread) ** 2)
    sums = np.convolve(values, window, mode="full")[reach:-reach]
    weights = np.convolve(np.ones(len(values)), window, mode="full")[reach:-reach]
    return (sums / weights).tolist()


def ceiling(losses: Sequence[float], smooth: Sequence[float]) -> float:
    """Top of the scale: above the curve and all but the wildest two in a hundred steps."""
    highest = max(float(np.quantile(losses, 0.98)), max(smooth))
    return highest * 1.08 or 1.0


def draw_scales(draw: ImageDraw.ImageDraw, axes: Axes) -> None:
    for loss in ticks(axes.top, most=7):
        y = axes.y(loss)
        draw.line((axes.x(0), y, axes.x(axes.last), y), fill=HAIRLINE if loss else GREY, width=FINE)
        text(draw, LEFT - 12, y / FINE, f"{loss:.3g}", LABEL, GREY, anchor="rm")
    for step in ticks(axes.last, most=9):
        if step == int(step):
            x = axes.x(step)
            draw.line((x, axes.y(0), x, axes.y(0) + 5 * FINE), fill=GREY, width=FINE)
            text(draw, x / FINE, HEIGHT - BOTTOM + 12, f"{step:,.0f}", LABEL, GREY, anchor="mt")
    text(draw, (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14, "optimizer step", LABEL, INK, anchor="ms")
    text(draw, LEFT - 12, TOP - 14, "loss", LABEL, INK, anchor="rs")


def mark_end(draw: ImageDraw.ImageDraw, axes: Axes, smooth: Sequence[float]) -> None:
    """A dot and the value where the smoothed curve ends."""
    x, y, radius = axes.x(len(smooth)), axes.y(smooth[-1]), 5 * FINE
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=ACCENT, outline=PAPER, width=FINE)
    text(draw, x / FINE + 14, y / FINE, f"{smooth[-1]:.3f}", 17, ACCENT, anchor="lm")
