"""What the demo's pictures share: paper, ink, type, and drawing at several times the size so that edges are smooth."""

from __future__ import annotations

from functools import cache

from PIL import ImageFont

PAPER, INK, GREY, HAIRLINE = "#fcfbf8", "#2b2825", "#8a857e", "#e4e0d8"
ACCENT, PALE = "#b4562b", "#e9c9b6"  # burnt sienna, and what is left of it in the haze


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
