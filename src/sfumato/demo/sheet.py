"""Pictures side by side: a row for each prompt, in it the pictures of each state of the model, a seed each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from sfumato.track.drawing import GREY, HAIRLINE, INK, PAPER, font, wrapped

MARGIN, GAP = 36, 10  # around the sheet, between pictures
APART = 34  # between the states
CAPTION = 230  # width of the captions' column
TITLE, HEADING, PROMPT, NOTE = 24, 17, 17, 14  # sizes of type
HEAD = 136  # height of title and headings
LINE = 1.35  # distance of lines, in sizes of type


@dataclass(frozen=True, kw_only=True)
class Row:
    """One prompt and what each state of the model makes of it; every state has the same number of pictures."""

    prompt: str
    note: str = ""  # in grey, below the prompt
    states: Sequence[Sequence[Image.Image]]


def sheet(
    rows: Sequence[Row], headings: Sequence[str], *, title: str, subtitle: str = "", cell: int = 128
) -> Image.Image:
    """All pictures at `cell` pixels; the headings name the states."""
    assert rows, "a sheet needs at least one row"
    seeds = len(rows[0].states[0])
    for row in rows:
        assert [len(state) for state in row.states] == [seeds] * len(headings), "as many pictures in every state"
    width = state_left(len(headings) - 1, seeds, cell) + seeds * (cell + GAP) - GAP + MARGIN
    page = Image.new("RGB", (width, row_top(len(rows), cell) - GAP + MARGIN), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN), title, font=font(TITLE), fill=INK, anchor="lt")
    draw.text((MARGIN, MARGIN + 34), subtitle, font=font(NOTE), fill=GREY, anchor="lt")
    for i, heading in enumerate(headings):
        draw.text((state_left(i, seeds, cell), HEAD - 12), heading, font=font(HEADING), fill=INK, anchor="ls")
    for i in range(1, len(headings)):
        x = state_left(i, seeds, cell) - APART // 2
        draw.line((x, HEAD, x, page.height - MARGIN), fill=HAIRLINE, width=1)
    for i, row in enumerate(rows):
        write_caption(draw, row, row_top(i, cell))
        for j, state in enumerate(row.states):
            for k, picture in enumerate(state):
                left = state_left(j, seeds, cell) + k * (cell + GAP)
                page.paste(fitted(picture, cell), (left, row_top(i, cell)))
    return page


def row_top(row: int, cell: int) -> int:
    return HEAD + row * (cell + GAP)


def state_left(state: int, seeds: int, cell: int) -> int:
    """Where the first picture of a state begins."""
    return MARGIN + CAPTION + state * (seeds * (cell + GAP) - GAP + APART)


def write_caption(draw: ImageDraw.ImageDraw, row: Row, top: int) -> None:
    y = float(top)
    for size, colour, text in ((PROMPT, INK, row.prompt), (NOTE, GREY, row.note)):
        for line in wrapped(text, size, CAPTION - 2 * GAP):
            draw.text((MARGIN, y), line, font=font(size), fill=colour, anchor="lt")
            y += size * LINE
        y += NOTE / 2


def fitted(picture: Image.Image, cell: int) -> Image.Image:
    """The whole picture inside a square of `cell` pixels."""
    factor = cell / max(picture.size)
    size = (round(picture.width * factor), round(picture.height * factor))
    resized = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    square = Image.new("RGB", (cell, cell), PAPER)
    square.paste(resized, ((cell - size[0]) // 2, (cell - size[1]) // 2))
    return square
