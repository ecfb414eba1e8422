"""The demo's loss curve: the numbers behind it, and where it is drawn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageColor

from sfumato.demo.plot import PLOT_HEIGHT, draw_loss_plot, make_demo_chart, smooth
from sfumato.track.charts.png import END_VALUE_WIDTH, PALETTE, PAPER, RIGHT, WIDTH, place_charts


def near(image: Image.Image, place: tuple[int, int], color: str) -> bool:
    pixel = image.getpixel(place)
    assert isinstance(pixel, tuple)
    return all(abs(a - b) < 40 for a, b in zip(pixel, ImageColor.getrgb(color), strict=True))


@given(st.integers(1, 300), st.floats(-5, 5))
def test_smoothing_keeps_a_constant(count: int, value: float) -> None:
    assert smooth([value] * count) == pytest.approx([value] * count)


def test_smoothing_is_an_average_under_a_gaussian() -> None:
    """Away from the ends: a spike becomes the window itself, a straight line stays."""
    spike = smooth([0.0] * 150 + [1.0] + [0.0] * 149)
    spread = 300 / 30
    expected = [np.exp(-0.5 * (i / spread) ** 2) / (spread * np.sqrt(2 * np.pi)) for i in (0, 5, 20)]
    assert [spike[150], spike[155], spike[170]] == pytest.approx(expected, rel=0.01)
    assert smooth([float(i) for i in range(300)])[100:200] == pytest.approx(list(range(100, 200)))


def test_the_curve_is_where_the_axes_say() -> None:
    losses = [2.0 - i / 100 for i in range(200)]
    image = draw_loss_plot(losses, title="loss")
    assert image.size == (WIDTH, PLOT_HEIGHT)
    (area,) = place_charts([make_demo_chart(losses)], height=PLOT_HEIGHT, right=WIDTH - RIGHT - END_VALUE_WIDTH)
    for step in (60, 100, 140):
        x, y = round(area.x(step)), round(area.y(losses[step - 1]))
        assert near(image, (x, y), PALETTE[0])
        assert near(image, (x + 60, y - 60), PAPER)


@pytest.mark.parametrize("losses", [[0.5], [0.0, 0.0], [1e-4, 5e4]])
def test_short_and_odd_runs_are_drawn(losses: list[float]) -> None:
    assert draw_loss_plot(losses, title="odd").getcolors(1 << 20)
