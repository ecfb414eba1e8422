"""What all drawn pictures share: paper, ink, type, scales, and drawing at several times the size for smooth edges."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache

from PIL import ImageDraw, ImageFont

PAPER, INK, GREY, HAIRLINE = "#fcfbf8", "#2b2825", "#8a857e", "#e4e0d8"
ACCENT, PALE = "#b4562b", "#e9c9b6"  # burnt sienna, and what is left of it in the haze

FINE = 3  # everything is drawn so many times larger, then reduced


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own typeface, which needs no file."""
    return ImageFont.load_default(size)


def width_of(text: str, size: int) -> float:
    return font(size).getlength(text)


def wrapped(text: str, size: int, width: float) -> list[str]:
    """Lines of at most `width` pixels, broken between words; a longer word stands alone on its line."""
    lines: list[str] = []
    for word in text.split():
        if lines and width_of(f"{lines[-1]} {word}", size) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def ticks(top: float, *, most: int) -> list[float]:
    """Round numbers from 0 up to `top`, at most `most` of them: steps of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(top / most))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if top / (power * factor) <= most - 1)
    return [step * i for i in range(math.floor(top / step * (1 + 1e-9)) + 1)]


def curve(draw: ImageDraw.ImageDraw, places: Iterable[tuple[float, float]], colour: str, *, width: float) -> None:
    """A line through places of the fine picture; a single one becomes a dot."""
    points = list(places)
    draw.line(points if len(points) > 1 else points * 2, fill=colour, width=round(width * FINE), joint="curve")


def text(draw: ImageDraw.ImageDraw, x: float, y: float, line: str, size: int, colour: str, *, anchor: str) -> None:
    """At a place of the reduced picture."""
    draw.text((x * FINE, y * FINE), line, font=font(size * FINE), fill=colour, anchor=anchor)
