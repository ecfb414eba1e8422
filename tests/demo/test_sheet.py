"""The demo's sheet of images: what is drawn where."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageColor

from sfumato.demo import sheet
from sfumato.track.charts.png import PAPER


def near(image: Image.Image, place: tuple[int, int], color: str) -> bool:
    pixel = image.getpixel(place)
    assert isinstance(pixel, tuple)
    return all(abs(a - b) < 40 for a, b in zip(pixel, ImageColor.getrgb(color), strict=True))


def test_each_image_is_in_its_row_state_and_seed() -> None:
    colors = ["#ff0000", "#00ff00", "#0000ff", "#ffff00", "#ff00ff", "#00ffff", "#800000", "#008000"]
    images = [Image.new("RGB", (64, 64), color) for color in colors]
    rows = [sheet.SheetRow(prompt="a cat", states=[images[i : i + 2], images[i + 2 : i + 4]]) for i in (0, 4)]
    page = sheet.draw_sheet(rows, ["before", "after"], title="Both", cell=100)
    for i, color in enumerate(colors):
        left = sheet.find_state_left(i // 2 % 2, 2, 100) + i % 2 * (100 + sheet.GAP)
        top = sheet.find_row_top(i // 4, 100)
        assert page.getpixel((left + 1, top + 1)) == ImageColor.getrgb(color)
        assert page.getpixel((left + 98, top + 98)) == ImageColor.getrgb(color)
        assert near(page, (left - 3, top + 50), PAPER)
    within = 100 + sheet.GAP
    assert sheet.find_state_left(1, 2, 100) - sheet.find_state_left(0, 2, 100) > 2 * within


def test_prompt_and_note_are_beside_their_row() -> None:
    white = Image.new("RGB", (8, 8), PAPER)
    rows = [
        sheet.SheetRow(prompt="a cat", note="seen in 1 of 1", states=[[white]]),
        sheet.SheetRow(prompt="", states=[[white]]),
    ]
    page = np.array(sheet.draw_sheet(rows, ["now"], title="", cell=120).convert("L"))
    captions = page[:, sheet.MARGIN : sheet.MARGIN + sheet.CAPTION_WIDTH - sheet.GAP] < 160
    first, second = sheet.find_row_top(0, 120), sheet.find_row_top(1, 120)
    assert captions[first : first + 20].any()
    assert captions[first + 30 : first + 60].any()
    assert not captions[second : second + 120].any()


def test_images_that_are_not_square_keep_their_shape() -> None:
    square = sheet.fit_into_square(Image.new("RGB", (40, 20), "#ff0000"), 100)
    assert square.size == (100, 100)
    assert square.getpixel((50, 50)) == (255, 0, 0)
    assert square.getpixel((50, 20)) == ImageColor.getrgb(PAPER)
