"""Sheets of images: a contact sheet, and a table of every combination of options' values."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, sqrt
from pathlib import Path

from PIL import Image, ImageDraw

from sfumato.common import files
from sfumato.data.images import read_image
from sfumato.track.charts.png import GREY, INK, PAPER, font, text_width, wrap_text

MARGIN, GAP = 24, 10  # around the sheet, between images
LABEL, NOTE = 18, 14  # sizes of type
LINE_DISTANCE = 1.35  # distance of lines, in sizes of type
MAX_CELL = 512  # pixels a side; larger images are made smaller
MIN_LABEL = 128  # width of the labels above, where the images are smaller
MAX_ROW_LABEL = 220  # width of the labels on the left
Cells = Sequence[Sequence[Path | None]]  # by row; None: an empty place


def draw_table(cells: Cells, columns: Sequence[str], rows: Sequence[str], title: str = "") -> Image.Image:
    """The images in rows and columns with these labels above and on the left; "" for none."""
    image_size = measure_cell(cells)
    width, height = max(image_size[0], MIN_LABEL if any(columns) else 0), image_size[1]
    left = MARGIN + min(MAX_ROW_LABEL, max(ceil(text_width(text, LABEL)) for text in rows) + GAP if any(rows) else 0)
    headings = [wrap_text(text, LABEL, width) for text in columns]
    heading_height = ceil(max(len(lines) for lines in headings) * LABEL * LINE_DISTANCE) if any(columns) else 0
    note = wrap_text(title, NOTE, left + len(columns) * (width + GAP) - GAP - MARGIN) if title else []
    note_height = ceil(len(note) * NOTE * LINE_DISTANCE) + (GAP if note else 0)
    top = MARGIN + note_height + heading_height
    size = (left + len(columns) * (width + GAP) - GAP + MARGIN, top + len(rows) * (height + GAP) - GAP + MARGIN)
    page = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(page)
    write_lines(draw, note, MARGIN, MARGIN, size=NOTE, color=GREY)
    for number, lines in enumerate(headings):
        y = top - ceil(len(lines) * LABEL * LINE_DISTANCE)
        write_lines(draw, lines, left + number * (width + GAP), y, size=LABEL, color=INK)
    for number, row in enumerate(cells):
        y = top + number * (height + GAP)
        write_lines(draw, wrap_text(rows[number], LABEL, left - MARGIN - GAP), MARGIN, y, size=LABEL, color=INK)
        for column, path in enumerate(row):
            if path is not None:
                page.paste(read_cell(path, image_size), (left + column * (width + GAP), y))
    return page


def draw_contact_sheet(paths: Sequence[Path]) -> Image.Image:
    """All images in about as many rows as columns, each with its file's name above."""
    columns = ceil(sqrt(len(paths)))
    padded: list[Path | None] = [*paths, *[None] * (-len(paths) % columns)]
    width, height = measure_cell([paths])
    label = ceil(NOTE * LINE_DISTANCE)
    rows = len(padded) // columns
    size = (2 * MARGIN + columns * (width + GAP) - GAP, 2 * MARGIN + rows * (height + label + GAP) - GAP)
    page = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(page)
    for number, path in enumerate(padded):
        if path is None:
            continue
        x = MARGIN + number % columns * (width + GAP)
        y = MARGIN + number // columns * (height + label + GAP)
        write_lines(draw, [keep_end(path.name, width)], x, y, size=NOTE, color=GREY)
        page.paste(read_cell(path, (width, height)), (x, y + label))
    return page


def keep_end(text: str, width: float) -> str:
    """The text's end, where not all of it fits into so many pixels."""
    if text_width(text, NOTE) <= width:
        return text
    kept = next((text[i:] for i in range(len(text)) if text_width("…" + text[i:], NOTE) <= width), "")
    return "…" + kept


def measure_cell(cells: Cells) -> tuple[int, int]:
    """The size, (width, height), that all images fit in."""
    sizes: list[tuple[int, int]] = []
    for path in (path for row in cells for path in row if path is not None):
        sizes.append(read_image(path).size)
    width, height = (max(side) for side in zip(*sizes, strict=True))
    factor = min(1.0, MAX_CELL / max(width, height))
    return round(width * factor), round(height * factor)


def read_cell(path: Path, size: tuple[int, int]) -> Image.Image:
    """The uncropped image on a ground of this size."""
    picture = read_image(path)
    factor = min(size[0] / picture.width, size[1] / picture.height, 1.0)
    if factor < 1:
        picture = picture.resize(
            (round(picture.width * factor), round(picture.height * factor)), Image.Resampling.LANCZOS
        )
    ground = Image.new("RGB", size, PAPER)
    ground.paste(picture, ((size[0] - picture.width) // 2, (size[1] - picture.height) // 2))
    return ground


def write_lines(draw: ImageDraw.ImageDraw, lines: Sequence[str], x: float, y: float, *, size: int, color: str) -> None:
    for number, line in enumerate(lines):
        draw.text((x, y + number * size * LINE_DISTANCE), line, font=font(size), fill=color, anchor="lt")


def save_sheet(page: Image.Image, path: Path) -> None:
    with files.write_atomically(path) as temporary:
        page.save(temporary, format="PNG")
