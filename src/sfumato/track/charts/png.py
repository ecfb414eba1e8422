"""Charts as an image file, drawn by Pillow: one below the other over the same x axis; lines, bars and axes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageColor, ImageDraw, ImageFont

from sfumato.track.charts.chart import Axis, Bars, Chart, Line, format_number

PAPER, INK, GREY, HAIRLINE = "#fcfbf8", "#2b2825", "#8a857e", "#e4e0d8"
PALETTE = ("#b4562b", "#4b748f", "#a67c1f", "#5f7d4f", "#84567c", "#3d8a83", "#c0714f", "#7a746b")
WIDTH = 960
LEFT, TOP, RIGHT, BOTTOM = 86, 128, 48, 72  # margins around the charts
END_VALUE_WIDTH = 48  # room on the right for the value at a line's end
CHART_GAP = 64  # between charts
TITLE_SIZE, TEXT_SIZE, VALUE_SIZE = 24, 15, 17  # font sizes in pixels
SCALE = 3  # everything is drawn this many times larger, then reduced, for smooth edges

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the reduced image


@dataclass(frozen=True, kw_only=True)
class PlotArea:
    """Where a chart's axes are in the image; x() and y() give pixels of the reduced image."""

    x_axis: Axis
    y_axis: Axis
    box: Box

    def x(self, value: float) -> float:
        left, _, right, _ = self.box
        return left + self.x_axis.fraction(value) * (right - left)

    def y(self, value: float) -> float:
        _, top, _, bottom = self.box
        return bottom - self.y_axis.fraction(value) * (bottom - top)


class Canvas:
    """Draws in pixels of the reduced image."""

    def __init__(self, height: int) -> None:
        self.image = Image.new("RGB", (WIDTH * SCALE, height * SCALE), PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def text(self, x: float, y: float, text: str, *, size: int = TEXT_SIZE, color: str = INK, anchor: str) -> None:
        self.draw.text((x * SCALE, y * SCALE), text, font=font(size * SCALE), fill=color, anchor=anchor)

    def line(self, points: Sequence[tuple[float, float]], color: str, *, width: float = 1.0) -> None:
        """A single point becomes a dot."""
        scaled = [(x * SCALE, y * SCALE) for x, y in points]
        if len(scaled) == 1:
            scaled *= 2
        self.draw.line(scaled, fill=color, width=round(width * SCALE), joint="curve")

    def rectangle(self, box: Box, color: str) -> None:
        self.draw.rectangle([value * SCALE for value in box], fill=color)

    def dot(self, x: float, y: float, color: str) -> None:
        x, y, radius = x * SCALE, y * SCALE, 5 * SCALE
        self.draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color, outline=PAPER, width=SCALE)


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own typeface, which needs no file."""
    return ImageFont.load_default(size)


def text_width(text: str, size: int) -> float:
    return font(size).getlength(text)


def break_word(word: str, size: int, width: float) -> list[str]:
    """Pieces of at most `width` pixels, at least a letter each, broken behind a mark of punctuation where one is near
    the end."""
    pieces: list[str] = []
    while text_width(word, size) > width and len(word) > 1:
        fitting = next((i for i in range(len(word) - 1, 1, -1) if text_width(word[:i], size) <= width), 1)
        marks = [i for i in range(max(fitting // 2, 1), fitting + 1) if word[i - 1] in "-_./="]
        end = marks[-1] if marks else fitting
        pieces.append(word[:end])
        word = word[end:]
    return [*pieces, word]


def wrap_text(text: str, size: int, width: float) -> list[str]:
    """Lines of at most `width` pixels, broken between words; longer words, e.g. names of files, are broken, too."""
    lines: list[str] = []
    for piece in (piece for word in text.split() for piece in break_word(word, size, width)):
        if lines and text_width(f"{lines[-1]} {piece}", size) <= width:
            lines[-1] += f" {piece}"
        else:
            lines.append(piece)
    return lines


def draw_charts(
    charts: Sequence[Chart], *, height: int, title: str, subtitle: str = "", end_values: bool = False
) -> Image.Image:
    """The charts, WIDTH x height pixels; they share the x axis of the last one.

    end_values: write the last value of each line that is not faint beside its end.
    """
    canvas = Canvas(height)
    canvas.text(LEFT, 44, title, size=TITLE_SIZE, anchor="ls")
    canvas.text(LEFT, 70, subtitle, color=GREY, anchor="ls")
    areas = place_charts(charts, height=height, right=WIDTH - RIGHT - (END_VALUE_WIDTH if end_values else 0))
    for chart, area in zip(charts, areas, strict=True):
        draw_y_axis(canvas, area, chart.title)
        for bars in chart.bars:
            draw_bars(canvas, area, bars)
        for line in chart.lines:
            draw_line(canvas, area, line)
            if end_values and not line.faint:
                draw_end_value(canvas, area, line)
    draw_x_axis(canvas, areas[-1], height)
    return canvas.image.reduce(SCALE)


def place_charts(charts: Sequence[Chart], *, height: int, right: int) -> list[PlotArea]:
    """The areas of the charts, one below the other, all of the same height."""
    each = (height - TOP - BOTTOM - CHART_GAP * (len(charts) - 1)) / len(charts)
    areas: list[PlotArea] = []
    for number, chart in enumerate(charts):
        top = TOP + number * (each + CHART_GAP)
        areas.append(PlotArea(x_axis=chart.x, y_axis=chart.y, box=(LEFT, top, right, top + each)))
    return areas


def draw_y_axis(canvas: Canvas, area: PlotArea, title: str) -> None:
    """The chart's title, and a hairline with its value for each tick."""
    left, top, right, _ = area.box
    canvas.text(left, top - 16, title, anchor="ls")
    for tick in area.y_axis.ticks:
        y = area.y(tick)
        canvas.line([(left, y), (right, y)], HAIRLINE if tick else GREY)
        canvas.text(left - 12, y, area.y_axis.format(tick), color=GREY, anchor="rm")


def draw_x_axis(canvas: Canvas, area: PlotArea, height: int) -> None:
    left, _, right, bottom = area.box
    for tick in area.x_axis.ticks:
        x = area.x(tick)
        canvas.line([(x, bottom), (x, bottom + 5)], GREY)
        canvas.text(x, bottom + 12, area.x_axis.format(tick), color=GREY, anchor="mt")
    low, high = area.x_axis.ends
    canvas.text(left, height - 18, low, anchor="ls")
    canvas.text(right, height - 18, high, anchor="rs")
    canvas.text((left + right) / 2, height - 18, area.x_axis.name, anchor="ms")


def draw_bars(canvas: Canvas, area: PlotArea, bars: Bars) -> None:
    """Pale bars with a strong upper edge, a pixel apart from their neighbors."""
    color, bottom = PALETTE[bars.color], area.y(0)
    for left, right, value in zip(bars.left, bars.right, bars.y, strict=True):
        x0, x1, y = area.x(left) + 1, area.x(right) - 1, area.y(value)
        canvas.rectangle((x0, y, x1, bottom), fade(color))
        canvas.rectangle((x0, y, x1, y + 2), color)


def draw_line(canvas: Canvas, area: PlotArea, line: Line) -> None:
    points = [(area.x(x), area.y(y)) for x, y in zip(line.x, line.y, strict=True)]
    color = PALETTE[line.color]
    canvas.line(points, fade(color) if line.faint else color, width=1.2 if line.faint else 3)


def draw_end_value(canvas: Canvas, area: PlotArea, line: Line) -> None:
    x, y = area.x(line.x[-1]), area.y(line.y[-1])
    canvas.dot(x, y, PALETTE[line.color])
    text = format_number(float(f"{line.y[-1]:.3g}"))
    canvas.text(x + 14, y, text, size=VALUE_SIZE, color=PALETTE[line.color], anchor="lm")


def fade(color: str) -> str:
    """30% of the color on paper."""
    mixed = zip(ImageColor.getrgb(color), ImageColor.getrgb(PAPER), strict=True)
    return "#" + "".join(f"{round(0.3 * front + 0.7 * back):02x}" for front, back in mixed)
