"""A sheet of images: a row per prompt, in it the images of each state of the model, one per seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from sfumato.track.charts.png import GREY, HAIRLINE, INK, PAPER, font, wrap_text

MARGIN, GAP = 36, 10  # around the sheet, between images
STATE_GAP = 34  # between the states
CAPTION_WIDTH = 230  # width of the captions' column
TITLE, HEADING, PROMPT, NOTE = 24, 17, 17, 14  # sizes of type
HEADER_HEIGHT = 136  # height of title and headings
LINE_HEIGHT = 1.35  # distance of lines, in sizes of type


@dataclass(frozen=True, kw_only=True)
class SheetRow:
    """One prompt and what each state of the model makes of it; every state has the same number of images."""

    prompt: str
    note: str = ""  # in grey, below the prompt
    states: Sequence[Sequence[Image.Image]]


def draw_sheet(
    rows: Sequence[SheetRow], headings: Sequence[str], *, title: str, subtitle: str = "", cell: int = 128
) -> Image.Image:
    """The sheet with every image at `cell` pixels; the headings name the states."""
    assert rows, "a sheet needs at least one row"
    seeds = len(rows[0].states[0])
    for row in rows:
        assert [len(state) for state in row.states] == [seeds] * len(headings), (
            "every state needs the same number of images"
        )
    width = find_state_left(len(headings) - 1, seeds, cell) + seeds * (cell + GAP) - GAP + MARGIN
    page = Image.new("RGB", (width, find_row_top(len(rows), cell) - GAP + MARGIN), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN), title, font=font(TITLE), fill=INK, anchor="lt")
    draw.text((MARGIN, MARGIN + 34), subtitle, font=font(NOTE), fill=GREY, anchor="lt")
    for i, heading in enumerate(headings):
        draw.text(
            (find_state_left(i, seeds, cell), HEADER_HEIGHT - 12), heading, font=font(HEADING), fill=INK, anchor="ls"
        )
    for i in range(1, len(headings)):
        x = find_state_left(i, seeds, cell) - STATE_GAP // 2
        draw.line((x, HEADER_HEIGHT, x, page.height - MARGIN), fill=HAIRLINE, width=1)
    for i, row in enumerate(rows):
        draw_caption(draw, row, find_row_top(i, cell))
        for j, state in enumerate(row.states):
            for k, image in enumerate(state):
                left = find_state_left(j, seeds, cell) + k * (cell + GAP)
                page.paste(fit_into_square(image, cell), (left, find_row_top(i, cell)))
    return page


def find_row_top(row: int, cell: int) -> int:
    """The y of the images of a row, in pixels."""
    return HEADER_HEIGHT + row * (cell + GAP)


def find_state_left(state: int, seeds: int, cell: int) -> int:
    """The x of the first image of a state, in pixels."""
    return MARGIN + CAPTION_WIDTH + state * (seeds * (cell + GAP) - GAP + STATE_GAP)


def draw_caption(draw: ImageDraw.ImageDraw, row: SheetRow, top: int) -> None:
    y = float(top)
    for size, color, text in ((PROMPT, INK, row.prompt), (NOTE, GREY, row.note)):
        for line in wrap_text(text, size, CAPTION_WIDTH - 2 * GAP):
            draw.text((MARGIN, y), line, font=font(size), fill=color, anchor="lt")
            y += size * LINE_HEIGHT
        y += NOTE / 2


def fit_into_square(image: Image.Image, cell: int) -> Image.Image:
    """The uncropped image inside a square of `cell` pixels."""
    factor = cell / max(image.size)
    size = (round(image.width * factor), round(image.height * factor))
    resized = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    square = Image.new("RGB", (cell, cell), PAPER)
    square.paste(resized, ((cell - size[0]) // 2, (cell - size[1]) // 2))
    return square
