"""Pictures side by side: a row for each prompt and seed, a column for each state of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from PIL import Image, ImageDraw

from sfumato.track.drawing import GREY, HAIRLINE, INK, PAPER, font, wrapped

MARGIN, GAP = 36, 14  # around the sheet, between pictures
CAPTION = 250  # width of the captions' column
TITLE, HEADING, PROMPT, SEED = 24, 17, 17, 14  # sizes of type
HEAD = 136  # height of title and headings
LINE = 1.35  # distance of lines, in sizes of type


@dataclass(frozen=True, kw_only=True)
class Row:
    """The pictures of one prompt and seed, in the order of the columns."""

    prompt: str
    seed: int
    pictures: Sequence[Image.Image]


def sheet(
    rows: Sequence[Row], columns: Sequence[str], *, title: str, subtitle: str = "", cell: int = 192
) -> Image.Image:
    """All pictures at `cell` pixels, prompts written beside the first of their rows."""
    assert rows, "a sheet needs at least one row"
    assert all(len(row.pictures) == len(columns) for row in rows), "one picture for each column"
    tops = row_tops(rows, cell)
    width = 2 * MARGIN + CAPTION + len(columns) * (cell + GAP) - GAP
    page = Image.new("RGB", (width, tops[-1] + cell + MARGIN), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN), title, font=font(TITLE), fill=INK, anchor="lt")
    draw.text((MARGIN, MARGIN + 34), subtitle, font=font(SEED), fill=GREY, anchor="lt")
    for i, heading in enumerate(columns):
        place = (column_left(i, cell), HEAD - 12)
        draw.text(place, heading, font=font(HEADING), fill=INK, anchor="ls")
    for i, (row, top) in enumerate(zip(rows, tops, strict=True)):
        first = i == 0 or rows[i - 1].prompt != row.prompt
        if first and i:
            line = top - 2 * GAP + GAP // 2
            draw.line((MARGIN, line, width - MARGIN, line), fill=HAIRLINE, width=1)
        write_caption(draw, row, top, cell, with_prompt=first)
        for column, picture in enumerate(row.pictures):
            page.paste(fitted(picture, cell), (column_left(column, cell), top))
    return page


def row_tops(rows: Sequence[Row], cell: int) -> list[int]:
    """Where each row begins; a new prompt keeps more distance."""
    tops = [HEAD]
    for above, row in pairwise(rows):
        tops.append(tops[-1] + cell + (GAP if above.prompt == row.prompt else 3 * GAP))
    return tops


def column_left(column: int, cell: int) -> int:
    return MARGIN + CAPTION + column * (cell + GAP)


def write_caption(draw: ImageDraw.ImageDraw, row: Row, top: int, cell: int, *, with_prompt: bool) -> None:
    y = float(top)
    for line in wrapped(row.prompt, PROMPT, CAPTION - 2 * GAP) if with_prompt else ():
        draw.text((MARGIN, y), line, font=font(PROMPT), fill=INK, anchor="lt")
        y += PROMPT * LINE
    draw.text((MARGIN, top + cell), f"seed {row.seed}", font=font(SEED), fill=GREY, anchor="lb")


def fitted(picture: Image.Image, cell: int) -> Image.Image:
    """The whole picture inside a square of `cell` pixels."""
    factor = cell / max(picture.size)
    size = (round(picture.width * factor), round(picture.height * factor))
    resized = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    square = Image.new("RGB", (cell, cell), PAPER)
    square.paste(resized, ((cell - size[0]) // 2, (cell - size[1]) // 2))
    return square
