"""The demo's pictures: numbers behind the curve, and what is drawn where."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageColor

from sfumato.demo import plot, sheet
from sfumato.track.drawing import ACCENT, PAPER, ticks, width_of, wrapped


def near(picture: Image.Image, place: tuple[int, int], colour: str) -> bool:
    pixel = picture.getpixel(place)
    assert isinstance(pixel, tuple)
    return all(abs(a - b) < 40 for a, b in zip(pixel, ImageColor.getrgb(colour), strict=False))


@given(st.integers(1, 300), st.floats(-5, 5))
def test_smoothing_keeps_a_constant(count: int, value: float) -> None:
    assert plot.smoothed([value] * count) == pytest.approx([value] * count)


def test_smoothing_is_an_average_under_a_gaussian() -> None:
    """Away from the ends: a spike becomes the window itself, a straight line stays."""
    spike = plot.smoothed([0.0] * 150 + [1.0] + [0.0] * 149)
    spread = 300 / 30
    expected = [np.exp(-0.5 * (i / spread) ** 2) / (spread * np.sqrt(2 * np.pi)) for i in (0, 5, 20)]
    assert [spike[150], spike[155], spike[170]] == pytest.approx(expected, rel=0.01)
    assert plot.smoothed([float(i) for i in range(300)])[100:200] == pytest.approx(list(range(100, 200)))


@given(st.floats(1e-6, 1e6), st.integers(4, 12))
def test_ticks_are_few_and_round(top: float, most: int) -> None:
    found = ticks(top, most=most)
    assert 2 <= len(found) <= most
    assert found[0] == 0
    assert found[-1] <= top * (1 + 1e-6)
    assert found[-1] + found[1] > top
    digits = f"{found[1]:.6e}"
    assert digits[0] in "125"
    assert digits[1:8] == ".000000"


def test_the_curve_is_where_the_scales_say() -> None:
    losses = [2.0 - i / 100 for i in range(200)]
    picture = plot.loss_plot(losses, title="loss")
    axes = plot.Axes(last=200, top=plot.ceiling(losses, plot.smoothed(losses)))
    assert picture.size == (plot.WIDTH, plot.HEIGHT)
    for step in (60, 100, 140):
        place = (round(axes.x(step) / plot.FINE), round(axes.y(losses[step - 1]) / plot.FINE))
        assert near(picture, place, ACCENT)
        assert near(picture, (place[0] + 60, place[1] - 60), PAPER)


@pytest.mark.parametrize("losses", [[0.5], [0.0, 0.0], [1e-4, 5e4]])
def test_short_and_odd_runs_are_drawn(losses: list[float]) -> None:
    assert plot.loss_plot(losses, title="odd").getcolors(1 << 20)


@given(st.text(st.characters(codec="latin-1", categories=("L", "Zs")), max_size=80), st.integers(40, 300))
def test_wrapped_lines_fit_and_lose_no_word(text: str, width: int) -> None:
    lines = wrapped(text, 17, width)
    assert " ".join(lines).split() == text.split()
    assert all(width_of(line, 17) <= width or " " not in line for line in lines)


def test_each_picture_stands_in_its_row_state_and_seed() -> None:
    colours = ["#ff0000", "#00ff00", "#0000ff", "#ffff00", "#ff00ff", "#00ffff", "#800000", "#008000"]
    made = [Image.new("RGB", (64, 64), colour) for colour in colours]
    rows = [sheet.Row(prompt="a cat", states=[made[i : i + 2], made[i + 2 : i + 4]]) for i in (0, 4)]
    page = sheet.sheet(rows, ["before", "after"], title="Both", cell=100)
    for i, colour in enumerate(colours):
        left = sheet.state_left(i // 2 % 2, 2, 100) + i % 2 * (100 + sheet.GAP)
        top = sheet.row_top(i // 4, 100)
        assert page.getpixel((left + 1, top + 1)) == ImageColor.getrgb(colour)
        assert page.getpixel((left + 98, top + 98)) == ImageColor.getrgb(colour)
        assert near(page, (left - 3, top + 50), PAPER)
    within = 100 + sheet.GAP
    assert sheet.state_left(1, 2, 100) - sheet.state_left(0, 2, 100) > 2 * within


def test_prompt_and_note_stand_beside_their_row() -> None:
    white = Image.new("RGB", (8, 8), PAPER)
    rows = [
        sheet.Row(prompt="a cat", note="seen in 1 of 1", states=[[white]]),
        sheet.Row(prompt="", states=[[white]]),
    ]
    page = np.array(sheet.sheet(rows, ["now"], title="", cell=120).convert("L"))
    captions = page[:, sheet.MARGIN : sheet.MARGIN + sheet.CAPTION - sheet.GAP] < 160
    first, second = sheet.row_top(0, 120), sheet.row_top(1, 120)
    assert captions[first : first + 20].any()
    assert captions[first + 30 : first + 60].any()
    assert not captions[second : second + 120].any()


def test_pictures_that_are_not_square_keep_their_shape() -> None:
    square = sheet.fitted(Image.new("RGB", (40, 20), "#ff0000"), 100)
    assert square.size == (100, 100)
    assert square.getpixel((50, 50)) == (255, 0, 0)
    assert square.getpixel((50, 20)) == ImageColor.getrgb(PAPER)
